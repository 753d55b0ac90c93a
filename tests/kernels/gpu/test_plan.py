"""Items of work cover every visible key of every row once; plans name the right places; staging keeps its addresses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.actors.model_runner import SequenceSlice
from polymux.kernels.gpu.config import Chip
from polymux.kernels.gpu.plan import AttendSpec, StepPlanner, Workspace
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.gpu.tiled import TiledAttention
from polymux.kernels.gpu.work import Queries, Split, TileConfig, cut, num_parts
from polymux.kernels.paged import CacheShape

CPU = torch.device("cpu")
CONFIG = TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=2)


def queries_of(sizes: list[tuple[int, int]]) -> Queries:
    tokens = np.array([tokens for tokens, _ in sizes], np.int64)
    contexts = np.array([context for _, context in sizes], np.int64)
    return Queries(starts=np.cumsum(tokens) - tokens, contexts=contexts, tokens=tokens, tables=np.arange(len(sizes)))


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3000)), max_size=4),
    group=st.integers(1, 8),
    window=st.one_of(st.none(), st.integers(1, 500)),
    extra=st.integers(0, 40),
)
def test_items_cover_every_visible_key_of_every_row_once(sizes: list[tuple[int, int]], group: int, window: int | None, extra: int) -> None:
    items = cut(queries_of(sizes), group, window, CONFIG, Split(min_keys=64, extra=extra))
    keys: Counter[tuple[int, int]] = Counter()  # by (sequence, packed row)
    for _, context, tokens, row, table, begin, end, _, _, _ in items.tolist():
        assert begin % CONFIG.block_n == 0 and begin < end
        for r in range(row, min(row + CONFIG.block_m, tokens * group)):
            position = context + r // group
            first = 0 if window is None else max(0, position - window + 1)
            keys[table, r] += max(0, min(end, position + 1) - max(begin, first))
    for i, (tokens, context) in enumerate(sizes):
        for r in range(tokens * group):
            position = context + r // group
            assert keys.pop((i, r)) == (position + 1 if window is None else min(window, position + 1))
    assert not keys
    num_tiles = sum(-(-tokens * group // CONFIG.block_m) for tokens, _ in sizes)
    assert len(items) <= num_tiles + extra


@settings(deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 5000)), max_size=5), extra=st.integers(0, 60))
def test_parts_of_a_tile_are_numbered_apart_from_those_of_any_other(sizes: list[tuple[int, int]], extra: int) -> None:
    items = cut(queries_of(sizes), 2, None, CONFIG, Split(min_keys=64, extra=extra))
    split = items[items[:, 9] > 1]
    assert sorted(split[:, 7] + split[:, 8]) == list(range(num_parts(items)))
    assert (items[:, 8] < items[:, 9]).all()


def test_the_longest_work_comes_first() -> None:
    items = cut(queries_of([(1, 5), (1, 900), (30, 100)]), 1, None, CONFIG, Split(min_keys=64, extra=0))
    lengths = items[:, 6] - items[:, 5]
    assert (np.diff(lengths) <= 0).all()


def test_even_contexts_are_cut_into_even_parts() -> None:
    items = cut(queries_of([(1, 2047)] * 4), 1, None, CONFIG, Split(min_keys=64, extra=12))
    assert set((items[:, 6] - items[:, 5]).tolist()) == {704, 640}


def planner(workspace_bytes: int = 1 << 20, num_heads: int = 8, dtype: torch.dtype = torch.float16) -> StepPlanner:
    spec = AttendSpec(
        shape=CacheShape(2, 2, 16, 64),
        num_heads=num_heads,
        dtype=dtype,
        scale=0.125,
        windows=(None,),
        max_blocks=0,
        device=CPU,
        workspace=Workspace(CPU, workspace_bytes),
    )
    return StepPlanner(spec.shape, TiledAttention(spec, chip=Chip(num_sms=16, shared_bytes=227 << 10)))


def test_a_plan_says_where_each_token_stands_and_where_its_kv_goes() -> None:
    spans = [
        SequenceSlice(start=3, num_tokens=1, context_len=33, block_ids=(9, 4, 6, 5)),
        SequenceSlice(start=0, num_tokens=3, context_len=15, block_ids=(7, 2)),
    ]
    staging = Staging(1000, CPU)
    staging.begin()
    plan = planner().plan(spans, [None, 8], staging, num_rows=6)
    assert plan.num_tokens.tolist() == [4] and plan.num_rows == 6 and plan.max_position == 33
    assert plan.positions.tolist() == [15, 16, 17, 33, 0, 0]
    assert plan.slots.tolist() == [7 * 16 + 15, 2 * 16, 2 * 16 + 1, 6 * 16 + 1, 0, 0]
    assert [span.start for span in plan.spans] == [0, 3]
    assert plan.attention[8].block_ids.tolist() == [7, 2, 9, 4, 6]
    assert plan.attention[8].window == 8 and plan.attention[None].window is None


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 300)), st.integers(0, 4000)), max_size=6),
    padding=st.integers(0, 9),
    num_heads=st.sampled_from([2, 8, 142]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_a_step_fits_the_words_that_were_asked_for_and_the_workspace(
    sizes: list[tuple[int, int]], padding: int, num_heads: int, dtype: torch.dtype
) -> None:
    ends = np.cumsum([0, *(tokens for tokens, _ in sizes)]).tolist()
    spans = [
        SequenceSlice(start=start, num_tokens=tokens, context_len=context, block_ids=range(-(-(tokens + context) // 16)))
        for start, (tokens, context) in zip(ends, sizes, strict=False)
    ]
    subject, num_rows = planner(1 << 19, num_heads, dtype), ends[-1] + padding
    staging = Staging(subject.num_words(num_rows, sum(len(s.block_ids) for s in spans), 2), CPU)
    staging.begin()
    plan = subject.plan(spans, [None, 100], staging, num_rows)
    for attention in plan.attention.values():
        for launch in (attention.decode, attention.prefill):
            if launch is not None:
                room = attention.workspace.partials.shape[0] // (2 * launch.config.block_m * 66)
                assert num_parts(launch.items.numpy()) <= room


def test_staging_refuses_what_does_not_fit() -> None:
    staging = Staging(8, CPU)
    staging.begin()
    staging.take(5)
    with pytest.raises(ValueError, match="build it larger"):
        staging.take(1)


def test_staging_gives_equal_sizes_equal_addresses_and_sends_them_all() -> None:
    staging, seen = Staging(64, CPU, depth=2), set()
    for step in range(3):
        staging.begin()
        pieces = [staging.take(n) for n in (1, 7, 20)]
        for host, _ in pieces:
            host[:] = step + 1
        staging.send()
        assert all((device == step + 1).all() for _, device in pieces)
        assert all(device.data_ptr() % 16 == 0 for _, device in pieces)
        seen.add(tuple(device.data_ptr() for _, device in pieces))
    assert len(seen) == 1
