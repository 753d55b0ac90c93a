"""What the devices of a simulated pool move over its links, and what those links have carried in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isinf
from typing import Any

from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.links import Channel, Flow, Links, pipelined_end_us
from polymux.disagg.sim.sized import SizedCosts
from polymux.disagg.sim.topology import Hosts, Topology
from polymux.transport.errors import ConfigError

WEIGHTS, KV_IN, KV_OUT, HANDOVER = "weights", "kv in", "kv out", "handover"
COPIES = "weights and kv"  # of a switch by the published rules


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUse:
    """One link over a whole run."""

    name: str
    busy: float  # share of the time in which something crossed it
    used: float  # share of what it could have carried


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksUse:
    busiest: LinkUse | None  # by `used`; None: nothing was moved over any
    groups: dict[str, LinkUse]  # the most used of each kind of link
    nbytes: dict[str, int]  # by kind of traffic

    def to_dict(self) -> dict[str, Any]:
        """Shares in percent."""
        return {
            "busiest": None if self.busiest is None else _percent(self.busiest),
            "most_used": {group: _percent(use) for group, use in self.groups.items()},
            "bytes": self.nbytes,
        }


class Traffic:
    """Of devices that are numbered as `topology` numbers its GPUs. A flow's owner is its device's number, but for a handover's."""

    def __init__(self, costs: SizedCosts, hosts: Hosts, num_devices: int, wake: Callable[[int, Flow], None]) -> None:
        self._costs = costs
        self.overhead_us = costs.switch_overhead_us  # of a load beside its bytes
        self.topology = Topology(hosts, num_devices)
        self.links = Links(wake)

    def load(self, device: int, kind: str, now_us: int) -> Flow:
        """A model's weights, from its host's memory."""
        return self.links.begin(WEIGHTS, self._costs.weight_bytes(kind), self.topology.into(device), now_us, owner=device)

    def copy_in(self, device: int, nbytes: int, now_us: int) -> Flow:
        return self.links.begin(KV_IN, nbytes, self.topology.into(device), now_us, owner=device)

    def copy_out(self, device: int, nbytes: int, now_us: int) -> Flow:
        """The room is there when all of it has gone."""
        return self.links.begin(KV_OUT, nbytes, self.topology.out_of(device), now_us, owner=device, is_layered=False)

    def copy_for(self, device: int, alone_us: int, now_us: int) -> Flow | None:
        """Whatever a device would need so long for, were it alone on its links; None where links are never in the way."""
        bytes_per_s = self.topology.hosts.load_bytes_per_s
        if isinf(bytes_per_s):
            return None
        return self.links.begin(COPIES, max(1, round(alone_us * bytes_per_s / SECOND)), self.topology.into(device), now_us, owner=device)

    def hand_over(self, source: int, target: int, nbytes: int, now_us: int, owner: Any) -> Flow:
        """Between two devices; `owner` is told."""
        return self.links.begin(HANDOVER, nbytes, self.topology.between(source, target), now_us, owner=owner)

    def num_layers(self, kind: str) -> int:
        return self._costs.num_layers(kind)

    def step_end_us(self, flow: Flow, kind: str, began_us: int, took_us: int, late_us: int) -> int:
        """Of a step that waits for this flow, which is of use `late_us` after its bytes have come."""
        tail_us = late_us + (self.overhead_us if flow.kind == WEIGHTS else 0)
        return pipelined_end_us(flow, began_us, took_us, self._costs.num_layers(kind), tail_us)

    def use(self, ended_us: int) -> LinksUse:
        """Of all links until then."""
        found: dict[str, LinkUse] = {}
        for channel in self.topology.channels:
            group, use = _group(channel), _use(channel, max(ended_us, 1))
            if group not in found or use.used > found[group].used:
                found[group] = use
        busiest = max(found.values(), key=lambda use: use.used, default=None)
        return LinksUse(busiest=busiest, groups=dict(sorted(found.items())), nbytes=dict(sorted(self.links.carried.items())))


def traffic_of(costs: CostModel, hosts: Hosts, num_devices: int, wake: Callable[[int, Any], None]) -> Traffic:
    """Raises ConfigError for costs that know no bytes."""
    if not isinstance(costs, SizedCosts):
        raise ConfigError(f"{type(costs).__name__} has no bytes to move over links; only physical and learned costs have", param="hosts")
    return Traffic(costs, hosts, num_devices, wake)


def _group(channel: Channel) -> str:
    return " ".join(word for word in channel.name.split() if not word.isdigit())


def _use(channel: Channel, ended_us: int) -> LinkUse:
    used = channel.carried_bytes * SECOND / channel.bytes_per_s / ended_us
    return LinkUse(name=channel.name, busy=channel.busy_us / ended_us, used=used)


def _percent(use: LinkUse) -> dict[str, Any]:
    return {"link": use.name, "busy_percent": round(100 * use.busy, 3), "used_percent": round(100 * use.used, 3)}
