"""The loop that every simulation shares: arrivals in order, ends of what devices do by time, and a journal of what was decided."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from polymux.disagg.sim.costs import CostModel
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.traffic import Traffic, traffic_of
from polymux.disagg.sim.workload import SimRequest

Device = TypeVar("Device")

SWITCH, PREFILL, DECODE = "switch", "prefill", "decode"


class Span(NamedTuple):
    """A device did this for that model."""

    kind: str
    model: str
    began_us: int
    ended_us: int


@dataclass(slots=True)
class Journal:
    """Who was placed where, and what each device did. Neighbouring spans of one kind and model are one span."""

    placements: list[tuple[int, int, int]] = field(default_factory=list)  # at_us, request, device
    spans: dict[int, list[Span]] = field(default_factory=dict)  # by device, in order

    def add(self, device: int, kind: str, model: str, began_us: int, ended_us: int) -> None:
        if ended_us <= began_us:
            return
        line = self.spans.setdefault(device, [])
        if line and line[-1][:2] == (kind, model) and line[-1].ended_us == began_us:
            began_us = line.pop().began_us
        line.append(Span(kind, model, began_us, ended_us))

    def until(self, at_us: int) -> Journal:
        """What had been decided by then: spans under way are cut."""
        cut = {
            device: [span._replace(ended_us=min(span.ended_us, at_us)) for span in line if span.began_us < at_us]
            for device, line in self.spans.items()
        }
        return Journal([one for one in self.placements if one[0] < at_us], {device: line for device, line in cut.items() if line})


class Simulation(ABC, Generic[Device]):
    """One pool under one policy. Ties in time: arrivals first, then whatever was begun first.

    With `hosts` the devices share their links; raises ConfigError for costs that know no bytes.
    """

    door_us = 0  # from a request's arrival until a policy hears of it

    def __init__(
        self, costs: CostModel, targets: Targets, *, num_devices: int, hosts: Hosts | None = None, journal: Journal | None = None
    ) -> None:
        self._costs = costs
        self._targets = targets
        self._journal = journal
        self._events: list[tuple[int, int, Device | Flow]] = []
        self.num_events = 0
        self.traffic: Traffic | None = None if hosts is None else traffic_of(costs, hosts, num_devices, self._at)

    def run(self, requests: Sequence[SimRequest], *, on_arrival: Callable[[int], None] | None = None) -> list[Progress]:
        """Serve them all, in arrival order. Returns their progress, in the same order. `on_arrival` hears how many came so far."""
        served = [Progress(request, self._targets) for request in requests]
        self.serve(served, on_arrival=on_arrival)
        return served

    def serve(self, requests: Sequence[Progress], *, on_arrival: Callable[[int], None] | None = None) -> None:
        """The same, over progress that the caller keeps."""
        self._begin([one.request for one in requests])
        waiting: Iterator[Progress] = iter(requests)
        arriving = next(waiting, None)
        num_arrived = 0
        while arriving is not None or self._events:
            if arriving is not None and (not self._events or arriving.request.arrival_us + self.door_us <= self._events[0][0]):
                self._arrive(arriving)
                arriving = next(waiting, None)
                num_arrived += 1
                if on_arrival is not None:
                    on_arrival(num_arrived)
            else:
                now_us, _, one = heapq.heappop(self._events)
                if not isinstance(one, Flow):
                    self._ended(one, now_us)
                elif self.traffic is not None and self.traffic.links.ended(one, now_us):
                    self._flow_ended(one, self.traffic, now_us)

    def _at(self, at_us: int, one: Device | Flow) -> None:
        """`_ended` is called for this device at that time, or `_flow_ended` for this flow if it has ended by then."""
        self.num_events += 1
        heapq.heappush(self._events, (at_us, self.num_events, one))

    def _note(self, device: int, kind: str, model: str, began_us: int, ended_us: int) -> None:
        if self._journal is not None:
            self._journal.add(device, kind, model, began_us, ended_us)

    def _note_placement(self, one: Progress, device: int) -> None:
        if self._journal is not None:
            self._journal.placements.append((one.request.arrival_us, one.request.request_id, device))

    def _begin(self, requests: Sequence[SimRequest]) -> None:
        """Names and kinds of the models may be read, as a registry has them; nothing else of what is to come."""

    def _load(self, device: int, kind: str, now_us: int) -> int | None:
        """How long all of a model's weights take to come; None over shared links, where `_flow_ended` is called when they have."""
        if self.traffic is None:
            return self._costs.load_us(kind)
        return self.traffic.overhead_us if self.traffic.load(device, kind, now_us).is_done else None

    @abstractmethod
    def _arrive(self, one: Progress) -> None: ...

    @abstractmethod
    def _ended(self, device: Device, now_us: int) -> None: ...

    @abstractmethod
    def _flow_ended(self, flow: Flow, traffic: Traffic, now_us: int) -> None: ...
