"""A timeline into a file: the page, the plain reply, or a trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymux.deploy.timeline.chrome import trace
from polymux.deploy.timeline.page import encode, render
from polymux.transport.errors import InvalidRequest


def write(timeline: Mapping[str, Any], path: Path, *, is_chrome: bool) -> str:
    """Returns what was found, in words. Raises InvalidRequest for a suffix of no format, OSError."""
    if is_chrome:
        text = json.dumps(trace(timeline), separators=(",", ":"))
    elif path.suffix in (".html", ".htm"):
        text = render(timeline)
    elif path.suffix == ".json":
        text = encode(timeline)
    else:
        raise InvalidRequest(f"--out {path}: end the name in .html or .json, or add --chrome", param="out")
    path.write_text(text, "utf-8")
    lanes = timeline["lanes"]
    missing = ", ".join(lane["worker_id"] for lane in lanes if lane["missing"])
    return f"{sum(len(lane['spans']) for lane in lanes)} spans of {len(lanes)} workers" + (f" (missing: {missing})" if missing else "")
