"""Workers come, report, stall and die; the controller knows which incarnation is which, and shows what it knows."""

from __future__ import annotations

import pytest
from controller_bench import Bench, load, spec

from polymux.cluster.config import ClusterConfig
from polymux.cluster.controller import Controller
from polymux.cluster.topology import ModelState, WorkerState
from polymux.disagg.placement import Link
from polymux.transport.errors import (
    ConfigError,
    Overloaded,
    StaleEpoch,
)
from polymux.transport.messages import Role, WorkerHello, WorkerReport
from polymux.transport.units import MIB, ClientId, WorkerId


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


def test_an_epoch_that_was_never_given_is_not_kept(bench: Bench) -> None:
    assert bench.join("d7", epoch=10**6) != 10**6


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


def test_prompts_are_computed_near_the_workers_that_decode_them() -> None:
    bench = Bench()
    bench.controller.register(spec("a"))
    for worker_id in ("p0", "p1", "d0", "d1"):
        bench.report(worker_id, bench.join(worker_id))
    bench.controller.place_near(lambda one, other: Link.NVLINK if one[1:] == other[1:] else Link.NETWORK)
    for away, near in (("d0", "1"), ("d1", "0")):
        placement = bench.admit(f"not-{away}", excluded=(WorkerId(away),))
        assert [placement.prefill[0].worker_id, placement.decode[0].worker_id] == [f"p{near}", f"d{near}"]
        bench.release(f"not-{away}")
