"""The controller's books agree with each other whatever happens in whatever order, and end at zero."""

from __future__ import annotations

from typing import Any

import pytest
from controller_bench import Bench, load, spec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polymux.cluster.topology import WorkerState
from polymux.transport.errors import PolymuxError, StaleEpoch
from polymux.transport.messages import ModelLoad
from polymux.transport.units import MIB, ClientId, Epoch, WorkerId

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
        for worker_id in ("p1", "d1", "d2"):
            self._joined(worker_id)

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
        model=st.sampled_from((*MODELS, *MODELS, "missing")),
        num_sequences=st.sampled_from([1, 1, 2, 3, 0]),
        num_prompt_tokens=st.sampled_from([1, 100, 1000, 3000]),
        excluded=st.sets(st.sampled_from(WORKERS), max_size=2),
        deadline_s=st.sampled_from([500.0, 5.0, -1.0]),
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
