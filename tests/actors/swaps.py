"""Asks that do not fit an arena together, so that some must leave it, and an arena that is so tight."""

from __future__ import annotations

from dataclasses import replace

from worker_pair import GREEDY, NAMES, Ask, Pair, prompt_of

from polymux.transport.messages import SamplingParams
from polymux.transport.units import KIB

SAMPLED = SamplingParams(max_tokens=80, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, repetition_penalty=1.1)


def asks_of(pair: Pair, count: int = 6) -> list[Ask]:
    """Of two models, sampled and greedy."""
    specs = [pair.specs[name] for name in NAMES]
    return [
        (specs[i % 2], prompt_of(specs[i % 2], 40, i), replace(SAMPLED, seed=i) if i % 3 else replace(GREEDY, max_tokens=80))
        for i in range(count)
    ]


def tight_bytes(pair: Pair, ranks: int = 1) -> int:
    """Of each rank: all prompts of six asks fit with a little to spare; their outputs do not."""
    return 6 * 4 * max(spec.on_ranks(ranks).kv.block_bytes for spec in pair.specs.values()) + 128 * KIB
