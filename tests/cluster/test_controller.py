"""The controller: its books agree with each other whatever happens in whatever order, and end at zero."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polymux.cluster.config import ClusterConfig
from polymux.cluster.controller import Controller
from polymux.cluster.topology import ModelState, WorkerState
from polymux.transport.errors import (
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    PolymuxError,
    Refused,
    StaleEpoch,
)
from polymux.transport.messages import (
    Admit,
    KVLayout,
    ModelCost,
    ModelLoad,
    ModelSpec,
    Placement,
    Release,
    Role,
    WorkerHello,
    WorkerReport,
)
from polymux.transport.units import KIB, MIB, ClientId, Epoch, ModelName, WorkerId

KV = KVLayout(num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16")
FRONT = ClientId("front-0")


def spec(model: str, weight_bytes: int = 8 * MIB, digest: str = "") -> ModelSpec:
    return ModelSpec(
        model=ModelName(model),
        path=f"/models/{model}",
        digest=digest or model,
        config_json="{}",
        dtype="bfloat16",
        kv=KV,
        weight_bytes=weight_bytes,
        vocab_size=4096,
        max_model_len=2048,
        eos_token_ids=(0,),
    )


@dataclass
class Bench:
    """A controller with a clock that the test moves."""

    settings: dict[str, Any] = field(default_factory=dict)
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.config = ClusterConfig.from_dict(self.settings)
        self.epochs = itertools.count(100)
        self.controller = Controller(self.config, clock=lambda: self.now_s, next_epoch=self.epochs.__next__)

    def join(self, worker_id: str, epoch: int | None = None, arena_bytes: int = 64 * MIB) -> Epoch:
        hello = WorkerHello(
            worker_id=WorkerId(worker_id),
            role=Role.PREFILL if worker_id.startswith("p") else Role.DECODE,
            address=f"tcp://host:{worker_id}",
            host_id="host",
            pid=1,
            arena_bytes=arena_bytes,
            num_threads=1,
            epoch=Epoch(epoch) if epoch is not None else None,
        )
        return self.controller.join(hello).epoch

    def report(self, worker_id: str, epoch: int, *loads: ModelLoad, **changes: Any) -> None:
        report = WorkerReport(
            worker_id=WorkerId(worker_id),
            epoch=Epoch(epoch),
            active_model=None,
            loads=loads,
            costs=(),
            switch_bytes_per_s=1e9,
            num_free_kv_bytes=32 * MIB,
            num_blocks_out=0,
            last_step_age_s=None,
        )
        self.controller.report(replace(report, **changes))

    def admit(self, request_id: str = "r", model: str = "a", **changes: Any) -> Placement:
        ask = Admit(
            request_id=request_id,
            client_id=FRONT,
            model=ModelName(model),
            num_prompt_tokens=100,
            max_tokens=50,
            num_sequences=1,
            deadline_s=60.0,
        )
        return self.controller.admit(replace(ask, **changes))

    def release(self, request_id: str = "r", outcome: str = "finished", **changes: Any) -> bool:
        release = Release(request_id=request_id, outcome=outcome, num_output_tokens=40, ttft_s=0.5, tpot_s=0.05)
        return self.controller.release(replace(release, **changes))


def load(model: str, *, resident: bool = True, waiting: int = 0, tokens: int = 0, running: int = 0) -> ModelLoad:
    return ModelLoad(
        model=ModelName(model), is_resident=resident, num_waiting=waiting, num_running=running, waiting_tokens=tokens, kv_tokens=0
    )


@pytest.fixture
def bench() -> Bench:
    """One model `a`, one `b`; workers p1, d1, d2, all reported."""
    made = Bench()
    made.controller.register(spec("a"))
    made.controller.register(spec("b"))
    for worker_id in ("p1", "d1", "d2"):
        made.report(worker_id, made.join(worker_id))
    return made


# ---------------------------------------------------------------- workers


def test_a_worker_that_joins_again_is_a_new_incarnation_and_the_old_one_is_not_listened_to(bench: Bench) -> None:
    old = bench.controller.topology().workers[0]
    new = bench.join(old.worker_id)
    assert new > old.epoch
    with pytest.raises(StaleEpoch, match=f"epoch {old.epoch}.*{new}"):
        bench.report(old.worker_id, old.epoch)
    bench.report(old.worker_id, new)


def test_epochs_are_never_reused_even_by_a_source_that_repeats_itself() -> None:
    controller = Controller(ClusterConfig(), clock=lambda: 0.0, next_epoch=lambda: 7)
    hello = WorkerHello(worker_id=WorkerId("p1"), role=Role.PREFILL, address="", host_id="", pid=0, arena_bytes=MIB, num_threads=1)
    epochs = [controller.join(hello).epoch for _ in range(3)]
    assert epochs == [8, 9, 10]


def test_a_report_of_an_unknown_worker_tells_it_to_join(bench: Bench) -> None:
    with pytest.raises(StaleEpoch, match="join again"):
        bench.report("d9", 1)


def test_a_worker_that_outlived_its_controller_keeps_its_epoch(bench: Bench) -> None:
    assert bench.join("d7", epoch=42) == 42
    bench.report("d7", 42)


def test_an_epoch_that_this_controller_has_declared_lost_does_not_come_back(bench: Bench) -> None:
    bench.join("d7", epoch=42)
    bench.controller.lost(WorkerId("d7"))
    assert bench.join("d7", epoch=42) != 42


def test_a_join_that_is_sent_twice_is_one_incarnation(bench: Bench) -> None:
    epoch = bench.join("d7", epoch=42)
    assert bench.join("d7", epoch=epoch) == epoch


def test_a_silent_worker_is_lost_when_its_lease_ends(bench: Bench) -> None:
    bench.now_s += 9.0
    bench.report("p1", bench.controller.topology().workers[2].epoch)
    bench.now_s += 2.0
    assert set(bench.controller.expired().workers) == {"d1", "d2"}
    states = {w.worker_id: w.state for w in bench.controller.topology().workers}
    assert states == {"p1": WorkerState.ALIVE, "d1": WorkerState.LOST, "d2": WorkerState.LOST}


def test_an_old_death_notice_does_not_end_the_next_incarnation(bench: Bench) -> None:
    old = bench.join("d7")
    new = bench.join("d7")
    assert not bench.controller.lost(WorkerId("d7"), old)
    bench.report("d7", new)
    assert bench.controller.lost(WorkerId("d7"), new)
    assert not bench.controller.lost(WorkerId("d7"))


def test_a_hello_that_cannot_be_served_is_refused(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="arena_bytes=0"):
        bench.join("d7", arena_bytes=0)


def test_a_worker_learns_the_catalogue_when_it_joins_and_that_it_changed_when_it_reports(bench: Bench) -> None:
    hello = WorkerHello(worker_id=WorkerId("d9"), role=Role.DECODE, address="", host_id="", pid=0, arena_bytes=MIB, num_threads=1)
    joined = bench.controller.join(hello)
    assert [s.model for s in joined.models] == ["a", "b"]
    bench.controller.register(spec("c"))
    report = WorkerReport(
        worker_id=WorkerId("d9"),
        epoch=joined.epoch,
        active_model=None,
        loads=(),
        costs=(),
        switch_bytes_per_s=0.0,
        num_free_kv_bytes=0,
        num_blocks_out=0,
        last_step_age_s=None,
    )
    assert bench.controller.report(report).catalogue > joined.catalogue


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
    (p1,) = [w for w in bench.controller.topology().workers if w.worker_id == "p1"]
    bench.release("new")
    (after,) = [w for w in bench.controller.topology().workers if w.worker_id == "p1"]
    assert p1.busy_s > after.busy_s == 0.0


def test_reported_costs_replace_guesses(bench: Bench) -> None:
    epoch = bench.controller.topology().workers[2].epoch
    cost = ModelCost(model=ModelName("a"), prefill=(2.0, 0.0, 0.0), decode=(0.01, 0.0, 0.0))
    bench.report("p1", epoch, load("a"), costs=(cost,))
    bench.admit()
    (p1,) = [w for w in bench.controller.topology().workers if w.worker_id == "p1"]
    assert p1.busy_s == pytest.approx(2.0)


@pytest.mark.parametrize("prefill", [(0.0, 0.0, 0.0), (-1.0, 1.0, 0.0), (float("nan"), 1.0, 1.0), (float("inf"), 0.0, 0.0)])
def test_a_reported_cost_that_cannot_be_is_ignored(bench: Bench, prefill: tuple[float, float, float]) -> None:
    cost = ModelCost(model=ModelName("a"), prefill=prefill, decode=prefill)
    for worker in bench.controller.topology().workers:
        bench.report(worker.worker_id, worker.epoch, costs=(cost,))
    bench.admit()
    bench.controller.check()
    (p1,) = [w for w in bench.controller.topology().workers if w.worker_id == "p1"]
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
    bench.join("d1", arena_bytes=8 * MIB + 512 * KIB)  # 32 blocks of 16 KiB beside the weights, of which 30 count
    bench.admit("fits", num_prompt_tokens=400, max_tokens=80)
    with pytest.raises(ContextLengthExceeded, match="480 tokens"):
        bench.admit("never", num_prompt_tokens=400, max_tokens=81)


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
    cost = ModelCost(model=ModelName("a"), prefill=(1e6, 0.0, 0.0), decode=(1e6, 0.0, 0.0))
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
    bench.now_s += 25.0
    assert bench.controller.expired().requests == ("r",)


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


# ---------------------------------------------------------------- what it shows


def test_ready_means_a_worker_of_each_role_that_reported_and_steps() -> None:
    bench = Bench()
    assert bench.controller.topology().reasons == ("no prefill worker is alive", "no decode worker is alive")
    p1, d1 = bench.join("p1"), bench.join("d1")
    assert bench.controller.topology().reasons == ("no prefill worker has reported yet", "no decode worker has reported yet")
    bench.report("p1", p1)
    bench.report("d1", d1)
    assert bench.controller.topology().is_ready
    bench.report("d1", d1, last_step_age_s=31.0)
    topology = bench.controller.topology()
    assert topology.reasons == ("every decode worker has work and takes no step",)
    assert topology.workers[0].state is WorkerState.STALLED
    assert topology.workers[0].step_age_s == 31.0


def test_a_model_is_resident_where_workers_say_so(bench: Bench) -> None:
    worker = bench.controller.topology().workers[0]
    bench.report(worker.worker_id, worker.epoch, load("a"), load("b", resident=False))
    a, b = bench.controller.topology().models
    assert (a.state, a.resident_on) == (ModelState.RESIDENT, (worker.worker_id,))
    assert (b.state, b.resident_on) == (ModelState.PARKED, ())


def test_counters_go_on_counting_across_the_loss_of_a_worker(bench: Bench) -> None:
    epochs = {w.worker_id: w.epoch for w in bench.controller.topology().workers}
    bench.report("d1", epochs[WorkerId("d1")], counters=(("model_switches", 5.0),), num_blocks_out=3)
    bench.report("d2", epochs[WorkerId("d2")], counters=(("model_switches", 2.0), ("kv_bytes", 1.0)))
    assert bench.controller.stats().counters == {"kv_bytes": 1.0, "model_switches": 7.0}
    bench.controller.lost(WorkerId("d1"))
    stats = bench.controller.stats()
    assert stats.counters == {"kv_bytes": 1.0, "model_switches": 7.0}
    assert (stats.num_workers_alive, stats.num_workers_lost, stats.num_blocks_out) == (2, 1, 0)


def test_lost_workers_are_remembered_but_not_without_end(bench: Bench) -> None:
    for _ in range(100):
        bench.join("d9")
    assert sum(w.state is WorkerState.LOST for w in bench.controller.topology().workers) == 32
    assert bench.controller.stats().num_workers_lost == 99


def test_front_doors_are_bounded(bench: Bench) -> None:
    with pytest.raises(Overloaded, match="front doors"):
        for i in range(2000):
            bench.controller.client_seen(ClientId(f"c{i}"))


# ---------------------------------------------------------------- anything, in any order

WORKERS = ("p1", "p2", "d1", "d2", "d3")
MODELS = ("a", "b", "c")
REQUESTS = tuple(f"r{i}" for i in range(12))
CLIENTS = (ClientId("c0"), ClientId("c1"))


class AnythingInAnyOrder(RuleBasedStateMachine):
    """Admissions, replays, releases, reports, losses, joins and sweeps, with what the outside may do wrong as well."""

    @initialize()
    def start(self) -> None:
        self.bench = Bench({"limits": {"max_inflight_requests": 8, "max_queued_requests": 10}, "liveness": {"orphan_timeout_s": None}})
        for model in MODELS:
            self.bench.controller.register(spec(model))
        self.alive: dict[str, int] = {}
        self.issued: set[int] = set()

    def _joined(self, worker_id: str) -> None:
        epoch = self.bench.join(worker_id)
        assert epoch not in self.issued
        self.issued.add(epoch)
        self.alive[worker_id] = epoch

    @rule(worker_id=st.sampled_from(WORKERS))
    def join(self, worker_id: str) -> None:
        self._joined(worker_id)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), with_epoch=st.booleans())
    def lose(self, data: st.DataObject, with_epoch: bool) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.alive)))
        epoch = self.alive.pop(worker_id)
        assert self.bench.controller.lost(WorkerId(worker_id), Epoch(epoch) if with_epoch else None)

    @precondition(lambda self: self.alive)
    @rule(
        data=st.data(),
        loads=st.lists(
            st.builds(load, st.sampled_from(MODELS), resident=st.booleans(), waiting=st.integers(0, 5), tokens=st.integers(0, 900))
        ),
        step_age_s=st.sampled_from([None, 0.1, 100.0]),
        free=st.integers(0, 64 * MIB),
    )
    def report(self, data: st.DataObject, loads: list[ModelLoad], step_age_s: float | None, free: int) -> None:
        worker_id = data.draw(st.sampled_from(sorted(self.alive)))
        self.bench.report(worker_id, self.alive[worker_id], *loads, last_step_age_s=step_age_s, num_free_kv_bytes=free)

    @rule(worker_id=st.sampled_from(WORKERS), epoch=st.integers(0, 99))
    def stale_report(self, worker_id: str, epoch: int) -> None:
        with pytest.raises(StaleEpoch):
            self.bench.report(worker_id, epoch)

    @rule(
        request_id=st.sampled_from(REQUESTS),
        client_id=st.sampled_from(CLIENTS),
        model=st.sampled_from((*MODELS, "missing")),
        num_sequences=st.integers(0, 3),
        num_prompt_tokens=st.integers(1, 2100),
        excluded=st.sets(st.sampled_from(WORKERS), max_size=2),
        deadline_s=st.sampled_from([-1.0, 5.0, 500.0]),
        tpot_slo_s=st.sampled_from([None, 0.05, 1.0]),
    )
    def admit(self, request_id: str, model: str, excluded: set[str], **changes: Any) -> None:
        before = self.bench.controller.stats()
        try:
            placement = self.bench.admit(request_id, model, excluded=tuple(WorkerId(w) for w in sorted(excluded)), **changes)
        except PolymuxError as error:
            assert error.request_id == request_id
            assert self.bench.controller.stats().num_inflight == before.num_inflight
            return
        for role, peers in (("p", placement.prefill), ("d", placement.decode)):
            for peer in peers:
                assert self.alive[peer.worker_id] == peer.epoch
                assert peer.worker_id.startswith(role)

    @rule(request_id=st.sampled_from(REQUESTS), outcome=st.sampled_from(["finished", "failed", "cancelled", "?"]))
    def release(self, request_id: str, outcome: str) -> None:
        self.bench.release(request_id, outcome)

    @rule(seconds=st.sampled_from([0.01, 0.3, 4.0, 12.0]), seen=st.booleans())
    def time_passes(self, seconds: float, seen: bool) -> None:
        self.bench.now_s += seconds
        if seen:
            for client_id in CLIENTS:
                self.bench.controller.client_seen(client_id)
        for worker_id in self.bench.controller.expired().workers:
            del self.alive[worker_id]

    @invariant()
    def the_books_agree(self) -> None:
        self.bench.controller.check()
        stats = self.bench.controller.stats()
        assert 0 <= stats.num_inflight <= 8
        assert stats.num_queued >= 0
        assert stats.num_queued_tokens >= 0
        assert {w.worker_id for w in self.bench.controller.topology().workers if w.state is not WorkerState.LOST} == self.alive.keys()

    def teardown(self) -> None:
        """Everything ends at zero once every request has been released."""
        for request_id in REQUESTS:
            self.bench.release(request_id)
        self.bench.controller.check()
        topology = self.bench.controller.topology()
        assert self.bench.controller.stats().num_inflight == 0
        assert all(w.num_placed == 0 for w in topology.workers)
        assert all(m.num_inflight == 0 for m in topology.models)


TestAnythingInAnyOrder = AnythingInAnyOrder.TestCase
TestAnythingInAnyOrder.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
