"""Whose weights are on a simulated worker, and how long a switch takes.

`Switcher` is what a worker asks; two of them: the published artifact's, where only the active model is ever on a device, and the physical
one, where models stay while there is room, and loads take a link's bandwidth from the moment in which somebody asked for them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from polymux.disagg.eviction import Popularity
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.transport.units import ModelName


class Switcher(Protocol):
    """Of one worker. Times are microseconds of the simulation's clock."""

    active: ModelName | None

    @property
    def resident(self) -> frozenset[ModelName]: ...

    def wait_us(self, model: ModelName, now_us: int) -> int:
        """How long a switch to this model would take from now; 0 for the active one. KV that must come in is not counted."""

    def switch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int:
        """Make it active; how long until its first step may start. Models in `wanted` have work here, and leave last."""

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        """Begin to bring it in, if that needs nobody's room who is wanted. When to ask again, where another load is under way."""

    def can_prefetch(self, named: ModelName | None, models: Collection[ModelName]) -> bool:
        """Whether any two of these models fit beside each other, and what was `named` for prefetch last is there or on its way."""

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

    def computed(self, step_us: int) -> None:
        self._computed_us += step_us


@dataclass(slots=True)
class Link:
    """From host memory to one device, or to several that share it: loads cross it one after another."""

    free_at_us: int = 0


@dataclass(slots=True)
class PhysicalSwitcher:
    """Models stay while their weights fit; one load at a time crosses the worker's link, and finishes when its last byte is there."""

    costs: CostModel
    kinds: Mapping[ModelName, str]
    weight_budget_bytes: int
    link: Link = field(default_factory=Link)
    active: ModelName | None = None
    _ready_at_us: dict[ModelName, int] = field(default_factory=dict)  # resident or on its way: when its last byte is there
    _popularity: dict[ModelName, Popularity] = field(default_factory=dict)

    @property
    def resident(self) -> frozenset[ModelName]:
        return frozenset(self._ready_at_us)

    def wait_us(self, model: ModelName, now_us: int) -> int:
        if model == self.active:
            return 0
        if model in self._ready_at_us:
            return max(0, self._ready_at_us[model] - now_us)
        return max(0, self.link.free_at_us - now_us) + self.costs.load_us(self.kinds[model])

    def switch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int:
        if model not in self._ready_at_us:
            self._make_room(model, now_us, wanted, keep=frozenset({model}))
            self._load(model, now_us)
        took_us = max(0, self._ready_at_us[model] - now_us)
        if model != self.active:
            self.active = model
            self._popularity[model] = self._popularity.get(model, Popularity()).touched(now_us / SECOND)
        return took_us

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        if model in self._ready_at_us:
            return None
        if self.link.free_at_us > now_us:
            return self.link.free_at_us
        keep = frozenset(wanted) | {model} | ({self.active} if self.active is not None else set())
        if self._make_room(model, now_us, (), keep=keep):
            self._load(model, now_us)
        return None

    def can_prefetch(self, named: ModelName | None, models: Collection[ModelName]) -> bool:
        if named is not None and named not in self._ready_at_us:
            return False
        sizes = sorted((self.costs.weight_bytes(self.kinds[model]) for model in models), reverse=True)
        return sum(sizes[:2]) <= self.weight_budget_bytes

    def computed(self, step_us: int) -> None:
        """Loads run beside compute at their own speed."""

    def _load(self, model: ModelName, now_us: int) -> None:
        self.link.free_at_us = max(self.link.free_at_us, now_us) + self.costs.load_us(self.kinds[model])
        self._ready_at_us[model] = self.link.free_at_us

    def _make_room(self, model: ModelName, now_us: int, wanted: Collection[ModelName], *, keep: frozenset[ModelName]) -> bool:
        """Evict by value, models with work last, none of `keep`. False, and nobody evicted, when that is not enough."""
        used = sum(self.costs.weight_bytes(self.kinds[name]) for name in self._ready_at_us)
        missing = used + self.costs.weight_bytes(self.kinds[model]) - self.weight_budget_bytes
        line = sorted((name for name in self._ready_at_us if name not in keep), key=lambda name: self._rank(name, now_us, wanted))
        victims: list[ModelName] = []
        while missing > 0 and line:
            victims.append(line.pop(0))
            missing -= self.costs.weight_bytes(self.kinds[victims[-1]])
        if missing > 0:
            return False
        for victim in victims:
            del self._ready_at_us[victim]
            if victim == self.active:
                self.active = None
        return True

    def _rank(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> tuple[bool, bool, float, ModelName]:
        chance = self._popularity.get(model, Popularity()).chance(now_us / SECOND)
        return model in wanted, model == self.active, chance, model
