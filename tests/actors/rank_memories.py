"""The arenas of an instance's other ranks without their processes: all that rank 0 needs of them to move KV."""

from __future__ import annotations

from typing import Any

from polymux.actors.parallel.leader import Ranks
from polymux.transport.region import Region


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
