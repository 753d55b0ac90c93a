"""The backends that the conformance suite runs on, and what either side is configured with for each."""

from __future__ import annotations

from typing import Any

import pytest

HOST_BACKENDS, GPU_BACKENDS = ["local", "shm", "tcp"], ["gpu+local", "cuda_ipc", "nccl"]


def config_of(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """Either side's configuration for one backend."""
    if name not in GPU_BACKENDS:
        return {"settings": {"backend": name}}
    request.getfixturevalue("at_rest")
    return {"settings": {"backend": name.removeprefix("gpu+")}, "gpu": "stand-in"}
