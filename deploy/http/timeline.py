"""`GET /v1/polymux/timeline`: what every worker did lately, as JSON, as a trace for Perfetto, or as a page for a browser."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.timeline.chrome import trace
from polymux.deploy.timeline.page import encode, render
from polymux.transport.errors import InvalidRequest
from polymux.transport.messages import LookBack

SECONDS, MAX_SECONDS = 300.0, 3600.0
SPANS, MAX_SPANS = 4096, 65_536  # of each worker
MEDIA = {"json": "application/json", "chrome": "application/json", "html": "text/html; charset=utf-8"}
# The page runs its own script, draws, and asks where it came from; nothing else.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


class TimelineEndpoint:
    def __init__(self, frontdoor: FrontDoor) -> None:
        self._frontdoor = frontdoor

    async def get(self, request: Request) -> Response:
        look, form = parse(request.query_params, request.headers.get("accept", ""))
        timeline = await self._frontdoor.timeline(look)
        body = await asyncio.to_thread(_body, timeline, form)  # it may take a while, and other requests' tokens are to flow
        headers = {"Cache-Control": "no-store"}
        if form == "html":
            headers["Content-Security-Policy"] = PAGE_POLICY
        if form == "chrome":
            headers["Content-Disposition"] = 'attachment; filename="polymux-timeline.json"'
        return Response(body, media_type=MEDIA[form], headers=headers)


def parse(query: Mapping[str, str], accept: str = "") -> tuple[LookBack, str]:
    """Raises InvalidRequest, naming the parameter."""
    form = query.get("format") or ("html" if "text/html" in accept else "json")
    if form not in MEDIA:
        raise InvalidRequest(f"format={form[:40]!r} is not one of {', '.join(MEDIA)}", param="format")
    try:
        seconds = float(query.get("seconds", SECONDS))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_SECONDS:
        raise InvalidRequest(f"seconds={query.get('seconds', '')[:40]!r} must be above 0 and at most {MAX_SECONDS:g}", param="seconds")
    limit = query.get("limit", str(SPANS))
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= MAX_SPANS:
        raise InvalidRequest(f"limit={limit[:40]!r} must be from 1 to {MAX_SPANS}", param="limit")
    return LookBack(within_s=seconds, max_spans=int(limit)), form


def _body(timeline: Mapping[str, Any], form: str) -> str:
    if form == "html":
        return render(timeline)
    return encode(timeline) if form == "json" else json.dumps(trace(timeline), allow_nan=False, separators=(",", ":"))
