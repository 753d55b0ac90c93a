"""What the router believes of cached prefixes: reports, and what it gave out since."""

from __future__ import annotations

from controller_bench import Bench, load, spec

from polymux.cluster.books import PrefixMarks
from polymux.transport.messages import Role
from polymux.transport.prefix import MAX_CACHED_MARKS
from polymux.transport.units import PackedIds, WorkerId, pack_ids


def two_prefill_workers() -> Bench:
    bench = Bench()
    bench.controller.register(spec("a"))
    for worker_id in ("p1", "p2", "d1"):
        bench.report(worker_id, bench.join(worker_id), load("a"))
    return bench


def prefill_of(bench: Bench, request_id: str, prefix_hashes: PackedIds) -> str:
    return bench.admit(request_id, num_prompt_tokens=100, prefix_hashes=prefix_hashes).prefill[0].worker_id


def test_a_worker_that_reported_the_prefix_gets_the_prompt() -> None:
    bench = two_prefill_workers()
    epoch = next(w.epoch for w in bench.controller.topology().workers if w.worker_id == "p2")
    bench.report("p2", epoch, load("a"), cached_prefixes=pack_ids([7, 8, 9]))
    assert prefill_of(bench, "r1", pack_ids([7, 8, 9, 1])) == "p2"
    assert prefill_of(bench, "r2", pack_ids([1, 8, 9])) == "p1"


def test_prompts_that_begin_alike_follow_each_other_before_any_report() -> None:
    bench = two_prefill_workers()
    homes: dict[int, set[str]] = {0: set(), 1: set()}
    for i in range(8):
        group = i % 2
        homes[group].add(prefill_of(bench, f"r{i}", pack_ids([100 * group + k for k in range(6)])))
        bench.now_s += 0.5 * (i > 0)  # the first two come at once, and go to both
    assert all(len(home) == 1 for home in homes.values()) and homes[0] != homes[1]


def test_a_hopeful_mark_lives_for_two_reports() -> None:
    marks = PrefixMarks()
    assert marks.expect((1, 2)) and not marks.expect((1, 2))
    marks.report(pack_ids([3]))
    assert set().union(*marks.sets) == {1, 2, 3}
    marks.report(pack_ids([3]))
    assert set().union(*marks.sets) == {3}


def test_marks_are_bounded_whatever_comes() -> None:
    marks = PrefixMarks()
    marks.report(pack_ids(range(3 * MAX_CACHED_MARKS)))
    for start in range(10**6, 10**6 + 20 * MAX_CACHED_MARKS, 512):
        marks.expect(tuple(range(start, start + 512)))
    assert all(len(one) <= MAX_CACHED_MARKS for one in marks.sets)


def test_a_prompt_with_more_marks_than_agreed_is_still_placed() -> None:
    bench = two_prefill_workers()
    assert prefill_of(bench, "r", pack_ids(range(5000))) in {
        WorkerId(w.worker_id) for w in bench.controller.topology().workers if w.role is Role.PREFILL
    }
