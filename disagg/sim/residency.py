"""Whose weights are on a simulated worker, and how long a switch takes.

`Switcher` is what a worker asks; two of them: the published artifact's, where only the active model is ever on a device, and the physical
one, where models stay while there is room, and loads take a link's bandwidth from the moment in which somebody asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from polymux.disagg.eviction import EvictionPlan, Popularity, cost_s, plan_room
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.links import NEVER, Flow
from polymux.disagg.views import ArenaView, ResidentView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName


class Switcher(Protocol):
    """Of one worker. Times are microseconds of the simulation's clock."""

    active: ModelName | None

    @property
    def resident(self) -> frozenset[ModelName]: ...

    def known(self, now_us: int) -> frozenset[ModelName]:
        """The same, as of the worker's last report."""

    def wait_us(self, model: ModelName, now_us: int) -> int:
        """How long a switch to this model would take from now; 0 for the active one. KV that must come in is not counted."""

    def switch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int:
        """Make it active; how long until its first step may start. Models in `wanted` have work here, and leave last."""

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        """Begin to bring it in, if that needs nobody's room who is wanted. When to ask again, where another load is under way."""

    def can_prefetch(self, named: ModelName | None, models: Collection[ModelName]) -> bool:
        """Whether any two of these models fit beside each other, and what was `named` for prefetch last is there or on its way."""

    def copied_us(self, copy_us: int, now_us: int) -> int:
        """How long KV takes to come in that takes so long alone."""

    def loading_us(self, now_us: int) -> int:
        """How long bytes will still come in beside the active model's steps, as far as that is known."""

    def coming(self) -> Flow | None:
        """The active model's weights while they are on their way over links that are shared; a step waits for its layers."""

    def arrived(self, flow: Flow, now_us: int) -> None:
        """A load over such links has ended."""

    def computed(self, step_us: int) -> None:
        """The active model has computed so long."""


@dataclass(slots=True)
class ArtifactSwitcher:
    """Only the active model is there; any next one has been loading since the last switch, even one nobody could have named then."""

    costs: CostModel
    kinds: Mapping[ModelName, str]
    active: ModelName | None = None
    _computed_us: int = 0

    @property
    def resident(self) -> frozenset[ModelName]:
        return frozenset() if self.active is None else frozenset({self.active})

    def known(self, now_us: int) -> frozenset[ModelName]:
        return self.resident

    def wait_us(self, model: ModelName, now_us: int) -> int:
        if model == self.active:
            return 0
        kind = self.kinds[model]
        return self.costs.load_us(kind) if self.active is None else self.costs.prefetched_us(kind, self._computed_us)

    def switch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int:
        took_us = self.wait_us(model, now_us)
        if model != self.active:
            self.active, self._computed_us = model, 0
        return took_us

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        """Nothing to do: see above."""
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

    def computed(self, step_us: int) -> None:
        self._computed_us += step_us


@dataclass(slots=True)
class Link:
    """From host memory to one device, or to several that share it: weights and KV cross it one after another."""

    free_at_us: int = 0


@dataclass(slots=True)
class Reported:
    """A set as of a worker's last report. `changes` must be told before it does."""

    interval_us: int = 0  # 0: always as of now
    _report: int = -1
    _then: frozenset[ModelName] = frozenset()

    def changes(self, now_us: int, before: frozenset[ModelName]) -> None:
        if self.interval_us and now_us // self.interval_us > self._report:
            self._report, self._then = now_us // self.interval_us, before

    def seen(self, now_us: int, current: frozenset[ModelName]) -> frozenset[ModelName]:
        return self._then if self.interval_us and now_us // self.interval_us == self._report else current


@dataclass(slots=True)
class _Resident:
    """Weights in an arena, or on their way there until `ready_us`."""

    offset: int
    nbytes: int
    began_us: int
    ready_us: int  # NEVER: nobody can say yet
    used_us: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(slots=True)
class PhysicalSwitcher:
    """Models lie in an arena while there is room, as `disagg/eviction.py` has it; a load finishes when its last byte has crossed the link.

    `reserve_bytes` are always there for weights; `end` says how far they may reach at present. What moves to make room is copied at the
    link's speed, before the switch is done.
    """

    costs: CostModel
    kinds: Mapping[ModelName, str]
    reserve_bytes: int
    end: Callable[[], int]
    link: Link = field(default_factory=Link)
    reported: Reported = field(default_factory=Reported)
    overhead_us: int = 0  # of a switch to weights that are there
    active: ModelName | None = None
    _residents: dict[ModelName, _Resident] = field(default_factory=dict)
    _resident: frozenset[ModelName] = frozenset()
    _popularity: dict[ModelName, Popularity] = field(default_factory=dict)

    @property
    def resident(self) -> frozenset[ModelName]:
        return self._resident

    def known(self, now_us: int) -> frozenset[ModelName]:
        return self.reported.seen(now_us, self._resident)

    def wait_us(self, model: ModelName, now_us: int) -> int:
        """A prediction, as a worker makes it: it knows that a load is under way, not how fast it goes."""
        if model == self.active:
            return 0
        load_us = self._predicted_us(model)
        resident = self._residents.get(model)
        if resident is None:
            return max(0, self._free_at_us() - now_us) + load_us
        return 0 if resident.ready_us <= now_us else max(0, resident.began_us + load_us - now_us)

    def switch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int:
        moved_us = self._vacate(now_us)
        if model == self.active:
            return moved_us
        if model not in self._residents:
            plan = self._plan(model, now_us, wanted, may_evict_busy=False) or self._plan(model, now_us, wanted, may_evict_busy=True)
            if plan is None:
                raise ConfigError(f"{model} has {self._nbytes(model)} bytes of weights, and a device keeps {self.reserve_bytes} for them")
            moved_us += self._begin(model, plan, now_us, self.costs.load_us(self.kinds[model]))
        resident = self._residents[model]
        left_us = 0 if resident.ready_us == NEVER else resident.ready_us - now_us
        self.active, resident.used_us = model, now_us
        self._popularity[model] = self._popularity.get(model, Popularity()).touched(now_us / SECOND)
        return max(self.overhead_us, left_us) + moved_us

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        if model in self._residents:
            return None
        if self.link.free_at_us > now_us:
            return self.link.free_at_us
        self._vacate(now_us)
        plan = self._plan(model, now_us, wanted, may_evict_busy=False)
        kind = self.kinds[model]
        speed = self._bytes_per_s(model)
        if (
            plan is not None
            and cost_s(self._view(now_us, wanted, may_evict_busy=False), plan, speed) < self.costs.weight_bytes(kind) / speed
        ):
            self._begin(model, plan, now_us, self.costs.prefetch_us(kind))
        return None

    def can_prefetch(self, named: ModelName | None, models: Collection[ModelName]) -> bool:
        if named is not None and named not in self._residents:
            return False
        sizes = sorted((self._nbytes(model) for model in models), reverse=True)
        return sum(sizes[:2]) <= self.reserve_bytes

    def copied_us(self, copy_us: int, now_us: int) -> int:
        """Behind the weights that are on their way."""
        if not copy_us:
            return 0
        self.link.free_at_us = max(self.link.free_at_us, now_us) + copy_us
        return self.link.free_at_us - now_us

    def loading_us(self, now_us: int) -> int:
        return max(0, self.link.free_at_us - now_us) if self.link.free_at_us != NEVER else 0

    def coming(self) -> Flow | None:
        return None

    def arrived(self, flow: Flow, now_us: int) -> None: ...

    def computed(self, step_us: int) -> None:
        """Loads run beside compute at their own speed."""

    def _begin(self, model: ModelName, plan: EvictionPlan, now_us: int, load_us: int) -> int:
        """Make the planned room and start the load. How long the moves take."""
        for victim in plan.victims:
            self._evict(victim, now_us)
        moved_us = self._move(plan)
        ready_us = self._load(model, now_us, load_us)
        self.reported.changes(now_us, self._resident)
        self._residents[model] = _Resident(plan.offset, self._nbytes(model), now_us, ready_us, now_us)
        self._resident = frozenset(self._residents)
        return moved_us

    def _predicted_us(self, model: ModelName) -> int:
        """Of a load that waits for nothing."""
        return self.costs.load_us(self.kinds[model])

    def _free_at_us(self) -> int:
        """When a load that is asked for now could begin, as a worker predicts it."""
        return self.link.free_at_us

    def _load(self, model: ModelName, now_us: int, load_us: int) -> int:
        """When the weights will be there; NEVER where only the end of a flow will tell."""
        self.link.free_at_us = max(self.link.free_at_us, now_us) + load_us
        return self.link.free_at_us

    def _move(self, plan: EvictionPlan) -> int:
        for move in plan.moves:
            self._residents[move.model].offset = move.offset
        return sum(self.costs.load_us(self.kinds[move.model]) for move in plan.moves)

    def _evict(self, model: ModelName, now_us: int) -> None:
        self.reported.changes(now_us, self._resident)
        del self._residents[model]
        self._resident = frozenset(self._residents)
        if model == self.active:
            self.active = None

    def _vacate(self, now_us: int) -> int:
        """KV has come where weights lay: idle ones leave, the active one moves down. How long that takes."""
        end = self.end()
        for model in [model for model, one in self._residents.items() if one.end > end and model != self.active]:
            self._evict(model, now_us)
        if self.active is None or (active := self._residents[self.active]).end <= end:
            return 0
        view = self._view(now_us, (), may_evict_busy=True)
        others = tuple(one for one in view.residents if one.model != self.active)
        plan = plan_room(replace(view, residents=others), active.nbytes, move_bytes_per_s=self._bytes_per_s(self.active))
        assert plan is not None, "a worker's reserve holds any one model"
        for victim in plan.victims:
            self._evict(victim, now_us)
        active.offset = plan.offset
        return self._move(plan) + self.costs.load_us(self.kinds[self.active])

    def _plan(self, model: ModelName, now_us: int, wanted: Collection[ModelName], *, may_evict_busy: bool) -> EvictionPlan | None:
        view = self._view(now_us, wanted, may_evict_busy=may_evict_busy)
        return plan_room(view, self._nbytes(model), move_bytes_per_s=self._bytes_per_s(model))

    def _view(self, now_us: int, wanted: Collection[ModelName], *, may_evict_busy: bool) -> ArenaView:
        order = sorted(self._residents, key=lambda model: (self._residents[model].used_us, model))
        turns = {model: turn for turn, model in enumerate(order, start=1)}
        found = []
        for model, one in self._residents.items():
            is_loading = one.ready_us > now_us
            view = ResidentView(
                model=model,
                offset=one.offset,
                nbytes=one.nbytes,
                reload_s=self.costs.load_us(self.kinds[model]) / SECOND,
                reuse_chance=self._popularity.get(model, Popularity()).chance(now_us / SECOND),
                has_work=model in wanted,
                is_locked=not may_evict_busy and (model == self.active or is_loading),
                is_fixed=is_loading,
                turns_ahead=turns[model],
            )
            found.append(view)
        return ArenaView(start=0, end=self.end(), residents=tuple(found))

    def _nbytes(self, model: ModelName) -> int:
        return self.costs.weight_bytes(self.kinds[model])

    def _bytes_per_s(self, model: ModelName) -> float:
        return self._nbytes(model) * SECOND / self.costs.load_us(self.kinds[model])
