"""Admission, replay and release: what the controller promises, and that it takes every promise back."""

from __future__ import annotations

from typing import Any

import pytest
from controller_bench import FRONT, Bench, load, spec

from polymux.cluster.topology import ModelState, WorkerState
from polymux.transport.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    PolymuxError,
    Refused,
)
from polymux.transport.messages import ModelCost, Role
from polymux.transport.units import KIB, MIB, ClientId, ModelName, WorkerId

# ---------------------------------------------------------------- admission


def test_a_placement_names_both_workers_with_their_present_epochs(bench: Bench) -> None:
    placement = bench.admit()
    epochs = {w.worker_id: w.epoch for w in bench.controller.topology().workers}
    assert placement.prefill[0].worker_id == "p1"
    assert placement.prefill[0].epoch == epochs[WorkerId("p1")]
    assert placement.decode[0].epoch == epochs[placement.decode[0].worker_id]
    assert (placement.ttft_slo_s, placement.tpot_slo_s) == (10.0, 0.1)


def test_a_request_may_bring_its_own_slos(bench: Bench) -> None:
    placement = bench.admit(ttft_slo_s=1.0, tpot_slo_s=0.02)
    assert (placement.ttft_slo_s, placement.tpot_slo_s) == (1.0, 0.02)


def test_every_choice_of_a_request_gets_its_place(bench: Bench) -> None:
    placement = bench.admit(num_sequences=3)
    assert len(placement.prefill) == len(placement.decode) == 3
    assert sum(w.num_placed for w in bench.controller.topology().workers if w.role is Role.DECODE) == 3


def test_two_models_go_to_two_decode_workers(bench: Bench) -> None:
    assert bench.admit("r1", "a").decode[0].worker_id != bench.admit("r2", "b").decode[0].worker_id


def test_a_parked_model_is_placed_like_any_other(bench: Bench) -> None:
    statuses = {m.model: m.state for m in bench.controller.topology().models}
    assert statuses == {"a": ModelState.PARKED, "b": ModelState.PARKED}
    assert bench.admit().decode


def test_between_reports_the_controller_remembers_what_it_placed() -> None:
    """Two prefill workers, a burst: they share it, though both still report to be idle."""
    bench = Bench()
    bench.controller.register(spec("a"))
    for worker_id in ("p1", "p2", "d1"):
        bench.report(worker_id, bench.join(worker_id), load("a"))
    chosen = [bench.admit(f"r{i}", num_prompt_tokens=1000).prefill[0].worker_id for i in range(8)]
    assert chosen.count(WorkerId("p1")) == chosen.count(WorkerId("p2")) == 4


def test_a_report_settles_what_it_must_have_seen_and_keeps_what_it_cannot_have(bench: Bench) -> None:
    epoch = bench.controller.topology().workers[2].epoch
    bench.admit("old")
    bench.now_s += 1.0
    bench.admit("new")
    bench.report("p1", epoch)
    p1 = bench.status("p1")
    bench.release("new")
    after = bench.status("p1")
    assert p1.busy_s > after.busy_s == 0.0


def test_reported_costs_replace_guesses(bench: Bench) -> None:
    epoch = bench.controller.topology().workers[2].epoch
    cost = ModelCost(model=ModelName("a"), prefill=(2.0, 0.0, 0.0), decode=(0.01, 0.0, 0.0), num_prefill_steps=9, num_decode_steps=9)
    bench.report("p1", epoch, load("a"), costs=(cost,))
    bench.admit()
    p1 = bench.status("p1")
    assert p1.busy_s == pytest.approx(2.0)


def test_work_that_waits_for_weights_counts_with_their_loading(bench: Bench) -> None:
    """8 MiB at the reported 1 GB/s, once for the model."""
    p1 = bench.status("p1")
    cost = ModelCost(model=ModelName("a"), prefill=(1.0, 0.0, 0.0), decode=(1.0, 0.0, 0.0), num_prefill_steps=9, num_decode_steps=9)
    bench.report("p1", p1.epoch, load("a", waiting=2, tokens=200), costs=(cost,))
    resident = bench.status("p1")
    bench.report("p1", p1.epoch, load("a", resident=False, waiting=2, tokens=200))
    parked = bench.status("p1")
    assert (resident.busy_s, parked.busy_s) == pytest.approx((2.0, 2.0 + 8 * MIB / 1e9))


def test_kv_that_was_promised_is_not_promised_again_before_the_next_report(bench: Bench) -> None:
    """d1 has the weights and KV for one such sequence; d2 would have to load them."""
    epochs = {w.worker_id: w.epoch for w in bench.controller.topology().workers}
    for worker_id, resident in (("d1", True), ("d2", False)):
        bench.report(worker_id, epochs[WorkerId(worker_id)], load("a", resident=resident), num_free_kv_bytes=64 * 16 * KIB)
    first, second = (bench.admit(f"r{i}", num_prompt_tokens=900).decode[0].worker_id for i in range(2))
    assert (first, second) == ("d1", "d2")


def test_what_waits_is_what_workers_report_and_what_they_cannot_have_reported(bench: Bench) -> None:
    d1 = bench.status("d1")
    bench.report("d1", d1.epoch, load("a", waiting=3, tokens=700), load("b", waiting=1, tokens=50))
    bench.admit(num_sequences=2)
    stats = bench.controller.stats()
    assert (stats.num_queued, stats.num_queued_tokens) == (4 + 2, 750 + 200)


def test_the_expected_length_of_an_answer_is_learned(bench: Bench) -> None:
    for i in range(60):
        bench.admit(f"r{i}", max_tokens=1000)
        bench.release(f"r{i}", num_output_tokens=1)
        bench.now_s += 1.0
    (a, _) = bench.controller.topology().models
    assert a.num_output_tokens == 60
    bench.admit("sized", max_tokens=1000)
    (placed,) = [w for w in bench.controller.topology().workers if w.worker_id.startswith("d") and w.num_placed]
    view = bench.controller._pool.decode[placed.worker_id].view()
    assert 101 <= view.models[ModelName("a")].kv_tokens <= 110  # the prompt and not much more


@pytest.mark.parametrize("prefill", [(0.0, 0.0, 0.0), (-1.0, 1.0, 0.0), (float("nan"), 1.0, 1.0), (float("inf"), 0.0, 0.0)])
def test_a_reported_cost_that_cannot_be_is_ignored(bench: Bench, prefill: tuple[float, float, float]) -> None:
    cost = ModelCost(model=ModelName("a"), prefill=prefill, decode=prefill, num_prefill_steps=9, num_decode_steps=9)
    for worker in bench.controller.topology().workers:
        bench.report(worker.worker_id, worker.epoch, costs=(cost,))
    bench.admit()
    bench.controller.check()
    p1 = bench.status("p1")
    assert 0 < p1.busy_s < 10


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": ModelName("c")}, ModelNotFound, "model"),
        ({"num_sequences": 0}, InvalidRequest, "n"),
        ({"num_sequences": 17}, InvalidRequest, "n"),
        ({"num_prompt_tokens": 0}, InvalidRequest, "num_prompt_tokens"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"max_tokens": 3000}, ContextLengthExceeded, "max_tokens"),
        ({"tpot_slo_s": 0.0}, InvalidRequest, "tpot_slo_s"),
        ({"deadline_s": -1.0}, DeadlineExceeded, None),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_leaves_no_trace(
    bench: Bench, change: dict[str, Any], error: type[PolymuxError], param: str | None
) -> None:
    with pytest.raises(error) as caught:
        bench.admit(**change)
    assert (caught.value.param, caught.value.request_id) == (param, "r")
    assert bench.controller.stats().num_inflight == 0
    assert all(w.num_placed == 0 for w in bench.controller.topology().workers)
    bench.controller.check()


def test_a_sequence_that_no_arena_could_hold_beside_the_weights_is_the_clients_error() -> None:
    bench = Bench()
    bench.controller.register(spec("a"))
    bench.join("p1", arena_bytes=64 * MIB)
    bench.join("d1", arena_bytes=8 * MIB + 512 * KIB)  # 32 blocks of 16 KiB beside the weights
    bench.admit("fits", num_prompt_tokens=400, max_tokens=112)
    with pytest.raises(ContextLengthExceeded, match="512 tokens"):
        bench.admit("never", num_prompt_tokens=400, max_tokens=113)


def test_weights_that_no_arena_holds_are_the_operators_error() -> None:
    bench = Bench()
    bench.controller.register(spec("huge", weight_bytes=100 * MIB))
    bench.join("p1")
    bench.join("d1")
    with pytest.raises(OutOfMemory, match=r"huge.*pools\.prefill\.arena_bytes"):
        bench.admit(model="huge")
    (status,) = bench.controller.topology().models
    assert status.state is ModelState.REGISTERED


def test_without_a_worker_of_a_role_a_request_is_told_to_come_back() -> None:
    bench = Bench()
    bench.controller.register(spec("a"))
    bench.join("p1")
    with pytest.raises(Overloaded, match="no decode worker is alive") as caught:
        bench.admit()
    assert caught.value.retry_after_s is not None


def test_a_queue_that_is_full_refuses_until_something_ends() -> None:
    bench = Bench({"limits": {"max_queued_requests": 4, "max_inflight_requests": 8}})
    bench.controller.register(spec("a"))
    bench.join("p1")
    epoch = bench.join("d1")
    for i in range(4):
        bench.admit(f"r{i}")
    with pytest.raises(Overloaded, match="max_queued_requests=4"):
        bench.admit("r4")
    bench.now_s += 1.0
    bench.report("d1", epoch, load("a", running=4))  # they run: the queue is empty
    for i in range(4, 8):
        bench.admit(f"r{i}")
    bench.now_s += 1.0
    bench.report("d1", epoch, load("a", running=8))
    with pytest.raises(Overloaded, match="max_inflight_requests=8"):
        bench.admit("r8")
    bench.release("r0")
    bench.admit("r8")
    bench.controller.check()


def test_an_idle_pool_with_absurd_costs_still_accepts(bench: Bench) -> None:
    cost = ModelCost(model=ModelName("a"), prefill=(1e6, 0.0, 0.0), decode=(1e6, 0.0, 0.0), num_prefill_steps=9, num_decode_steps=9)
    for worker in bench.controller.topology().workers:
        bench.report(worker.worker_id, worker.epoch, costs=(cost,))
    bench.admit()
    with pytest.raises(Refused):
        bench.admit("second")


# ---------------------------------------------------------------- the same id again


def test_an_ask_that_is_sent_twice_is_one_request(bench: Bench) -> None:
    assert bench.admit() == bench.admit()
    assert bench.controller.stats().num_inflight == 1
    assert sum(w.num_placed for w in bench.controller.topology().workers) == 2


@pytest.mark.parametrize("change", [{"client_id": ClientId("front-1")}, {"model": ModelName("b")}, {"num_sequences": 2}])
def test_an_id_in_use_for_another_request_is_refused(bench: Bench, change: dict[str, Any]) -> None:
    bench.admit()
    with pytest.raises(InvalidRequest, match="in use"):
        bench.admit(**change)
    bench.controller.check()


def test_a_replay_moves_the_sequences_of_the_lost_worker_and_leaves_the_others(bench: Bench) -> None:
    bench.admit("other", "b", num_sequences=8)
    before = bench.admit(num_sequences=4)
    lost = before.decode[0].worker_id
    bench.controller.lost(lost)
    after = bench.admit(num_sequences=4, excluded=(lost,), num_prompt_tokens=120)
    for old, new in zip(before.decode, after.decode, strict=True):
        assert new.worker_id != lost
        assert new == old or old.worker_id == lost
    bench.controller.check()
    bench.release()
    bench.release("other")
    assert all(w.num_placed == 0 for w in bench.controller.topology().workers)


def test_a_sequence_that_stays_is_booked_where_it_runs_though_its_prefill_worker_is_gone(bench: Bench) -> None:
    bench.join("p2")
    before = bench.admit(num_sequences=4)
    gone = before.prefill[0].worker_id
    bench.controller.lost(gone)
    after = bench.admit(num_sequences=4, excluded=(gone,), moving=(1,), staying=(0, 2, 3))
    assert [after.decode[i] for i in (0, 2, 3)] == [before.decode[i] for i in (0, 2, 3)]
    assert bench.controller.stats().outcomes["moved"] == 1 and "replayed" not in bench.controller.stats().outcomes
    bench.controller.check()
    bench.release()
    assert all(w.num_placed == 0 for w in bench.controller.topology().workers)


def test_a_worker_that_came_back_is_another_one_for_the_requests_of_the_old(bench: Bench) -> None:
    before = bench.admit()
    epoch = bench.join(before.decode[0].worker_id)
    after = bench.admit()
    assert after.decode[0] != before.decode[0]
    assert after.decode[0].worker_id != before.decode[0].worker_id or after.decode[0].epoch == epoch
    bench.controller.check()


def test_nothing_is_placed_on_a_worker_that_is_lost(bench: Bench) -> None:
    bench.admit("warm")
    bench.controller.lost(WorkerId("d1"))
    assert {bench.admit(f"r{i}").decode[0].worker_id for i in range(4)} == {"d2"}


def test_a_worker_that_came_back_is_not_stalled_because_the_old_one_was(bench: Bench) -> None:
    d1 = bench.status("d1")
    bench.report("d1", d1.epoch, load("a", running=1), last_step_age_s=31.0)
    bench.join("d1")
    assert {w.state for w in bench.controller.topology().workers if w.worker_id == "d1"} == {WorkerState.ALIVE, WorkerState.LOST}


def test_a_replay_is_not_refused_for_load() -> None:
    bench = Bench({"limits": {"max_queued_requests": 1}})
    bench.controller.register(spec("a"))
    for worker_id in ("p1", "d1", "d2"):
        bench.join(worker_id)
    lost = bench.admit().decode[0].worker_id
    with pytest.raises(Overloaded):
        bench.admit("other")
    assert bench.admit(excluded=(lost,)).decode[0].worker_id != lost


def test_an_excluded_worker_is_used_again_where_no_other_is_alive(bench: Bench) -> None:
    bench.admit()
    assert bench.admit(excluded=(WorkerId("p1"),)).prefill[0].worker_id == "p1"


def test_a_stalled_worker_gets_nothing_while_another_steps(bench: Bench) -> None:
    epochs = {w.worker_id: w.epoch for w in bench.controller.topology().workers}
    bench.report("d1", epochs[WorkerId("d1")], load("a", running=1), last_step_age_s=31.0)
    assert {bench.admit(f"r{i}").decode[0].worker_id for i in range(4)} == {"d2"}
    bench.report("d1", epochs[WorkerId("d1")], load("a"), last_step_age_s=None)
    bench.report("d2", epochs[WorkerId("d2")], last_step_age_s=31.0)
    assert bench.admit("last").decode[0].worker_id == "d1"


# ---------------------------------------------------------------- endings


def test_a_release_of_what_is_not_there_does_no_harm(bench: Bench) -> None:
    bench.admit()
    assert bench.release()
    assert not bench.release()
    assert bench.controller.stats().outcomes == {"admitted": 1, "finished": 1}


def test_attainment_counts_what_met_its_slo_and_failures_as_misses(bench: Bench) -> None:
    ends: dict[str, dict[str, Any]] = {
        "fast": {},
        "slow": {"tpot_s": 0.5},
        "late": {"ttft_s": 11.0},
        "single": {"tpot_s": None, "num_output_tokens": 1},
        "broken": {"outcome": "failed", "ttft_s": None, "tpot_s": None, "num_output_tokens": 0},
        "gone": {"outcome": "cancelled"},
        "odd": {"outcome": "exploded"},
    }
    for request_id, changes in ends.items():
        bench.admit(request_id)
        bench.release(request_id, **changes)
    (status, _) = bench.controller.topology().models
    assert (status.num_finished, status.num_attained, status.num_failed) == (4, 2, 2)
    assert status.num_output_tokens == 40 * 5 + 1


def test_a_request_whose_deadline_passed_is_reaped_after_its_grace(bench: Bench) -> None:
    bench.admit(deadline_s=10.0)
    bench.now_s += 14.0
    bench.controller.client_seen(FRONT)
    assert bench.controller.expired().requests == ()
    bench.now_s += 1.0
    assert bench.controller.expired().requests == ("r",)
    assert not bench.release()
    assert bench.controller.stats().num_inflight == 0


def test_no_request_outlives_the_longest_deadline() -> None:
    bench = Bench({"limits": {"request_timeout_s": 20}})
    bench.controller.register(spec("a"))
    bench.join("p1")
    bench.join("d1")
    bench.admit(deadline_s=1e9)
    for _ in range(3):
        bench.now_s += 25.0 / 3
        bench.controller.client_seen(FRONT)
    assert bench.controller.expired().requests == ("r",)


def test_an_id_that_is_used_again_lives_until_its_own_deadline(bench: Bench) -> None:
    bench.admit(deadline_s=5.0)
    bench.release()
    bench.admit(deadline_s=50.0)
    for _ in range(2):
        bench.now_s += 10.0
        bench.controller.client_seen(FRONT)
    assert bench.controller.expired().requests == ()


def test_requests_that_end_leave_nothing_behind(bench: Bench) -> None:
    for i in range(500):
        bench.admit(f"r{i}")
        bench.release(f"r{i}")
        bench.controller.check()


def test_a_front_door_that_is_gone_takes_its_requests_with_it(bench: Bench) -> None:
    bench.admit("mine")
    bench.admit("theirs", client_id=ClientId("front-1"))
    bench.now_s += 10.0
    bench.controller.client_seen(FRONT)
    bench.now_s += 10.0
    expired = bench.controller.expired()
    assert (expired.clients, expired.requests) == (("front-1",), ("theirs",))
    assert bench.controller.stats().num_clients == 1
    bench.controller.check()


def test_a_cluster_without_front_doors_is_orphaned_and_one_with_them_is_not(bench: Bench) -> None:
    bench.now_s += 59.0
    bench.controller.client_seen(FRONT)
    bench.now_s += 60.0
    assert not bench.controller.expired().is_orphaned
    bench.now_s += 1.0
    assert bench.controller.expired().is_orphaned


def test_an_orphan_timeout_of_null_never_ends_a_cluster() -> None:
    bench = Bench({"liveness": {"orphan_timeout_s": None}})
    bench.now_s += 1e9
    assert not bench.controller.expired().is_orphaned
