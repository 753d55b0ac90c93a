"""Transfers that share links: a flow has bytes and a path, and where flows meet they share by max-min fairness.

Rates are those of progressive filling (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2): the link that leaves its flows least
divides what it has evenly among them, those are settled, and so on with what is left. They change only when a flow begins or ends, so
those are the only events, and only flows that links join to the one that changed are looked at. A network of packets comes close to such
rates for transfers of megabytes, which is all that goes here.

All in whole bytes a second and whole microseconds: shares are rounded down, ends up. On one link a new flow never makes another one end
earlier; over several links it may, by slowing a third one down that both had met.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from polymux.disagg.sim.costs import SECOND

NEVER = 1 << 62  # microseconds


@dataclass(slots=True, eq=False)
class Channel:
    """One direction of a link, or what several links share."""

    name: str
    bytes_per_s: int
    flows: dict[Flow, None] = field(default_factory=dict)  # in the order in which they began
    carried_bytes: int = 0
    busy_us: int = 0
    busy_since_us: int = 0

    def __post_init__(self) -> None:
        assert self.bytes_per_s > 0, self.name


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes on their way along a path of channels. `ends_us` holds unless another flow begins or ends."""

    kind: str
    nbytes: int
    path: tuple[Channel, ...]
    began_us: int
    owner: Any = None  # whoever began it
    is_layered: bool = True  # whoever waits for it can use each layer when it is there
    bytes_per_s: int = 0
    ends_us: int = NEVER
    is_done: bool = False
    pieces: list[tuple[int, int]] = field(default_factory=list)  # (at_us, millionths of a byte left), where the rate changed
    _left: int = 0  # millionths of a byte at `_as_of_us`
    _as_of_us: int = 0
    _woken_us: int = NEVER  # the earliest event that it has

    def left_at(self, now_us: int) -> int:
        """Millionths of a byte."""
        return max(0, self._left - self.bytes_per_s * (now_us - self._as_of_us))


class Links:
    """`wake(at_us, flow)` asks for `ended(flow, at_us)` to be called then."""

    def __init__(self, wake: Callable[[int, Flow], None]) -> None:
        self._wake = wake
        self.num_flows = 0
        self.carried: dict[str, int] = {}  # bytes by kind of traffic

    def begin(self, kind: str, nbytes: int, path: Sequence[Channel], now_us: int, *, owner: Any = None, is_layered: bool = True) -> Flow:
        """A flow without bytes, or over no channel at all, is done at once, and `wake` is not asked."""
        flow = Flow(kind, nbytes, tuple(path), now_us, owner, is_layered)
        flow._left, flow._as_of_us = nbytes * SECOND, now_us
        flow.pieces.append((now_us, flow._left))
        if not nbytes or not path:
            flow.is_done, flow.ends_us = True, now_us
            flow.pieces.append((now_us, 0))
            self.carried[kind] = self.carried.get(kind, 0) + nbytes
            return flow
        self.num_flows += 1
        for channel in path:
            if not channel.flows:
                channel.busy_since_us = now_us
            channel.flows[flow] = None
        self._share(path, now_us)
        return flow

    def ended(self, flow: Flow, now_us: int) -> bool:
        """Whether this event is its end: else it was slowed down, or has ended before."""
        if flow.is_done or flow._woken_us != now_us:
            return False
        flow._woken_us = NEVER
        if flow.ends_us > now_us:
            self._ask(flow)
            return False
        flow.is_done = True
        flow._left = 0
        flow.pieces.append((now_us, 0))
        self._leave(flow, now_us)
        return True

    def cancel(self, flow: Flow, now_us: int) -> None:
        """What has crossed has crossed."""
        if flow.is_done:
            return
        flow._left = flow.left_at(now_us)
        flow.is_done = True
        self._leave(flow, now_us)

    def _leave(self, flow: Flow, now_us: int) -> None:
        nbytes = flow.nbytes - flow._left // SECOND
        self.carried[flow.kind] = self.carried.get(flow.kind, 0) + nbytes
        for channel in flow.path:
            del channel.flows[flow]
            channel.carried_bytes += nbytes
            if not channel.flows:
                channel.busy_us += now_us - channel.busy_since_us
        self._share(flow.path, now_us)

    def _share(self, changed: Iterable[Channel], now_us: int) -> None:
        """New rates for whoever is joined to these channels."""
        channels = _joined(changed)
        for flow, bytes_per_s in fair_rates(channels).items():
            if bytes_per_s == flow.bytes_per_s:
                continue
            flow._left, flow._as_of_us = flow.left_at(now_us), now_us
            if now_us > flow.began_us:
                flow.pieces.append((now_us, flow._left))
            flow.bytes_per_s = bytes_per_s
            flow.ends_us = now_us - (-flow._left // bytes_per_s)
            self._ask(flow)

    def _ask(self, flow: Flow) -> None:
        """A later end is noticed at the earlier event."""
        if flow.ends_us < flow._woken_us:
            flow._woken_us = flow.ends_us
            self._wake(flow.ends_us, flow)


def _joined(changed: Iterable[Channel]) -> list[Channel]:
    """These channels that have flows, all others on the paths of those, and so on."""
    found = {channel: None for channel in changed if channel.flows}
    line = list(found)
    for channel in line:
        for flow in channel.flows:
            for other in flow.path:
                if other not in found:
                    found[other] = None
                    line.append(other)
    return line


def fair_rates(channels: Sequence[Channel]) -> dict[Flow, int]:
    """Bytes a second of each flow on these channels, which are all that any of them crosses."""
    flows = {flow: None for channel in channels for flow in channel.flows}
    if len(flows) == 1:
        return dict.fromkeys(flows, min(channel.bytes_per_s for channel in channels))
    left = {channel: channel.bytes_per_s for channel in channels}
    counts = {channel: len(channel.flows) for channel in channels}
    rates: dict[Flow, int] = {}
    while counts:
        tightest = min(counts, key=lambda channel: left[channel] // counts[channel])  # ties: the first, which changes nothing
        share = left[tightest] // counts[tightest]
        assert share > 0, f"{tightest.name} has more flows than bytes a second"
        for flow in tightest.flows:
            if flow not in rates:
                rates[flow] = share
                for channel in flow.path:
                    left[channel] -= share
                    counts[channel] -= 1
        counts = {channel: count for channel, count in counts.items() if count}
    return rates


def pipelined_end_us(flow: Flow, began_us: int, took_us: int, num_layers: int, tail_us: int = 0) -> int:
    """When a step ends that computes `took_us` from `began_us` on, where each layer waits until it has come, and `tail_us` more.

    Layers are of equal size on both sides. Bytes that are not `is_layered` are all there before the first. Between two changes of the rate
    layers come evenly, so only the first and the last of each such stretch can be the one that everything waits for.
    """
    done_us = flow.pieces[-1][0] + tail_us
    if not flow.is_layered:
        return max(began_us, done_us) + took_us
    end_us = began_us + took_us
    total = flow.nbytes * SECOND
    for (at_us, left), (next_us, next_left) in zip(flow.pieces, flow.pieces[1:], strict=False):
        first = (total - left) * num_layers // total + 1
        last = (total - next_left) * num_layers // total
        for layer in {first, last} if first <= last else ():
            needed = max(0, layer * total // num_layers - (total - left))
            arrived_us = at_us - (-needed * (next_us - at_us) // max(left - next_left, 1))
            end_us = max(end_us, arrived_us + tail_us - (-(num_layers - layer + 1) * took_us // num_layers))
    return end_us
