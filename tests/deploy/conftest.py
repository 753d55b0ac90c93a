"""Front-door tests run the real application, real sockets and real messages; only the workers compute nothing (bench/zero_engine.py)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from zero_stack import ZeroStack, byte_spec, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "bytes")


@pytest.fixture
def make_stack(checkpoint: Path) -> Iterator[Callable[..., ZeroStack]]:
    """Start a stack with settings of the test's own; all are stopped at its end."""
    stacks: list[ZeroStack] = []

    def make(**settings: Any) -> ZeroStack:
        specs = settings.pop("specs", (byte_spec("bytes", checkpoint),))
        stacks.append(ZeroStack(specs, **settings).start())
        return stacks[-1]

    yield make
    for stack in stacks:
        stack.stop()


@pytest.fixture
def stack(make_stack: Callable[..., ZeroStack]) -> ZeroStack:
    return make_stack()


@asynccontextmanager
async def open_client(stack: ZeroStack) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(stack.app)
    async with stack.app.router.lifespan_context(stack.app), httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        yield client


@pytest.fixture
async def client(stack: ZeroStack) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(stack) as client:
        yield client


@pytest.fixture
def connect() -> Callable[[ZeroStack], Any]:
    """A client of a stack that the test made itself, as an asynchronous context."""
    return open_client


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], bool]:
    def wait(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
        until_s = time.monotonic() + within_s
        while not claim():
            if time.monotonic() > until_s:
                return False
            time.sleep(0.002)
        return True

    return wait
