"""What leaves the arena: as little value as any choice would lose, never what is locked, and only to make room that is needed."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.eviction import EvictionPlan, Popularity, plan_eviction, value
from polymux.disagg.views import ArenaView, ResidentView
from polymux.transport.units import ModelName

KIB = 1024


def resident(
    model: str, offset: int, nbytes: int, *, chance: float = 0.5, reload_s: float = 1.0, has_work: bool = False, is_locked: bool = False
) -> ResidentView:
    return ResidentView(
        model=ModelName(model),
        offset=offset * KIB,
        nbytes=nbytes * KIB,
        reload_s=reload_s,
        reuse_chance=chance,
        has_work=has_work,
        is_locked=is_locked,
    )


def arena(*residents: ResidentView, end: int = 16) -> ArenaView:
    return ArenaView(start=0, end=end * KIB, residents=residents)


def test_what_fits_a_gap_evicts_nobody_and_takes_the_tightest_one() -> None:
    view = arena(resident("a", 0, 4), resident("b", 6, 2), resident("c", 9, 3))
    assert plan_eviction(view, 1 * KIB) == EvictionPlan(victims=(), offset=8 * KIB)
    assert plan_eviction(view, 4 * KIB) == EvictionPlan(victims=(), offset=12 * KIB)


def test_the_one_least_likely_to_come_back_leaves() -> None:
    view = arena(resident("a", 0, 8, chance=0.9), resident("b", 8, 8, chance=0.1))
    assert plan_eviction(view, 8 * KIB) == EvictionPlan(victims=(ModelName("b"),), offset=8 * KIB)


def test_a_slow_return_is_worth_as_much_as_a_likely_one() -> None:
    view = arena(resident("a", 0, 8, chance=0.9, reload_s=0.1), resident("b", 8, 8, chance=0.2, reload_s=1.0))
    assert plan_eviction(view, 8 * KIB) == EvictionPlan(victims=(ModelName("a"),), offset=0)


def test_it_is_the_seconds_lost_that_count_and_not_the_number_of_victims() -> None:
    view = arena(resident("a", 0, 8, chance=0.5), resident("b", 8, 4, chance=0.2), resident("c", 12, 4, chance=0.2))
    assert plan_eviction(view, 8 * KIB) == EvictionPlan(victims=(ModelName("b"), ModelName("c")), offset=8 * KIB)


def test_a_model_with_work_stays_while_any_number_of_idle_ones_will_do() -> None:
    view = arena(
        resident("a", 0, 8, chance=0.0, has_work=True), resident("b", 8, 4, chance=0.99), resident("c", 12, 4, chance=0.99, reload_s=9.0)
    )
    plan = plan_eviction(view, 8 * KIB)
    assert plan is not None
    assert plan.victims == (ModelName("b"), ModelName("c"))


def test_a_model_with_work_leaves_when_nothing_else_makes_room() -> None:
    view = arena(resident("a", 0, 12, has_work=True), resident("b", 12, 4, is_locked=True))
    plan = plan_eviction(view, 8 * KIB)
    assert plan is not None
    assert plan.victims == (ModelName("a"),)


def test_a_locked_resident_in_the_middle_can_make_it_impossible() -> None:
    assert plan_eviction(arena(resident("a", 6, 4, is_locked=True)), 7 * KIB) is None


def test_more_than_the_arena_is_impossible() -> None:
    assert plan_eviction(arena(), 17 * KIB) is None
    assert plan_eviction(arena(), 16 * KIB) == EvictionPlan(victims=(), offset=0)


@st.composite
def arenas(draw: st.DrawFn) -> ArenaView:
    residents, at = [], 0
    for i in range(draw(st.integers(0, 6))):
        at += draw(st.integers(0, 3))
        nbytes = draw(st.integers(1, 5))
        residents.append(
            resident(
                f"m{i}",
                at,
                nbytes,
                chance=draw(st.floats(0, 1)),
                reload_s=draw(st.floats(0.01, 5)),
                has_work=draw(st.booleans()),
                is_locked=draw(st.sampled_from([False, False, False, True])),
            )
        )
        at += nbytes
    return arena(*draw(st.permutations(residents)), end=at + draw(st.integers(0, 4)))


def makes_room(view: ArenaView, victims: tuple[ResidentView, ...], nbytes: int) -> bool:
    stay = sorted((r for r in view.residents if r not in victims), key=lambda r: r.offset)
    edges = [view.start, *(edge for r in stay for edge in (r.offset, r.offset + r.nbytes)), view.end]
    return any(high - low >= nbytes for low, high in zip(edges[::2], edges[1::2], strict=True))


@settings(deadline=None)
@given(arenas(), st.integers(1, 12))
def test_no_other_choice_of_victims_makes_the_room_and_loses_less(view: ArenaView, size: int) -> None:
    nbytes = size * KIB
    free = [r for r in view.residents if not r.is_locked]
    ways = [v for n in range(len(free) + 1) for v in combinations(free, n) if makes_room(view, v, nbytes)]
    plan = plan_eviction(view, nbytes)
    assert (plan is None) == (not ways)
    if plan is None:
        return
    victims = tuple(r for r in view.residents if r.model in plan.victims)
    assert len(victims) == len(plan.victims)
    assert not any(r.is_locked for r in victims)
    assert plan.offset % 256 == 0
    assert view.start <= plan.offset <= plan.offset + nbytes <= view.end
    for r in view.residents:
        assert r in victims or r.offset >= plan.offset + nbytes or r.offset + r.nbytes <= plan.offset
    values = [(r.has_work, value(r)) for model in plan.victims for r in victims if r.model == model]
    assert values == sorted(values)

    def lost(chosen: tuple[ResidentView, ...]) -> tuple[int, float]:
        return sum(r.has_work for r in chosen), round(sum(value(r) * r.nbytes for r in chosen), 9)

    assert lost(victims) == min(lost(way) for way in ways)


def test_offsets_are_aligned_behind_a_resident_of_odd_size() -> None:
    odd = ResidentView(model=ModelName("a"), offset=0, nbytes=1000, reload_s=1, reuse_chance=1, has_work=False, is_locked=True)
    plan = plan_eviction(ArenaView(start=0, end=4096, residents=(odd,)), 100)
    assert plan == EvictionPlan(victims=(), offset=1024)


# ---------------------------------------------------------------- chance of reuse


def test_a_model_used_often_and_lately_is_likelier_than_one_used_once_or_long_ago() -> None:
    once = Popularity().touched(0.0)
    often = once.touched(1.0).touched(2.0)
    assert often.chance(10.0) > once.chance(10.0) > once.chance(1000.0) > 0


def test_a_model_never_used_has_no_chance() -> None:
    assert Popularity().chance(100.0) == 0.0


def test_a_steady_rate_is_recovered() -> None:
    popularity = Popularity(half_life_s=60.0)
    for second in range(0, 1000, 2):
        popularity = popularity.touched(float(second))
    assert popularity.rate_per_s(1000.0) == pytest.approx(0.5, rel=0.05)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4), max_size=20), st.floats(0, 1e5))
def test_a_chance_is_one(times_s: list[float], now_s: float) -> None:
    popularity = Popularity()
    for time_s in times_s:  # in any order: a clock that jumps back does no harm
        popularity = popularity.touched(time_s)
    assert 0 <= popularity.chance(now_s) <= 1
