"""A generation as server-sent events: headers once it is sure to succeed, a comment where it is silent, an error as its last event."""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.types import Send

from polymux.deploy.http.choice import Delta
from polymux.deploy.http.errors import error_from_exception, error_json
from polymux.deploy.http.request import OpenRequest
from polymux.deploy.http.settings import HttpSettings
from polymux.transport.errors import Cancelled, PolymuxError

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
PING = b": ping\n\n"
DONE = "data: [DONE]\n\n"


class StreamFormat(Protocol):
    def opening(self, request: OpenRequest) -> str: ...

    def chunk(self, delta: Delta, request: OpenRequest) -> str: ...

    def usage_chunk(self, request: OpenRequest) -> str: ...


async def stream(request: OpenRequest, form: StreamFormat, settings: HttpSettings, send: Send) -> None:
    """Send the whole response. Raises what ended the request before the first event, so that it can still have its own status."""
    text = form.opening(request)
    pulse = Pulse(request, settings.first_byte_s, settings.keep_alive_s)
    has_begun = False
    try:
        while not request.is_finished:
            for delta in await request.news():
                text += form.chunk(delta, request)
            if not has_begun:
                has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            if not request.is_finished:  # else it goes with the last line
                await send({"type": "http.response.body", "body": text.encode() or PING, "more_body": True})
                pulse.sent()
                text = ""
        text += form.usage_chunk(request)
    except Cancelled:
        raise
    except PolymuxError as error:
        if not has_begun:
            raise
        request_id = request.generation.envelope.public_id
        text += f"data: {error_json(error_from_exception(error, request_id))}\n\n"
    finally:
        pulse.stop()
    await send({"type": "http.response.body", "body": (text + DONE).encode(), "more_body": False})


class Pulse:
    """Wakes a request that has sent nothing for a while: the first time so that its headers go out, then so that proxies keep it open."""

    def __init__(self, request: OpenRequest, first_s: float, interval_s: float) -> None:
        self._request = request
        self._wait_s = first_s
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._sent_s = self._loop.time()
        self._timer = self._loop.call_later(first_s, self._tick)

    def sent(self) -> None:
        self._sent_s = self._loop.time()
        self._wait_s = self._interval_s

    def stop(self) -> None:
        self._timer.cancel()

    def _tick(self) -> None:
        due_s = self._sent_s + self._wait_s - self._loop.time()
        if due_s < 1e-3:
            self._request.poke()
            due_s = self._interval_s
        self._timer = self._loop.call_later(due_s, self._tick)
