"""Aegaeon (SOSP '25) as its artifact simulates it: prefill and decode devices apart, published dispatch and turn rules, to the letter.

The project's own `wrr` turn policy keeps the formula and mends what is around it (`disagg/multiplex.py` lists how); a baseline must not be
mended, so the rules stand here as they were found. One deviation: batches of a round are ordered by name; there, by memory address.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.loop import DECODE, PREFILL, SWITCH, Journal, Simulation
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.request_level import PATIENCE_US
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.traffic import Traffic

LOOKAHEAD = 64  # tokens that each sequence of a batch may still grow by, where a batch is asked whether one more fits
MIN_ALPHA = 0.5


@dataclass(slots=True, eq=False)
class _Device:
    """What both phases share: a model, and how long it has computed since it was switched in, behind which the next load hides."""

    number: int
    model: str | None = None
    computed_us: int = 0
    is_busy: bool = False
    waiting: tuple[str, str, int] = ("", "", 0)  # what it will do for which model and how long, where a copy must end first

    def switch_us(self, model: str, kind: str, costs: CostModel) -> int:
        if self.model == model:
            return 0
        took_us = costs.load_us(kind) if self.model is None else costs.prefetched_us(kind, self.computed_us)
        self.model, self.computed_us = model, 0
        return took_us


@dataclass(slots=True, eq=False)
class _Prefill(_Device):
    groups: list[tuple[str, list[Progress]]] = field(default_factory=list)
    serving: Progress | None = None


@dataclass(slots=True, eq=False)
class _Batch:
    model: str
    kind: str
    members: list[Progress]
    quota_us: float = 0.0

    @property
    def kv_tokens(self) -> int:
        return sum(one.request.input_len + one.num_tokens for one in self.members)


@dataclass(slots=True, eq=False)
class _Decode(_Device):
    batches: list[_Batch] = field(default_factory=list)  # the first one's turn it is
    num_turns_left: int = 0  # of this round
    turn_began_us: int | None = None  # after the turn's first step
    is_turn_new: bool = True
    stepping: list[Progress] = field(default_factory=list)


class Published(Simulation[_Prefill | _Decode]):
    """Serves with so many devices of each phase. A turn lasts `max_quota_us` at most.

    With `hosts`, what a switch has to copy by the published rules goes over their links; leaving KV in host memory stays free.
    """

    def __init__(
        self,
        costs: CostModel,
        targets: Targets,
        *,
        num_prefill: int,
        num_decode: int,
        max_quota_us: int = 4 * SECOND,
        hosts: Hosts | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(costs, targets, num_devices=num_prefill + num_decode, hosts=hosts, journal=journal)
        self._tpot_us = targets.tpot_us
        self._max_quota_us = max_quota_us
        self._prefills = [_Prefill(i) for i in range(num_prefill)]
        self._decodes = [_Decode(num_prefill + i) for i in range(num_decode)]

    def _ended(self, device: _Prefill | _Decode, now_us: int) -> None:
        device.is_busy = False
        if isinstance(device, _Prefill):
            self._prefilled(device, now_us)
        else:
            self._stepped(device, now_us)

    def _began(self, device: _Prefill | _Decode, kind: str, model: str, now_us: int, switch_us: int, step_us: int) -> None:
        device.is_busy = True
        if self.traffic is not None and switch_us > self.traffic.overhead_us:
            flow = self.traffic.copy_for(device.number, switch_us - self.traffic.overhead_us, now_us)
            if flow is not None:
                device.waiting = kind, model, step_us
                return
        self._note(device.number, SWITCH, model, now_us, now_us + switch_us)
        self._note(device.number, kind, model, now_us + switch_us, now_us + switch_us + step_us)
        self._at(now_us + switch_us + step_us, device)

    def _flow_ended(self, flow: Flow, traffic: Traffic, now_us: int) -> None:
        """What a switch had to copy is there."""
        device: _Prefill | _Decode = [*self._prefills, *self._decodes][flow.owner]
        kind, model, step_us = device.waiting
        ready_us = now_us + traffic.overhead_us
        self._note(device.number, SWITCH, model, flow.began_us, ready_us)
        self._note(device.number, kind, model, ready_us, ready_us + step_us)
        self._at(ready_us + step_us, device)

    # -- prefill: groups of one model in line, one prompt at a time ---------------------------------------------------

    def _arrive(self, one: Progress) -> None:
        now_us, model = one.request.arrival_us, one.request.model
        for device in self._prefills:
            self._purge(device, now_us)
        for device in self._prefills:
            group = next((members for name, members in device.groups if name == model), None)
            if group is not None:
                group.append(one)
                break
        else:
            device = min(self._prefills, key=lambda d: (len(d.groups), d.number))
            device.groups.append((model, [one]))
        self._note_placement(one, device.number)
        self._start_prefill(device, now_us)

    @staticmethod
    def _purge(device: _Prefill, now_us: int) -> None:
        for _, members in device.groups:
            for one in members:
                one.has_failed = now_us - one.request.arrival_us > PATIENCE_US
            members[:] = [one for one in members if not one.has_failed]
        device.groups = [group for group in device.groups if group[1]]

    def _start_prefill(self, device: _Prefill, now_us: int) -> None:
        if device.is_busy or not device.groups:
            return
        model, members = device.groups[0]
        one = device.serving = members.pop(0)
        if not members:
            device.groups.pop(0)
        took_us = device.switch_us(model, one.request.kind, self._costs)
        step_us = self._costs.prefill_us(one.request.kind, [one.request.input_len])
        device.computed_us += step_us
        self._began(device, PREFILL, model, now_us, took_us, step_us)

    def _prefilled(self, device: _Prefill, now_us: int) -> None:
        one, device.serving = device.serving, None
        assert one is not None
        one.token(now_us)
        if not one.is_done:
            self._join_decode(one, now_us)
        self._start_prefill(device, now_us)

    # -- decode: rounds of turns --------------------------------------------------------------------------------------

    def _join_decode(self, one: Progress, now_us: int) -> None:
        """The first batch of its model, on any device in order, where it fits; else a new one where there are fewest."""
        request = one.request
        for device in self._decodes:
            for batch in device.batches:
                if batch.model == request.model and self._fits(batch, one):
                    batch.members.append(one)
                    return self._start_decode(device, now_us)
        device = min(self._decodes, key=lambda d: (len(d.batches), d.number))
        device.batches.append(_Batch(request.model, request.kind, [one]))
        return self._start_decode(device, now_us)

    def _fits(self, batch: _Batch, one: Progress) -> bool:
        grown = batch.kv_tokens + LOOKAHEAD * len(batch.members) + one.request.input_len
        return grown <= self._costs.max_kv_tokens(batch.kind)

    def _begin_round(self, device: _Decode) -> None:
        device.batches = sorted((batch for batch in device.batches if batch.members), key=lambda batch: batch.model)
        steps_us = [self._costs.decode_us(b.kind, len(b.members), b.kv_tokens) for b in device.batches]
        num_steps = [self._tpot_us / step_us for step_us in steps_us]
        load = sum(1 / n for n in num_steps)
        switch_us = sum(self._costs.load_us(batch.kind) for batch in device.batches)
        alpha = max(switch_us / (min(num_steps) * self._max_quota_us) + load, MIN_ALPHA)
        for batch, n in zip(device.batches, num_steps, strict=True):
            batch.quota_us = switch_us / (n * (alpha - load))
        device.num_turns_left = len(device.batches)

    def _start_decode(self, device: _Decode, now_us: int) -> None:
        if device.is_busy:
            return
        batch = self._current(device, now_us)
        if batch is None:
            return
        took_us = 0
        if device.is_turn_new or device.model != batch.model:
            if device.model != batch.model or len(device.batches) > 1:
                took_us += self._costs.kv_in_us(batch.kind, batch.kv_tokens)
            took_us += device.switch_us(batch.model, batch.kind, self._costs)
            device.is_turn_new, device.turn_began_us = False, None
        step_us = self._costs.decode_us(batch.kind, len(batch.members), batch.kv_tokens)
        device.computed_us += step_us
        device.stepping = list(batch.members)
        self._began(device, DECODE, batch.model, now_us, took_us, step_us)

    def _current(self, device: _Decode, now_us: int) -> _Batch | None:
        """The batch whose turn it is; turns that are over go to the end of the line, and a round that is over begins anew."""
        while any(batch.members for batch in device.batches):
            if device.num_turns_left <= 0:
                self._begin_round(device)
            batch = device.batches[0]
            is_over = device.turn_began_us is not None and now_us > device.turn_began_us + batch.quota_us
            if batch.members and not is_over:
                return batch
            device.batches.pop(0)
            if batch.members:
                device.batches.append(batch)
            device.num_turns_left -= 1
            device.turn_began_us, device.is_turn_new = None, True
        device.batches, device.num_turns_left, device.turn_began_us = [], 0, None
        return None

    def _stepped(self, device: _Decode, now_us: int) -> None:
        for one in device.stepping:
            one.token(now_us)
        device.batches[0].members = [one for one in device.batches[0].members if not one.is_done]
        if device.turn_began_us is None:
            device.turn_began_us = now_us
        self._start_decode(device, now_us)
