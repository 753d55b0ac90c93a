"""A worker that keeps a record of what it does with its time. Runs in the worker's process; nothing else of it is changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from polymux.actors.worker import Worker
from polymux.transport.messages import Generate
from polymux.transport.units import ClientId


@dataclass(frozen=True, slots=True)
class Step:
    """`features` are those of its cost, prefill's or decode's."""

    phase: str
    model: str
    num_seqs: int
    features: tuple[float, ...]
    seconds: float
    ended_s: float  # monotonic, as all times here: workers and driver share a host
    switched_s: float  # in switches since the step before
    idle_s: float  # waiting for work since then

    def share_beside(self, load: Prefetched) -> float:
        """How much of it the load took place beside."""
        return max(0.0, min(load.ended_s, self.ended_s) - max(load.began_s, self.ended_s - self.seconds)) / self.seconds


@dataclass(frozen=True, slots=True)
class Prefetched:
    """Weights that came in beside other models' steps; a step of their own waits for its layers."""

    model: str
    began_s: float
    ended_s: float


@dataclass(slots=True)
class Records:
    steps: list[Step] = field(default_factory=list)
    received_s: dict[str, float] = field(default_factory=dict)  # when a sequence's command came, by its id
    first_s: dict[str, float] = field(default_factory=dict)  # when its first token left the engine
    loads: list[Prefetched] = field(default_factory=list)


class RecordedWorker(Worker):
    def __init__(self, settings: Any) -> None:
        self._records = Records()
        self._switched_s = self._idle_s = 0.0
        super().__init__(settings)

    def records(self) -> Records:
        """Since the last call."""
        found, self._records = self._records, Records()
        return found

    def _make_roles(self, *arguments: Any) -> None:
        meter, outbox = self._meter, self._outbox
        _after(meter, "prefilled", lambda model, chunks, seconds: self._step_ended("prefill", model, tuple(chunks), seconds))
        _after(meter, "decoded", lambda model, *sizes: self._step_ended("decode", model, sizes[:2], sizes[2]))
        _after(meter, "switched", self._switch_ended)
        _after(outbox, "add", self._token_left)
        _after(self._engine.residency, "on_loaded", self._load_ended)
        super()._make_roles(*arguments)

    def _on_command(self, client_id: ClientId, command: Any) -> None:
        if isinstance(command, Generate):
            self._records.received_s[command.sequence_id] = time.monotonic()
        super()._on_command(client_id, command)

    def _rest(self) -> bool:
        began_s = time.monotonic()
        try:
            return super()._rest()
        finally:
            self._idle_s += time.monotonic() - began_s

    def _switch_ended(self, switch: Any) -> None:
        self._switched_s += switch.seconds

    def _load_ended(self, loaded: Any) -> None:
        if loaded.was_prefetched:
            self._records.loads.append(Prefetched(loaded.model, loaded.began_s, loaded.ended_s))

    def _token_left(self, client_id: ClientId, update: Any) -> None:
        self._records.first_s.setdefault(update.sequence_id, time.monotonic())

    def _step_ended(self, phase: str, model: str, what: tuple[Any, ...], seconds: float) -> None:
        step = Step(phase, model, *_sizes(phase, what), seconds, time.monotonic(), self._switched_s, self._idle_s)
        self._records.steps.append(step)
        self._switched_s = self._idle_s = 0.0


def _sizes(phase: str, what: tuple[Any, ...]) -> tuple[int, tuple[float, ...]]:
    """Sequences, and the features of a step's cost."""
    from polymux.disagg.cost import decode_features, prefill_features

    return (len(what), prefill_features(what)) if phase == "prefill" else (what[0], decode_features(*what))


def _after(owner: Any, name: str, then: Callable[..., None]) -> None:
    """Call `then` with the same arguments after each call of that method."""
    before = getattr(owner, name)

    def both(*arguments: Any, **named: Any) -> Any:
        result = before(*arguments, **named)
        then(*arguments)
        return result

    setattr(owner, name, both)
