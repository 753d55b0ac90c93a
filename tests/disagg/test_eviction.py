"""What leaves the arena: as little value as any choice would lose, never what is locked, and only to make room that is needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.eviction import EvictionPlan, Move, Popularity, plan_eviction, plan_release, plan_room, value
from polymux.disagg.views import ArenaView, CachedView, ResidentView
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


# ---------------------------------------------------------------- moving what stays


def test_what_stays_is_moved_where_that_costs_less_than_evicting_it() -> None:
    view = arena(resident("a", 0, 4, has_work=True), resident("b", 8, 4, has_work=True))
    plan = plan_room(view, 8 * KIB, move_bytes_per_s=1e9)
    assert plan == EvictionPlan(victims=(), offset=4 * KIB, moves=(Move(model=ModelName("b"), offset=12 * KIB),))


def test_an_idle_resident_of_little_value_leaves_before_a_large_one_is_moved() -> None:
    view = arena(resident("a", 0, 7, chance=0.9), resident("b", 9, 2, chance=0.001, reload_s=0.01), end=16)
    plan = plan_room(view, 8 * KIB, move_bytes_per_s=1e3)
    assert plan is not None and plan.victims == (ModelName("b"),) and plan.moves == ()


def test_what_is_being_written_neither_moves_nor_hides_the_room_beside_it() -> None:
    loading = replace(resident("a", 6, 4, is_locked=True), is_fixed=True)
    assert plan_room(arena(loading), 7 * KIB, move_bytes_per_s=1e9) is None
    assert plan_room(arena(loading), 6 * KIB, move_bytes_per_s=1e9) is not None


@settings(deadline=None)
@given(arenas(), st.integers(1, 12), st.data())
def test_a_plan_makes_its_room_move_by_move_and_loses_no_more_than_without_moves(view: ArenaView, size: int, data: st.DataObject) -> None:
    fixed = data.draw(st.sets(st.sampled_from([r.model for r in view.residents]))) if view.residents else set()
    view = replace(view, residents=tuple(replace(r, is_fixed=r.model in fixed) for r in view.residents))
    nbytes = size * KIB
    plan, still = plan_room(view, nbytes, move_bytes_per_s=1e9), plan_eviction(view, nbytes)
    assert plan is not None or still is None
    if plan is None:
        return
    held = {r.model: (r.offset, r.offset + r.nbytes) for r in view.residents}
    locked = {r.model for r in view.residents if r.is_locked}
    assert not locked.intersection(plan.victims)
    for victim in plan.victims:
        del held[victim]

    def is_free(begin: int, end: int, mover: ModelName | None) -> bool:
        others = (span for model, span in held.items() if model != mover)
        return view.start <= begin and end <= view.end and all(end <= low or begin >= high for low, high in others)

    for move in plan.moves:
        assert move.model not in fixed and move.offset % 256 == 0
        length = held[move.model][1] - held[move.model][0]
        assert is_free(move.offset, move.offset + length, move.model)
        held[move.model] = (move.offset, move.offset + length)
    assert plan.offset % 256 == 0 and is_free(plan.offset, plan.offset + nbytes, None)
    if still is not None:
        working = {r.model for r in view.residents if r.has_work}
        assert len(working.intersection(plan.victims)) <= len(working.intersection(still.victims))


@settings(deadline=None)
@given(arenas(), st.integers(1, 12))
def test_without_locks_room_is_found_whenever_there_is_enough_in_all(view: ArenaView, size: int) -> None:
    view = replace(view, residents=tuple(replace(r, is_locked=False) for r in view.residents))
    plan = plan_room(view, size * KIB, move_bytes_per_s=1e9)
    assert (plan is not None) == (size * KIB <= view.end)
    if plan is not None and sum(r.nbytes for r in view.residents) + size * KIB <= view.end:
        assert not any(r.has_work for r in view.residents if r.model in plan.victims)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), max_size=8), st.integers(0, 40))
def test_bytes_are_taken_from_the_least_valuable_and_never_more_than_asked_for(sizes: list[tuple[int, float]], wanted: int) -> None:
    holders = [CachedView(holder=str(i), nbytes=nbytes, value=worth) for i, (nbytes, worth) in enumerate(sizes)]
    given_back = plan_release(holders, wanted)
    assert sum(nbytes for _, nbytes in given_back) == min(wanted, sum(h.nbytes for h in holders))
    by_name = {h.holder: h for h in holders}
    taken = dict(given_back)
    assert all(0 < nbytes <= by_name[name].nbytes for name, nbytes in given_back)
    for holder in holders:
        if taken.get(holder.holder, 0) < holder.nbytes:  # it kept some: nobody worth more gave any
            assert all(by_name[name].value <= holder.value for name in taken)


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
