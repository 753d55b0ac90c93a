"""What the controller takes a model's steps, and a switch, to cost on each worker: measured there, measured on its like, or guessed.

Workers of one kind of device are taken to cost the same, to the last digit and at any time: while no worker is late, the least difference
would decide where everything goes, and between workers that are alike it is noise, or one report that is half a second newer than the
other. So there is one word for all of them, that of the most experienced, which is replaced only by one that knows much more, or when the
machine has changed. A worker that has seen enough to be told from its like has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polymux.disagg.cost import Roofline, Vector, dot
from polymux.disagg.dispatch import Coefficients
from polymux.transport.units import ModelName, WorkerId

ENOUGH_STEPS = 32  # for a worker's own word
TELLING = 1.25  # by so much its steps must be slower, or faster, than its like's: small ones and large ones
DRIFT = 1.1  # by so much steps, or switches, must have changed for a word to be replaced
GROWN = 1.5  # or by so much the steps behind it


@dataclass(frozen=True, slots=True)
class Measured:
    """`num_steps` is 0 for what was never measured."""

    cost: tuple[float, ...]
    num_steps: int


@dataclass(frozen=True, slots=True)
class _Word:
    """`said_by` None: a guess, or by a worker that is gone."""

    cost: Coefficients
    num_steps: int = 0
    said_by: WorkerId | None = None


class KnownCosts:
    """Of one phase. What `of` returns is replaced, never changed in place: views hold it."""

    def __init__(self, sizes: Sequence[Vector]) -> None:
        """`sizes`: features of the steps by which costs are compared."""
        self._sizes = sizes
        self._guesses: dict[ModelName, Coefficients] = {}
        self._words: dict[str, dict[ModelName, _Word]] = {}  # by kind of device
        self._shared: dict[str, dict[ModelName, Coefficients]] = {}  # the same words' costs, and guesses
        self._own: dict[WorkerId, dict[ModelName, Coefficients]] = {}

    def __contains__(self, model: ModelName) -> bool:
        return model in self._guesses

    def guess(self, model: ModelName, cost: Coefficients) -> None:
        """For a model that is new."""
        self._guesses = {**self._guesses, model: cost}
        self._shared = {kind: {**costs, model: cost} for kind, costs in self._shared.items()}

    def of(self, device_kind: str, worker_id: WorkerId) -> Mapping[ModelName, Coefficients]:
        """The very same object for all workers of a kind that have no words of their own, until one of theirs changes."""
        shared = self._shared.get(device_kind, self._guesses)
        own = self._own.get(worker_id)
        return {**shared, **own} if own else shared

    def report(self, device_kind: str, worker_id: WorkerId, measured: Mapping[ModelName, Measured]) -> bool:
        """Take in a worker's report. Returns whether what its like share has changed; a cost that cannot be one is passed over."""
        words, own = self._words.setdefault(device_kind, {}), self._own.setdefault(worker_id, {})
        changed: dict[ModelName, Coefficients] = {}
        for model, one in measured.items():
            cost = three(one.cost)
            if cost is None or model not in self._guesses:
                continue
            word = words.get(model) or _Word(self._guesses[model])
            own.pop(model, None)
            is_other = one.num_steps >= ENOUGH_STEPS and self._differs(cost, word.cost, TELLING)
            holds = word.said_by not in (None, worker_id) and word.num_steps >= ENOUGH_STEPS  # for its like, whatever this one says
            if self._is_news(cost, one.num_steps, word) and not (is_other and holds):
                words[model] = _Word(cost, one.num_steps, worker_id)
                changed[model] = cost
            elif is_other:
                own[model] = cost
        if changed:
            self._shared[device_kind] = {**self._shared.get(device_kind, self._guesses), **changed}
        return bool(changed)

    def forget(self, worker_id: WorkerId) -> None:
        """It is gone. What it said is believed until another has measured enough."""
        self._own.pop(worker_id, None)
        for words in self._words.values():
            for model, word in words.items():
                if word.said_by == worker_id:
                    words[model] = replace(word, num_steps=min(word.num_steps, ENOUGH_STEPS), said_by=None)

    def _is_news(self, cost: Coefficients, num_steps: int, word: _Word) -> bool:
        """Whether a worker that knows at least as much says something else, or says it with much more behind it."""
        if num_steps == 0 or num_steps < word.num_steps:
            return False
        return num_steps >= GROWN * word.num_steps or self._differs(cost, word.cost, DRIFT)

    def _differs(self, cost: Coefficients, other: Coefficients, by: float) -> bool:
        """The same way at every size: of batches that were never seen a fit is a guess, and two fits are two guesses."""
        ratios = [dot(cost, size) / dot(other, size) for size in self._sizes]
        return min(ratios) > by or max(ratios) < 1 / by


class KnownSpeeds:
    """Bytes per second of switches to weights that must be copied: the mean of what workers of one kind say."""

    def __init__(self) -> None:
        self._said: dict[str, dict[WorkerId, float]] = {}  # by kind of device
        self._taken: dict[str, float] = {}

    def of(self, device_kind: str) -> float:
        return self._taken.get(device_kind, Roofline().copy_bytes_per_s)

    def report(self, device_kind: str, worker_id: WorkerId, bytes_per_s: float) -> bool:
        """Returns whether what is taken has changed. A worker that has not copied any says 0."""
        if not 0 < bytes_per_s < math.inf:
            return False
        said = self._said.setdefault(device_kind, {})
        said[worker_id] = bytes_per_s
        mean, taken = sum(said.values()) / len(said), self._taken.get(device_kind)
        if taken is not None and 1 / DRIFT <= mean / taken <= DRIFT:
            return False
        self._taken[device_kind] = mean
        return True

    def forget(self, worker_id: WorkerId) -> None:
        for said in self._said.values():
            said.pop(worker_id, None)


def three(coefficients: tuple[float, ...]) -> Coefficients | None:
    """None for what cannot be a cost: a prediction from it would be negative, zero or not a number."""
    if len(coefficients) != 3 or not all(0 <= c < math.inf for c in coefficients) or not any(coefficients):
        return None
    first, second, third = coefficients
    return first, second, third
