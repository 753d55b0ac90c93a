"""The timeline as one HTML file that needs nothing else: no network, no fonts, no libraries. What it draws with is `page.js`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _template() -> tuple[str, str]:
    """What comes before the data, and what comes after."""
    here = Path(__file__).parent
    page = (here / "page.html").read_text("utf-8")
    page = page.replace("/*STYLE*/", (here / "page.css").read_text("utf-8").strip())
    before, after = page.split("/*DATA*/")
    return before, after.replace("/*SCRIPT*/", (here / "page.js").read_text("utf-8").strip())


def render(timeline: Mapping[str, Any]) -> str:
    """`timeline` is the reply of `/v1/polymux/timeline`. Names in it cannot end the element that holds them."""
    before, after = _template()
    return before + encode(timeline).replace("<", "\\u003c") + after


def encode(timeline: Mapping[str, Any]) -> str:
    """The reply as JSON, lane by lane: in a thread of its own it leaves the interpreter to others in between."""
    lanes = ",".join(_dumps(lane) for lane in timeline["lanes"])
    rest = _dumps({name: value for name, value in timeline.items() if name != "lanes"})
    return f'{rest[:-1]},"lanes":[{lanes}]}}'


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
