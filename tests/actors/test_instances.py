"""Instances of several ranks, each a process of its own: what they say is what one rank says, whoever prefills and whoever decodes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from worker_pair import NAMES, Pair, prompt_of, running_pair

LENGTHS = (5, 40, 93)


async def answers(pair: Pair) -> list[list[int]]:
    """Greedy tokens of both models, the prompts of each together."""
    found = []
    for name in NAMES:
        spec = pair.specs[name]
        found += await asyncio.gather(*(pair.generate(spec, prompt_of(spec, length, i)) for i, length in enumerate(LENGTHS)))
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What one rank says, kept from the first test that asks."""
    return {}


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 2), (4, 2), (1, 4)])
async def test_ranks_say_what_one_says(ranks: tuple[int, int], expected: dict[str, Any]) -> None:
    if not expected:
        async with running_pair() as pair:
            expected["tokens"] = await answers(pair)
    async with running_pair(ranks=ranks) as pair:
        assert await answers(pair) == expected["tokens"]
