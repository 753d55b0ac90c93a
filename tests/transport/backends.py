"""What the transport tests share: the backends that the conformance suite runs on, and patience."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

HOST_BACKENDS, GPU_BACKENDS = ["local", "shm", "tcp"], ["gpu+local", "cuda_ipc", "nccl"]


def config_of(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """Either side's configuration for one backend."""
    if name not in GPU_BACKENDS:
        return {"settings": {"backend": name}}
    request.getfixturevalue("at_rest")
    return {"settings": {"backend": name.removeprefix("gpu+")}, "gpu": "stand-in"}


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether the claim comes true in time."""
    until_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.002)
    return True
