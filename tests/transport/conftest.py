"""Shared by the transport tests: the two scripted ends of KV migration, and counting of what is left behind."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import stand_in
from backends import ALL_BACKENDS, config_of, eventually
from nursery import nursery
from processes import Child

KV_PEER = Path(__file__).with_name("kv_peer.py")


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def collected() -> Iterator[None]:
    """What was there before a module's tests is not searched for what they leave: of torch alone that is a sixth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_left(collected: None) -> Iterator[None]:
    """The test leaves no descriptor and no thread behind."""
    fds, threads = num_fds(), threading.active_count()
    yield
    for within_s in (0.01, 0.2, 1.0, 4.0):  # what is mapped goes with its last view, which may be in a cycle
        if eventually(lambda: num_fds() <= fds, within_s):
            break
        gc.collect()
    assert num_fds() <= fds, f"{num_fds() - fds} descriptors left"
    assert eventually(lambda: threading.active_count() <= threads), [t.name for t in threading.enumerate()]


@pytest.fixture(scope="session")
def kv_peer() -> Any:
    """The module of scripted peers."""
    spec = importlib.util.spec_from_file_location("kv_peer", KV_PEER)
    assert spec is not None and spec.loader is not None
    module = sys.modules["kv_peer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair(kv_peer: Any) -> Callable[..., AbstractContextManager[Any]]:
    """`with pair(source={...}, sink={...}) as (prefiller, decoder)`; at the end of each case both pools are whole."""

    @contextmanager
    def run(source: dict[str, Any] | None = None, sink: dict[str, Any] | None = None) -> Iterator[Any]:
        prefiller, decoder = kv_peer.Prefiller(**(source or {})), kv_peer.Decoder(**(sink or {}))
        try:
            yield prefiller, decoder
            decoder.until_over()
            assert eventually(prefiller.is_whole), prefiller.report()
            assert decoder.is_whole(), decoder.report()
        finally:
            decoder.close()
            prefiller.close()

    return run


@pytest.fixture
def at_rest() -> Iterator[Any]:
    """The GPU's stand-in with all its knobs as they were; skipped where it cannot be compiled."""
    if stand_in.compiler() is None:
        pytest.skip("no C compiler for the GPU's stand-in")
    stand_in.turn(**stand_in.RESTED)
    yield stand_in
    stand_in.turn(**stand_in.RESTED)


@pytest.fixture(params=ALL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Configuration of either side for one backend."""
    return config_of(request, request.param)


@pytest.fixture
def joined(pair: Any, backend: dict[str, Any]) -> Any:
    def run(source: dict[str, Any] | None = None, sink: dict[str, Any] | None = None) -> Any:
        return pair(backend | (source or {}), backend | (sink or {}))

    return run


@pytest.fixture
def child() -> Any:
    """`with child(role=..., ...) as peer`."""

    @contextmanager
    def start(**config: Any) -> Iterator[Child]:
        process = nursery().fork("kv_peer")
        try:
            yield Child(process, config)
        finally:
            process.bury()

    return start
