"""What the transport tests share: the backends that the conformance suite runs on, and patience."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

HOST_BACKENDS, GPU_BACKENDS = ["local", "shm", "tcp"], ["gpu+local", "cuda_ipc", "nccl"]
# Between instances: so many ranks at the source, and at the sink. Four hold each head twice.
BETWEEN_RANKS = ["shm@2:4", "tcp@4:1", "gpu+local@4:2", "cuda_ipc@2:1", "cuda_ipc@2:4", "nccl@1:2", "nccl@4:2"]


def config_of(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """Either side's configuration for one backend."""
    name, _, ranks = name.partition("@")
    config: dict[str, Any] = {"settings": {"backend": name.removeprefix("gpu+")}}
    if ranks:
        config["ranks"] = tuple(map(int, ranks.split(":")))
    if name in GPU_BACKENDS:
        request.getfixturevalue("at_rest")
        config["gpu"] = "stand-in"
    return config


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether the claim comes true in time."""
    until_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.002)
    return True
