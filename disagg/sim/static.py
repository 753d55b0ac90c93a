"""Models that stay where they are put: one to a device, or as many as its memory holds (MuxServe's way, by memory rather than by rate).

A model is put on a device when its first request comes, and never leaves it; with no device left, its requests are refused. What shares a
device takes turns step by step, since nothing is ever loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from polymux.disagg.multiplex import WeightedRoundRobin
from polymux.disagg.sim.costs import CostModel
from polymux.disagg.sim.kv import KvRoom
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.loop import Journal
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.residency import Link, Switcher
from polymux.disagg.sim.token_level import TokenLevel
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.worker import SimWorker
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.units import ModelName

WEIGHT_SHARE = 0.5  # of a device's memory; the rest is for the KV of all its models


@dataclass(slots=True)
class AlwaysThere:
    """Every model that a device was given has been there from the start."""

    active: ModelName | None = None

    @property
    def resident(self) -> frozenset[ModelName]:
        return frozenset() if self.active is None else frozenset({self.active})

    def known(self, now_us: int) -> frozenset[ModelName]:
        return self.resident

    def wait_us(self, model: ModelName, now_us: int) -> int:
        return 0

    def switch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int:
        self.active = model
        return 0

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        return None

    def can_prefetch(self, named: ModelName | None, models: Collection[ModelName]) -> bool:
        return True

    def copied_us(self, copy_us: int, now_us: int) -> int:
        return copy_us

    def loading_us(self, now_us: int) -> int:
        return 0

    def coming(self) -> Flow | None:
        return None

    def arrived(self, flow: Flow, now_us: int) -> None: ...

    def computed(self, step_us: int) -> None: ...


class StaticPlacement(TokenLevel):
    """`max_models` bounds the models of one device; None leaves it to their weights."""

    def __init__(
        self,
        costs: CostModel,
        targets: Targets,
        *,
        num_workers: int,
        max_models: int | None = None,
        hosts: Hosts | None = None,
        journal: Journal | None = None,
    ) -> None:
        budget = round(costs.arena_bytes() * WEIGHT_SHARE)
        turns = WeightedRoundRobin()
        super().__init__(costs, targets, turns, num_workers=num_workers, weight_budget_bytes=budget, hosts=hosts, journal=journal)
        self._budget = budget
        self._max_models = max_models
        self._homes: dict[str, SimWorker] = {}
        self._used = {worker.number: 0 for worker in self._workers}  # bytes of weights
        self._num_models = {worker.number: 0 for worker in self._workers}

    def _switcher(self, number: int, link: Link, kv: KvRoom | None) -> Switcher:
        return AlwaysThere()

    def _left(self, one: Progress, worker: SimWorker) -> None:
        """Nothing was promised: models have their places."""

    def _place(self, request: SimRequest, now_us: int) -> SimWorker | None:
        home = self._homes.get(request.model)
        if home is not None:
            return home
        nbytes = self._costs.weight_bytes(request.kind)
        able = [worker for worker in self._workers if self._may_have(worker, nbytes)]
        if not able:
            return None
        home = self._homes[request.model] = min(able, key=lambda worker: (self._used[worker.number], worker.number))
        self._used[home.number] += nbytes
        self._num_models[home.number] += 1
        return home

    def _may_have(self, worker: SimWorker, nbytes: int) -> bool:
        count = self._num_models[worker.number]
        if self._max_models is not None:
            return count < self._max_models
        return not count or self._used[worker.number] + nbytes <= self._budget
