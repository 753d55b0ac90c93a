from __future__ import annotations

import pytest
from controller_bench import Bench, two_models_on_three_workers


@pytest.fixture
def bench() -> Bench:
    return two_models_on_three_workers()
