"""The arenas of an instance's other ranks without their processes, all that rank 0 needs of them to move KV; and blocks to be moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymux.actors.parallel.leader import Ranks
from polymux.transport.head_slices import sharded
from polymux.transport.messages import KVLayout
from polymux.transport.region import Region

NUM_BLOCKS = 12


class RankMemories(Ranks):
    """Nothing can be computed."""

    def __init__(self, nbytes: int, num_ranks: int) -> None:
        self.lost = None
        self.regions = tuple(Region.create(nbytes) for _ in range(num_ranks - 1))

    @property
    def collectives(self) -> Any:
        return None

    def check(self) -> None:
        return

    def close(self) -> None:
        for region in self.regions:
            region.close()


def layouts(num_heads: int, num_ranks: int) -> tuple[KVLayout, KVLayout]:
    """Of one rank's share, and of the whole block."""
    whole = KVLayout(num_layers=3, num_kv_heads=num_heads, head_dim=4, dtype="bfloat16")
    return sharded(whole, num_ranks), whole


def random_blocks(seed: int, whole: KVLayout) -> Tensor:
    shape = (NUM_BLOCKS, whole.num_layers, 2, whole.num_kv_heads, whole.block_size, whole.head_dim)
    return torch.randint(1, 1 << 14, shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
