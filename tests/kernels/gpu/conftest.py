"""Kernels run as they stand where there is a GPU, and on CPU tensors in Triton's interpreter where there is none.

The interpreter is chosen when Triton is first imported, so this file must be read before: pytest reads it at the start of the run.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from gpu.hash_stand_in import install

install()  # a machine with a GPU may have little beside torch and triton
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def interpreted_or_on_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU by the interpreter."""
    if not HAS_GPU:
        assert os.environ.get("TRITON_INTERPRET") == "1", "without a GPU these tests want TRITON_INTERPRET=1"
        triton = sys.modules.get("triton")
        assert triton is None or triton.knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET was set"
    return torch.device("cuda" if HAS_GPU else "cpu")
