"""Blocks of several ranks on the host: every head once, and back on every rank that holds it, on a CPU and beside a late GPU's steps."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from host_tiers import tier_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_memories import NUM_BLOCKS, RankMemories, layouts, random_blocks
from torch import Tensor

from polymux.actors.copier import MAX_PIECE_BYTES
from polymux.actors.device import CpuDevice
from polymux.actors.kv_blocks import kv_view
from polymux.actors.parallel.host_blocks import shares
from polymux.actors.parallel.weights import RankDevice
from polymux.transport.head_slices import heads_of
from polymux.transport.messages import KVLayout
from polymux.transport.region import Region


def fill(arenas: Sequence[Tensor], layout: KVLayout, values: Tensor) -> None:
    for rank, arena in enumerate(arenas):
        arena.copy_(values[:, :, :, list(heads_of(layout, rank))])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from((1, 2, 3, 4, 6)), st.sampled_from((2, 3, 4, 6, 8)), st.integers(0, 1000), st.integers(0, NUM_BLOCKS // 2))
def test_blocks_come_back_to_every_rank_and_touch_no_others(num_heads: int, num_ranks: int, seed: int, count: int) -> None:
    if num_heads % num_ranks and num_ranks % num_heads:
        return
    layout, whole = layouts(num_heads, num_ranks)
    region = Region.create(NUM_BLOCKS * layout.block_bytes)
    ranks = RankMemories(region.nbytes, num_ranks)
    device, tier = RankDevice(CpuDevice(), ranks, region), tier_of()
    host = tier.pool(layout)
    assert host is not None and host.layout == whole
    arenas = [kv_view(memory, layout) for memory in (CpuDevice().tensor(region), *ranks.memories)]
    before, garbage = random_blocks(seed, whole), random_blocks(seed + 1, whole)
    fill(arenas, layout, before)
    rng = random.Random(seed)
    out_ids, in_ids = rng.sample(range(NUM_BLOCKS), count), rng.sample(range(NUM_BLOCKS), count)
    beside = host.allocate(1)
    host_ids = host.allocate(count)
    host.kv[beside] = 7.0
    list(device.copy_blocks(arenas[0], out_ids, host.kv, host_ids))
    found = torch.cat([share for _, share in shares(arenas, host.kv)], dim=3)[host_ids]
    assert torch.equal(found, before[out_ids])  # every head of the model once
    fill(arenas, layout, garbage)
    list(device.copy_blocks(host.kv, host_ids, arenas[0], in_ids))
    expected = garbage.clone()
    expected[in_ids] = before[out_ids]
    for rank, arena in enumerate(arenas):
        assert torch.equal(arena, expected[:, :, :, list(heads_of(layout, rank))]), rank
    assert (host.kv[beside] == 7.0).all()
    ranks.close()
    tier.close()


def test_a_copy_of_many_blocks_is_cut_into_pieces_that_a_stop_need_not_wait_for_long() -> None:
    layout, _ = layouts(4, 2)
    region = Region.create(NUM_BLOCKS * layout.block_bytes)
    ranks, tier = RankMemories(region.nbytes, 2), tier_of()
    device, host = RankDevice(CpuDevice(), ranks, region), tier.pool(layout)
    assert host is not None and layout.block_bytes < MAX_PIECE_BYTES
    ids = host.allocate(4)
    pieces = device.copy_blocks(kv_view(CpuDevice().tensor(region), layout), range(4), host.kv, ids)
    assert sum(1 for _ in pieces) == 2 * 4
    ranks.close()
    tier.close()


@pytest.mark.parametrize(("num_heads", "num_ranks", "num_shares"), [(4, 2, 2), (4, 4, 4), (2, 4, 2), (1, 8, 1)])
def test_ranks_that_hold_the_same_heads_have_one_share(num_heads: int, num_ranks: int, num_shares: int) -> None:
    layout, whole = layouts(num_heads, num_ranks)
    arenas = [torch.empty(2 * layout.block_bytes, dtype=torch.uint8) for _ in range(num_ranks)]
    host = kv_view(torch.empty(2 * whole.block_bytes, dtype=torch.uint8), whole)
    found = shares([kv_view(arena, layout) for arena in arenas], host)
    assert [len(holders) for holders, _ in found] == [num_ranks // num_shares] * num_shares
