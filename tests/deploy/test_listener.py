"""A front door's own socket: opened and closed by the ASGI lifespan, shared between replicas, and clear when it cannot be had."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message

from polymux.cluster.config import ServeConfig
from polymux.deploy.listener import Listening, bind
from polymux.transport.errors import ConfigError


def greeting(text: str, delay_s: float = 0.0) -> Starlette:
    async def hello(_: Request) -> PlainTextResponse:
        await asyncio.sleep(delay_s)
        return PlainTextResponse(text)

    return Starlette(routes=[Route("/hello", hello)])


def free_port() -> int:
    with bind("127.0.0.1", 0) as probe:
        return int(probe.getsockname()[1])


@asynccontextmanager
async def lifespan(app: Listening) -> AsyncIterator[None]:
    """What a server does to an application over its life."""
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    assert (await asyncio.wait_for(outbox.get(), 5))["type"] == "lifespan.startup.complete"
    yield
    await inbox.put({"type": "lifespan.shutdown"})
    assert (await asyncio.wait_for(outbox.get(), 10))["type"] == "lifespan.shutdown.complete"
    await life


async def get(port: int, path: str = "/hello") -> str:
    async with httpx.AsyncClient() as client:
        return (await client.get(f"http://127.0.0.1:{port}{path}", timeout=5)).text


async def test_it_serves_from_startup_to_shutdown() -> None:
    serve = ServeConfig(port=free_port())
    async with lifespan(Listening(greeting("hi"), serve, 5.0)):
        assert await get(serve.port) == "hi"
    with pytest.raises(httpx.ConnectError):
        await get(serve.port)


async def test_two_replicas_share_a_port() -> None:
    serve = ServeConfig(port=free_port())
    async with lifespan(Listening(greeting("a"), serve, 5.0)), lifespan(Listening(greeting("b"), serve, 5.0)):
        seen = {await get(serve.port) for _ in range(64)}
    assert seen == {"a", "b"}


async def test_the_route_prefix_holds() -> None:
    serve = ServeConfig(port=free_port(), route_prefix="/llm")
    async with lifespan(Listening(greeting("hi"), serve, 5.0)):
        assert await get(serve.port, "/llm/hello") == "hi"
        assert await get(serve.port) == "Not Found"


async def test_an_open_response_ends_before_the_socket_closes() -> None:
    serve = ServeConfig(port=free_port())
    async with lifespan(Listening(greeting("late", delay_s=0.5), serve, 5.0)):
        asked = asyncio.create_task(get(serve.port))
        await asyncio.sleep(0.2)
    assert await asked == "late"


def test_a_taken_port_is_a_config_error_that_names_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve\.port={port}"):
            bind("127.0.0.1", port)
