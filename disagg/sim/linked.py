"""A worker's weights where they come over links that others use too: when a load ends is known when it has ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from polymux.disagg.sim.links import NEVER, Flow
from polymux.disagg.sim.residency import PhysicalSwitcher
from polymux.disagg.sim.traffic import Traffic
from polymux.transport.units import ModelName

SMOOTHING = 0.2  # of what the last load says


@dataclass(slots=True, kw_only=True)
class LinkedSwitcher(PhysicalSwitcher):
    """Predictions are what a worker has learned of its own loads: how much longer than alone they took lately.

    Of two loads at once, such as a switch past a prefetch, each has its share of the link.
    """

    device: int
    traffic: Traffic
    _stretch: float = 1.0
    _coming: dict[ModelName, Flow] = field(default_factory=dict)

    def coming(self) -> Flow | None:
        return None if self.active is None else self._coming.get(self.active)

    def arrived(self, flow: Flow, now_us: int) -> None:
        for model in [model for model, one in self._coming.items() if one is flow]:
            del self._coming[model]
            took_us = now_us + self.traffic.overhead_us - flow.began_us
            self._stretch += SMOOTHING * (took_us / self.costs.load_us(self.kinds[model]) - self._stretch)
            self._residents[model].ready_us = self.link.free_at_us = now_us + self.traffic.overhead_us

    def prefetch(self, model: ModelName, now_us: int, wanted: Collection[ModelName]) -> int | None:
        if self._coming:  # whoever is told of its end asks again
            return None
        # by name, here and below: a dataclass with slots is another class than super() would look for
        return PhysicalSwitcher.prefetch(self, model, now_us, wanted)

    def copied_us(self, copy_us: int, now_us: int) -> int:
        """A flow of its own."""
        return 0

    def _predicted_us(self, model: ModelName) -> int:
        return round(self.costs.load_us(self.kinds[model]) * self._stretch)

    def _free_at_us(self) -> int:
        loads_us = [flow.began_us + self._predicted_us(model) for model, flow in self._coming.items()]
        return max(loads_us, default=self.link.free_at_us)

    def _load(self, model: ModelName, now_us: int, load_us: int) -> int:
        flow = self.traffic.load(self.device, self.kinds[model], now_us)
        if not flow.is_done:
            self._coming[model] = flow
            return NEVER
        self.link.free_at_us = now_us + self.traffic.overhead_us
        return self.link.free_at_us

    def _evict(self, model: ModelName, now_us: int) -> None:
        flow = self._coming.pop(model, None)
        if flow is not None:
            self.traffic.links.cancel(flow, now_us)
        PhysicalSwitcher._evict(self, model, now_us)
