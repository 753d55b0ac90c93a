"""Which weights leave an arena to make room: those whose return, times the chance of it, costs least for the bytes they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from polymux.disagg.views import ArenaView, ResidentView
from polymux.transport.units import ModelName

ALIGNMENT = 256  # bytes; every image starts on a multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """How often a model is wanted: a count that halves every `half_life_s`. Recency and frequency in one number."""

    count: float = 0.0
    at_s: float = 0.0
    half_life_s: float = 300.0

    def touched(self, now_s: float) -> Popularity:
        """One use more."""
        return Popularity(count=self._decayed(now_s) + 1.0, at_s=max(now_s, self.at_s), half_life_s=self.half_life_s)

    def rate_per_s(self, now_s: float) -> float:
        """Uses a second, by the decayed count: a constant rate r makes a count of r * half_life / ln 2."""
        return self._decayed(now_s) * math.log(2) / self.half_life_s

    def chance(self, now_s: float, horizon_s: float = 60.0) -> float:
        """Chance of a use within the horizon, for arrivals at this rate without memory."""
        return 1.0 - math.exp(-self.rate_per_s(now_s) * horizon_s)

    def _decayed(self, now_s: float) -> float:
        return self.count * math.exp2(-max(0.0, now_s - self.at_s) / self.half_life_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPlan:
    """`victims` leave, cheapest first; then `nbytes` fit at `offset`."""

    victims: tuple[ModelName, ...]
    offset: int


def value(resident: ResidentView) -> float:
    """Seconds that it is expected to save, a byte: what evicting it loses."""
    chance = 1.0 if resident.has_work else resident.reuse_chance
    return chance * resident.reload_s / max(resident.nbytes, 1)


def plan_eviction(arena: ArenaView, nbytes: int, alignment: int = ALIGNMENT) -> EvictionPlan | None:
    """Where `nbytes` go, and who leaves for it; None when no contiguous room can be made around the locked ones.

    Every run of neighbours is considered. The best evicts the fewest models with work (none, if any run will do), then loses the least
    expected seconds, then the fewest models, then leaves the smallest gap behind, then lies lowest.
    """
    line = sorted(arena.residents, key=lambda r: r.offset)
    best: tuple[tuple[float, ...], tuple[ResidentView, ...], int] | None = None
    for first in range(len(line) + 1):
        low = line[first - 1].offset + line[first - 1].nbytes if first else arena.start
        offset = -(-low // alignment) * alignment
        num_working, lost_s = 0, 0.0
        for last in range(first, len(line) + 1):  # evict line[first:last]
            high = line[last].offset if last < len(line) else arena.end
            if high - offset >= nbytes:
                rank = (num_working, lost_s, last - first, high - offset - nbytes, offset)
                if best is None or rank < best[0]:
                    best = rank, tuple(line[first:last]), offset
                break
            if last == len(line) or line[last].is_locked:
                break
            num_working += line[last].has_work
            lost_s += value(line[last]) * line[last].nbytes
    if best is None:
        return None
    victims = sorted(best[1], key=lambda r: (r.has_work, value(r), r.model))
    return EvictionPlan(victims=tuple(r.model for r in victims), offset=best[2])
