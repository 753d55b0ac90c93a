"""The memory of an instance's other rank, which is another process on the same GPU, in rank 0's hands on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rank_memory import rank_memories
from torch import Tensor

from polymux.actors.gpu.device import CudaDevice
from polymux.actors.kv_blocks import kv_view
from polymux.actors.parallel.weights import RankDevice
from polymux.transport.head_slices import heads_of, sharded
from polymux.transport.messages import KVLayout
from polymux.transport.rank_messages import RankMemory
from polymux.transport.region import Region
from polymux.transport.units import MIB

from ..actors.rank_memories import RankMemories

pytestmark = pytest.mark.gpu
WHOLE = KVLayout(num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16")
LAYOUT = sharded(WHOLE, 2)
NBYTES = 64 * MIB


class Mapped(RankMemories):
    """An instance of two ranks, of which the second only has memory."""

    def __init__(self, device: CudaDevice, handle: str) -> None:
        super().__init__(NBYTES, 1)
        self.regions = (device.borrow(RankMemory(gpu="the other rank's", handle=bytes.fromhex(handle)), NBYTES),)


@contextmanager
def instance() -> Iterator[tuple[RankDevice, list[Tensor]]]:
    """Rank 0's device, and the blocks of both ranks."""
    with rank_memories(NBYTES, 1, "cuda") as (other,):
        inner = CudaDevice()
        inner.enter()
        region: Region = inner.create(NBYTES)
        ranks = Mapped(inner, other.handle)
        yield RankDevice(inner, ranks, region), [kv_view(memory, LAYOUT) for memory in (inner.tensor(region), *ranks.memories)]
        inner.mark().wait()
        ranks.close()
        inner.close()


def content(count: int) -> Tensor:
    shape = (count, WHOLE.num_layers, 2, WHOLE.num_kv_heads, WHOLE.block_size, WHOLE.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def heads(values: Tensor, rank: int) -> Tensor:
    return values[:, :, :, list(heads_of(LAYOUT, rank))]


def test_blocks_of_both_ranks_go_to_the_host_and_come_back() -> None:
    with instance() as (device, arenas):
        values, away, back = content(20), [*range(10), *range(40, 50)], [*range(50, 70)]
        host = kv_view(torch.zeros(NBYTES, dtype=torch.uint8), WHOLE)
        for rank, arena in enumerate(arenas):
            arena[away] = heads(values, rank).to("cuda")
        for _ in device.copy_blocks(arenas[0], away, host, [*range(20)]):
            pass
        for arena in arenas:
            arena[away] = 0
        for _ in device.copy_blocks(host, [*range(20)], arenas[0], back):
            pass
        for rank, arena in enumerate(arenas):
            assert torch.equal(arena[back].cpu(), heads(values, rank)), rank
            assert not arena[away].any(), rank


def test_kernels_read_and_write_the_other_rank_s_memory() -> None:
    with instance() as (_, arenas):
        values = content(4)
        for rank, arena in enumerate(arenas):
            arena[:4] = heads(values, rank).to("cuda")
            arena[7, 2:5] = arena[1, 2:5]
        for rank, arena in enumerate(arenas):
            assert torch.equal(arena[7, 2:5].cpu(), heads(values, rank)[1, 2:5]), rank
