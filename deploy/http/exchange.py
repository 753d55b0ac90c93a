"""One HTTP exchange: its body read within bounds, its headers checked, its end logged."""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from polymux.deploy.http.generation import Envelope
from polymux.deploy.http.openai import MAX_SLO_MS
from polymux.deploy.http.settings import HttpSettings
from polymux.transport.errors import Cancelled, DeadlineExceeded, InvalidRequest, RequestTooLarge

_PUBLIC_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class Exchange:
    """What the gate knows of a request before its endpoint runs; kept in the ASGI scope's state."""

    request_id: str  # unique; ours
    public_id: str  # the client's X-Request-Id, else ours; echoed
    tenant: str = ""
    user: str | None = None  # of the client's client, as the body names them

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        found = scope["state"]["exchange"]
        assert isinstance(found, cls)
        return found


def new_exchange(headers: Headers) -> Exchange:
    """A client's id that is unfit for a header or a log line is replaced by ours."""
    request_id = uuid.uuid4().hex
    given = headers.get("x-request-id", "")
    return Exchange(request_id, given if _PUBLIC_ID.fullmatch(given) else request_id)


def envelope(exchange: Exchange, headers: Headers, request_timeout_s: float, public_id: str | None = None) -> Envelope:
    """Raises InvalidRequest naming the header that is no number in its range."""
    timeout_s = _number(headers, "x-request-timeout-s", 1.0, math.inf)
    return Envelope(
        request_id=exchange.request_id,
        public_id=public_id or exchange.public_id,
        tenant=exchange.tenant,
        timeout_s=min(timeout_s or request_timeout_s, request_timeout_s),
        ttft_slo_s=_number(headers, "x-slo-ttft-ms", 1e-3, MAX_SLO_MS),
        tpot_slo_s=_number(headers, "x-slo-tpot-ms", 1e-3, MAX_SLO_MS),
    )


async def read_body(receive: Receive, headers: Headers, settings: HttpSettings) -> bytes:
    """Raises RequestTooLarge, DeadlineExceeded for a body that does not come, Cancelled for a client that goes away."""
    limit = settings.max_body_bytes
    too_large = RequestTooLarge(f"the body is larger than {limit} bytes, this server's limit")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client went away while it sent its body")
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise DeadlineExceeded(f"the body did not arrive within {settings.body_timeout_s:g} s") from None


def _number(headers: Headers, name: str, scale: float, highest: float) -> float | None:
    """A header's positive number times `scale`; None when it is not there."""
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= highest or math.isinf(value):
        raise InvalidRequest(f"{name}={text[:40]!r} must be a number above 0", param=name)
    return value * scale
