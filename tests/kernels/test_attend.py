"""Paged attention against its reference: mixed batches, windows, tiles of every size, half precision, and rows that ignore each other."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from polymux.actors.model_runner import SequenceSlice
from polymux.kernels import ops, reference
from polymux.kernels.attend_plan import AttentionPlan, Planner
from polymux.kernels.paged import CacheShape, plan_writes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SCALE, GROUP = 0.2, 3
#                 (tokens, tokens before them) of each sequence, single ones longest first
BATCHES = {
    "one token": [(1, 0)],
    "decode": [(1, 130), (1, 129), (1, 40), (1, 40), (1, 39), (1, 15), (1, 0)],
    "equal lengths": [(1, 47)] * 4,
    "a fresh prompt": [(37, 0)],
    "a chunk on a prefix": [(21, 100)],
    "chunks on prefixes that end inside a block": [(5, 7), (40, 33), (2, 16)],
    "all at once": [(1, 90), (1, 3), (18, 50), (33, 0)],
}


def spans_of(sizes: list[tuple[int, int]]) -> tuple[SequenceSlice, ...]:
    """Sequences over disjoint shuffled blocks."""
    free = random.Random(1).sample(range(40), 40)
    spans, start = [], 0
    for num_tokens, context_len in sizes:
        ids = tuple(free.pop() for _ in range(-(-(num_tokens + context_len) // 16)))
        spans.append(SequenceSlice(start=start, num_tokens=num_tokens, context_len=context_len, block_ids=ids))
        start += num_tokens
    return tuple(spans)


def attend(kv: Tensor, spans: tuple[SequenceSlice, ...], window: int | None, *, batch_invariant: bool = False) -> tuple[Tensor, Tensor]:
    """Write random K and V, attend, and compare: the result and the reference's, both [T, Hq, D]."""
    cache, num_tokens = ops.PagedCache(kv), sum(span.num_tokens for span in spans)
    k, v = (torch.randn(num_tokens, 2, 24).to(kv.dtype) for _ in range(2))
    q = torch.randn(num_tokens, 2 * GROUP, 24).to(kv.dtype)
    ops.kv_write(cache, 1, k, v, plan_writes(spans, cache.shape, kv.device))
    plan = Planner(cache.shape, kv.element_size(), kv.device, batch_invariant).plan(spans, window)
    out = torch.empty_like(q)
    ops.attend(q, k, v, cache, 1, plan, SCALE, out)
    expected = torch.cat(
        [reference.attend(q[s.start : s.start + s.num_tokens], kv, 1, s.block_ids, s.context_len, window, SCALE) for s in spans]
    )
    return out, expected


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("kv", DTYPES, indirect=True)
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("window", [None, 1, 17, 64])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention_is_the_references(batch: str, window: int | None, batch_invariant: bool, kv: Tensor) -> None:
    assert_close(*attend(kv, spans_of(BATCHES[batch]), window, batch_invariant=batch_invariant))


@pytest.mark.parametrize("kv", DTYPES, indirect=True)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("blocks_per_tile", [1, 2, 5])
def test_contexts_of_many_tiles_are_combined(blocks_per_tile: int, window: int | None, kv: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.kernels.attend_plan.TILE_BYTES", blocks_per_tile * 2 * 2 * 16 * 24 * kv.element_size())
    spans = spans_of(BATCHES["all at once"])
    assert_close(*attend(kv, spans, window))


@pytest.mark.parametrize("kv", [torch.float32], indirect=True)
def test_stale_values_past_a_sequences_end_are_not_met(kv: Tensor) -> None:
    kv.fill_(torch.nan)
    spans = spans_of([(1, 0), (1, 0), (3, 0)])
    found, expected = attend(kv, spans, None)
    assert torch.isfinite(found).all()
    assert_close(found, expected)


def plan_of(sizes: list[tuple[int, int]]) -> AttentionPlan:
    return Planner(CacheShape(3, 2, 16, 24), 4, torch.device("cpu"), False).plan(spans_of(sizes), None)


def test_rows_of_like_lengths_share_a_group_and_a_long_one_stands_alone() -> None:
    assert len(plan_of([(1, 100), (1, 99), (1, 90)]).groups) == 1
    groups = plan_of([(1, 400), (1, 5), (1, 4), (1, 3)]).groups
    assert [group.rows for group in groups] == [slice(0, 1), slice(1, 4)]


def test_a_tile_holds_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.kernels.attend_plan.TILE_BYTES", 4 * 2 * 2 * 16 * 24 * 4)
    plan = plan_of([(1, 200), (1, 60), (1, 50), (1, 45), (70, 100)])
    tiles = [tile for part in (*plan.groups, *plan.chunks) for tile in part.tiles]
    assert max(len(tile.strips) // 4 for tile in tiles) == 4
    assert len(plan.groups[0].tiles) == 4
