"""Shared by the transport tests: a token, small messages, and counting of what is left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOKEN = "0123456789abcdef0123"


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether the claim comes true in time."""
    until_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.002)
    return True


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test leaves no descriptor and no thread behind."""
    gc.collect()
    fds, threads = num_fds(), threading.active_count()
    yield
    gc.collect()
    assert eventually(lambda: num_fds() <= fds), f"{num_fds() - fds} descriptors left"
    assert eventually(lambda: threading.active_count() <= threads), [t.name for t in threading.enumerate()]
