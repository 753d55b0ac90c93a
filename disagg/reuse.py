"""What cached KV is worth: the chance that it is used again, times the seconds that it would save, by the bytes it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from polymux.disagg.cost import Roofline
from polymux.disagg.eviction import Popularity

REUSE_HALF_LIFE_S = 120.0  # a prefix that was not used for so long is half as likely to be


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """Of one model's blocks. A block's chance is its model's, halved with every `REUSE_HALF_LIFE_S` since the block was used."""

    seconds: float  # to compute one block again
    nbytes: int  # of one block, on each rank
    copied_bytes: int  # of one block to the host, and back to every rank
    popularity: Popularity = field(default_factory=Popularity)

    @property
    def pays_a_copy(self) -> bool:
        """Are two copies of a block, to the host and back, quicker than computing it again?"""
        return self.copied_bytes / Roofline().copy_bytes_per_s < self.seconds

    def touched(self, now_s: float) -> Worth:
        """A prompt of this model came."""
        return replace(self, popularity=self.popularity.touched(now_s))

    def per_byte(self, used_s: float, now_s: float) -> float:
        """Expected seconds saved a byte, of a block that was used then: the unit in which weights are weighed too."""
        chance = self.popularity.chance(now_s) * math.exp2(-max(0.0, now_s - used_s) / REUSE_HALF_LIFE_S)
        return chance * self.seconds / self.nbytes
