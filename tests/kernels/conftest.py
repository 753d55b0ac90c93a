"""One thread, one seed, and a paged cache of random values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def kv(request: pytest.FixtureRequest) -> Tensor:
    """[40, 3, 2, 2, 16, 24] of the parametrized dtype."""
    return torch.randn(40, 3, 2, 2, 16, 24).to(request.param)
