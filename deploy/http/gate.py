"""What every exchange goes through: an id, a key, errors in one shape, one line in the log. Plain ASGI, so that streams stay streams."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polymux.deploy.http.auth import OPEN_PATHS, ApiKeys
from polymux.deploy.http.errors import error_from_exception, error_response
from polymux.deploy.http.exchange import Exchange, new_exchange
from polymux.deploy.metrics import Metrics
from polymux.transport.errors import Cancelled, DeadlineExceeded

log = logging.getLogger("polymux.http")

CLIENT_GONE = 499  # in logs and metrics only


class Gate:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started_s = time.monotonic()
        headers = Headers(scope=scope)
        exchange = new_exchange(headers)
        scope.setdefault("state", {})["exchange"] = exchange
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.public_id
            await send(message)

        try:
            if scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN_PATHS:
                exchange.tenant = self._keys.check(headers.get("authorization"))
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            status = await self._answer(error, exchange, status, scope, receive, send_with_id)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            self._finish(scope, exchange, status, time.monotonic() - started_s)
        return None

    async def _answer(self, error: Exception, exchange: Exchange, status: int, scope: Scope, receive: Receive, send: Send) -> int:
        """An error's response, if there is still somebody to read it and nothing was sent; the status for the log."""
        if isinstance(error, Cancelled | OSError):
            return CLIENT_GONE
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded("the client did not read the response before the request's deadline")
        known = error_from_exception(error, exchange.public_id)
        if known is not error:
            log.error("http.failed request=%s", exchange.request_id, exc_info=error)
        if status:  # the connection ends here; what was sent cannot be taken back
            return known.status
        await error_response(known)(scope, receive, send)
        return known.status

    def _finish(self, scope: Scope, exchange: Exchange, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "") or "unknown"
        self._metrics.responded(path, status)
        log.info(
            "http.served method=%s path=%r status=%d seconds=%.4f request=%s id=%s tenant=%s user=%r",
            *(scope["method"], scope["path"][:200], status, seconds, exchange.request_id, exchange.public_id, exchange.tenant or "-"),
            exchange.user or "",
        )
