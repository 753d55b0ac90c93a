"""A front door's own listening socket, beside or in the place of Ray Serve's proxy.

A request through the proxy takes two more hops, and so does every token back; a replica that listens itself answers directly. Replicas
of one node share the port (SO_REUSEPORT). The ASGI lifespan opens and closes it, so draining works as it does behind the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, MutableMapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from polymux.cluster.config import ServeConfig
from polymux.transport.errors import ConfigError

BACKLOG = 1024


class _Server(uvicorn.Server):
    """Signals are Ray's business in here. Ticks once a second, for the Date header, and not ten times: an idle front door sleeps."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._closing = asyncio.Event()

    def close(self) -> None:
        self.should_exit = True
        self._closing.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), 1.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, *, is_shared: bool = True) -> socket.socket:
    """A listening socket, on a free port for 0. Raises ConfigError when the port is taken or may not be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"serve.port={port} on {host} cannot be had: {error.strerror}; choose another, or 0 for a free one") from error
    return sock


class Listening:
    """An ASGI application that also serves itself on a socket from lifespan startup to shutdown."""

    def __init__(self, app: ASGIApp, serve: ServeConfig, drain_s: float) -> None:
        self._app = app
        self._socket = bind(serve.host, serve.port)
        prefix = serve.route_prefix.rstrip("/")
        mounted = Starlette(routes=[Mount(prefix, app)]) if prefix else app
        config = uvicorn.Config(
            mounted, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=int(drain_s), timeout_keep_alive=30
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        async def receive_and_close() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._close()
            return message

        async def send_and_open(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))
            await send(message)

        await self._app(scope, receive_and_close, send_and_open)

    async def _close(self) -> None:
        """Stop accepting, and let open responses end within the drain time."""
        self._server.close()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close()
