"""What leaves an arena, or moves in it, to make room: those whose return, times the chance of it, costs least for the bytes they hold.

Weights are one currency with cached KV: expected seconds saved, a byte. Moving a resident costs the seconds of its copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from polymux.disagg.views import ArenaView, CachedView, ResidentView
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
class Move:
    """A resident's weights are copied to `offset`."""

    model: ModelName
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPlan:
    """`victims` leave, cheapest first; `moves` follow in order, each into free bytes or its own; then there is room at `offset`."""

    victims: tuple[ModelName, ...]
    offset: int
    moves: tuple[Move, ...] = ()


def value(resident: ResidentView) -> float:
    """Seconds that it is expected to save, a byte: what evicting it loses. Work whose turn is far off may go meanwhile."""
    chance = 1.0 / (1 + resident.turns_ahead) if resident.has_work else resident.reuse_chance
    return chance * resident.reload_s / max(resident.nbytes, 1)


def plan_room(arena: ArenaView, nbytes: int, *, move_bytes_per_s: float, alignment: int = ALIGNMENT) -> EvictionPlan | None:
    """Where `nbytes` go, by whichever costs less: evicting neighbours, or evicting anywhere and moving what stays together.

    None only when the locked and fixed residents leave no such room. Models with work are evicted only where nothing else will do.
    """
    plans = [plan for plan in (plan_eviction(arena, nbytes, alignment), _plan_compaction(arena, nbytes, alignment)) if plan is not None]
    working = {r.model for r in arena.residents if r.has_work}

    def rank(plan: EvictionPlan) -> tuple[float, ...]:
        return len(working.intersection(plan.victims)), cost_s(arena, plan, move_bytes_per_s), len(plan.moves)

    return min(plans, key=rank, default=None)


def cost_s(arena: ArenaView, plan: EvictionPlan, move_bytes_per_s: float) -> float:
    """Expected seconds that the plan's evictions lose and its moves take."""
    moved = {move.model for move in plan.moves}
    lost_s = sum(value(r) * r.nbytes for r in arena.residents if r.model in plan.victims)
    return lost_s + sum(r.nbytes for r in arena.residents if r.model in moved) / move_bytes_per_s


def plan_release(holders: Sequence[CachedView], nbytes: int) -> tuple[tuple[str, int], ...]:
    """Who gives back how many bytes so that `nbytes` come free in all, or as many as there are: the least valuable first, ties by name."""
    wanted, given = nbytes, []
    for holder in sorted(holders, key=lambda h: (h.value, h.holder)):
        if wanted <= 0:
            break
        if holder.nbytes > 0:
            given.append((holder.holder, min(holder.nbytes, wanted)))
            wanted -= holder.nbytes
    return tuple(given)


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


def _plan_compaction(arena: ArenaView, nbytes: int, alignment: int) -> EvictionPlan | None:
    """The best plan that may move residents: between two fixed ones, evict by value until the room is there, then push the rest apart."""
    line = sorted(arena.residents, key=lambda r: r.offset)
    walls = [-1, *(i for i, r in enumerate(line) if r.is_fixed), len(line)]
    best: tuple[tuple[float, ...], EvictionPlan] | None = None
    for left, right in itertools.pairwise(walls):
        low = _up(line[left].offset + line[left].nbytes if left >= 0 else arena.start, alignment)
        high = line[right].offset if right < len(line) else arena.end
        inside = line[left + 1 : right]
        victims = _victims(inside, high - low - nbytes, alignment)
        if victims is None:
            continue
        offset, moves, moved_bytes = _push_apart([r for r in inside if r not in victims], low, high, nbytes, alignment)
        lost_s = sum(value(r) * r.nbytes for r in victims)
        rank = (sum(r.has_work for r in victims), lost_s, moved_bytes, offset)
        if best is None or rank < best[0]:
            order = sorted(victims, key=lambda r: (r.has_work, value(r), r.model))
            best = rank, EvictionPlan(victims=tuple(r.model for r in order), offset=offset, moves=moves)
    return None if best is None else best[1]


def _victims(residents: Sequence[ResidentView], room: int, alignment: int) -> tuple[ResidentView, ...] | None:
    """Who leaves so that the others' aligned sizes fit `room`: the least valuable a byte until they do, less those that need not have."""
    stay_bytes = sum(_up(r.nbytes, alignment) for r in residents)
    victims: list[ResidentView] = []
    for resident in sorted((r for r in residents if not r.is_locked), key=lambda r: (r.has_work, value(r), r.model)):
        if stay_bytes <= room:
            break
        victims.append(resident)
        stay_bytes -= _up(resident.nbytes, alignment)
    if stay_bytes > room:
        return None
    for resident in sorted(victims, key=lambda r: (r.has_work, value(r) * r.nbytes, r.model), reverse=True):
        if stay_bytes + _up(resident.nbytes, alignment) <= room:
            victims.remove(resident)
            stay_bytes += _up(resident.nbytes, alignment)
    return tuple(victims)


def _push_apart(stay: Sequence[ResidentView], low: int, high: int, nbytes: int, alignment: int) -> tuple[int, tuple[Move, ...], int]:
    """The room's offset, the moves that make it, and their bytes: the first few to the low end, the others to the high end.

    Low ones move in rising order and high ones in falling order, so that none lands on one that has not moved yet.
    """
    best: tuple[tuple[int, int], tuple[Move, ...]] | None = None
    for split in range(len(stay) + 1):
        moves, moved_bytes, floor, ceiling = [], 0, low, high
        for resident in stay[:split]:
            if resident.offset > floor:
                moves.append(Move(model=resident.model, offset=floor))
                moved_bytes += resident.nbytes
                floor = _up(floor + resident.nbytes, alignment)
            else:
                floor = _up(resident.offset + resident.nbytes, alignment)
        for resident in reversed(stay[split:]):
            if ceiling - resident.offset - resident.nbytes >= alignment:
                offset = (ceiling - resident.nbytes) // alignment * alignment
                moves.append(Move(model=resident.model, offset=offset))
                moved_bytes += resident.nbytes
                ceiling = offset
            else:
                ceiling = resident.offset
        if ceiling - floor >= nbytes and (best is None or (moved_bytes, floor) < best[0]):
            best = (moved_bytes, floor), tuple(moves)
    assert best is not None, "the room was counted, and packing everything low gives it"
    return best[0][1], best[1], best[0][0]


def _up(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
