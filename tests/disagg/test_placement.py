"""Gangs fit their rooms, neighbours stand together, and every stretch of neighbours has both roles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.placement import MAX_SHARING, Gang, Link, Room, deal, gangs, gpu_share, near_order
from polymux.disagg.placement import stretches as take_stretches
from polymux.transport.messages import Role

counts = st.integers(0, 20)
demands = st.lists(st.sampled_from((0.25, 0.3333, 0.5, 1.0, 2.0)), min_size=1, max_size=12)
rooms = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=4).map(
    lambda sizes: [Room(name=f"room-{i}", gpus=tuple(gpus)) for i, gpus in enumerate(sizes)]
)


@given(counts, counts)
def test_any_stretch_of_the_line_has_its_share_of_each_role(num_prefill: int, num_decode: int) -> None:
    line = deal(num_prefill, num_decode)
    assert (line.count(Role.PREFILL), line.count(Role.DECODE)) == (num_prefill, num_decode)
    for begin in range(len(line)):
        for end in range(begin + 1, len(line) + 1):
            fair = (end - begin) * num_prefill / len(line)
            assert abs(line[begin:end].count(Role.PREFILL) - fair) < 1


@given(demands, rooms)
def test_gangs_hold_everybody_once_and_never_more_than_their_room_has(wanted: list[float], offered: list[Room]) -> None:
    found = gangs(wanted, offered)
    if found is None:
        return
    assert sorted(i for gang in found for i in gang.members) == list(range(len(wanted)))
    assert len({gang.room for gang in found}) == len(found)
    sizes = {room.name: room.gpus for room in offered}
    for gang in found:
        needed = sum(wanted[i] for i in gang.members)
        assert needed <= (max(sizes[gang.room]) if gang.fits_one_host else sum(sizes[gang.room])) + 0.01


@given(demands, st.integers(1, 8))
def test_who_fits_one_host_is_one_gang_on_it(wanted: list[float], spare: int) -> None:
    large = sum(math.ceil(one) for one in wanted)
    offered = [Room(name="rack", gpus=(large + 8, large + 8)), Room(name="large", gpus=(large + spare,)), Room(name="tiny", gpus=(1,))]
    found = gangs(wanted, offered)
    assert found is not None and len(found) == 1 and found[0].fits_one_host
    assert found[0].room == "tiny" or found[0].room == "large" or spare == 8


def test_the_smallest_host_that_holds_all_is_taken() -> None:
    offered = [Room(name="b", gpus=(8,)), Room(name="a", gpus=(4,)), Room(name="c", gpus=(2,))]
    assert gangs([1, 1, 1], offered) == (Gang(room="a", members=(0, 1, 2)),)


def test_a_room_of_several_hosts_holds_what_none_of_them_does() -> None:
    offered = [Room(name="rack", gpus=(4, 4)), Room(name="host", gpus=(4,))]
    assert gangs([1.0] * 6, offered) == (Gang(room="rack", members=tuple(range(6)), fits_one_host=False),)


def test_who_fits_nowhere_together_is_split_over_the_largest_rooms_with_both_roles_in_each() -> None:
    line = deal(3, 9)
    found = gangs([1.0] * 12, [Room(name="a", gpus=(4,)), Room(name="b", gpus=(8,))])
    assert found is not None
    assert [(gang.room, len(gang.members)) for gang in found] == [("b", 8), ("a", 4)]
    assert [sum(line[i] is Role.PREFILL for i in gang.members) for gang in found] == [2, 1]


def test_a_worker_never_spans_hosts_and_shares_never_straddle_gpus() -> None:
    assert gangs([2.0, 2.0], [Room(name="rack", gpus=(3, 1))]) is None
    assert gangs([0.6, 0.6], [Room(name="host", gpus=(1,))]) is None
    assert gangs([0.3333] * 6, [Room(name="host", gpus=(2,))]) == (Gang(room="host", members=tuple(range(6))),)


def stretches(order: Sequence[int], groups: Sequence[Sequence[int]]) -> bool:
    return all(max(order.index(i) for i in group) - min(order.index(i) for i in group) == len(group) - 1 for group in groups)


@given(st.permutations(range(8)))
def test_groups_of_every_link_are_stretches_of_the_line(names: list[int]) -> None:
    """Pairs under switches under sockets, whatever the numbers of the slots."""

    def link(i: int, j: int) -> Link:
        a, b = names[i], names[j]
        return Link.NVLINK if a // 2 == b // 2 else Link.SOCKET if a // 4 == b // 4 else Link.SYSTEM

    order = near_order(8, link)
    assert sorted(order) == list(range(8))
    place = [names.index(n) for n in range(8)]
    assert stretches(order, [place[n : n + 2] for n in (0, 2, 4, 6)])
    assert stretches(order, [place[:4], place[4:]])


@given(st.lists(st.sampled_from((0, 1, 2, 4)), max_size=6), st.randoms(use_true_random=False))
def test_a_worker_of_several_gpus_has_as_many_neighbours_and_nobody_shares(sizes: list[int], random: Random) -> None:
    line = random.sample(range(sum(sizes)), sum(sizes))
    found = take_stretches(sizes, line)
    assert [len(one) for one in found] == sizes and sorted(slot for one in found for slot in one) == sorted(line)
    for one in found:
        begin = line.index(one[0]) if one else 0
        assert line[begin : begin + len(one)] == list(one) and begin % max(len(one), 1) == 0  # no pair lies across two bridges


def test_where_all_links_are_alike_the_line_is_as_it_was() -> None:
    assert near_order(5, lambda i, j: Link.NVLINK) == (0, 1, 2, 3, 4)
    assert near_order(0, lambda i, j: Link.NVLINK) == ()


@given(st.integers(0, 64), st.integers(-2, 16))
def test_shares_of_one_gpu_never_exceed_it(num_workers: int, num_gpus: int) -> None:
    share = gpu_share(num_workers, num_gpus)
    if share is None:
        assert num_workers > MAX_SHARING * num_gpus
        return
    assert (share == 1.0 and num_workers <= num_gpus) or share * math.ceil(num_workers / num_gpus) <= 1.0
    if num_workers:
        assert gangs([share] * num_workers, [Room(name="host", gpus=(num_gpus,))]) is not None
