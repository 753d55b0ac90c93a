"""`POST /v1/polymux/workers/{id}/drain`: empty a worker, then stop it. For operators; it needs a key where keys are configured."""

from __future__ import annotations

import math

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from polymux.deploy.http.frontdoor import FrontDoor
from polymux.transport.errors import InvalidRequest
from polymux.transport.units import WorkerId

TIMEOUT_S, MAX_TIMEOUT_S = 60.0, 600.0


class WorkersEndpoint:
    def __init__(self, frontdoor: FrontDoor) -> None:
        self._frontdoor = frontdoor

    async def drain(self, request: Request) -> Response:
        """Answers once it has stopped; 400 for a worker that is not there or that nobody could stand in for, 408 when it stays."""
        worker_id = WorkerId(request.path_params["id"])
        await self._frontdoor.drain_worker(worker_id, _timeout_s(request.query_params.get("timeout_s")))
        return JSONResponse({"worker": worker_id, "state": "stopped"})


def _timeout_s(text: str | None) -> float:
    try:
        seconds = TIMEOUT_S if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout_s={str(text)[:40]!r} must be above 0 and at most {MAX_TIMEOUT_S:g}", param="timeout_s")
    return seconds
