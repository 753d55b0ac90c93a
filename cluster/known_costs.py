"""What the controller takes a model's steps to cost on each worker: measured there, measured on its like, or guessed.

A worker that has run a model a few times only knows little of it; were that its cost, a first bad measurement would keep the model away
from it, and so would never be mended. And between workers that are alike, the noise of two measurements would decide where everything
goes. So a worker counts as the most experienced one of its kind of device, until it has seen enough to be told from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from polymux.disagg.dispatch import Coefficients
from polymux.transport.units import ModelName

ENOUGH_STEPS = 32  # for a worker's own word
TELLING = 1.25  # by so much its steps must be slower or faster than its like's
SMALL_STEP = 8  # sequences of a decode step, tokens of a prompt: where steps are compared


@dataclass(frozen=True, slots=True)
class Measured:
    """`num_steps` is 0 for what was never measured."""

    cost: tuple[float, ...]
    num_steps: int


@dataclass(slots=True)
class KnownCosts:
    """Of one phase."""

    _guesses: dict[ModelName, Coefficients] = field(default_factory=dict)
    _best: dict[tuple[str, ModelName], tuple[int, Coefficients]] = field(default_factory=dict)  # by kind of device; with steps measured

    def __contains__(self, model: ModelName) -> bool:
        return model in self._guesses

    def guess(self, model: ModelName, cost: Coefficients) -> None:
        self._guesses[model] = cost

    def of(self, device_kind: str) -> dict[ModelName, Coefficients]:
        """For a worker that has not reported."""
        return {model: self._best.get((device_kind, model), (0, guess))[1] for model, guess in self._guesses.items()}

    def report(self, device_kind: str, measured: Mapping[ModelName, Measured]) -> dict[ModelName, Coefficients]:
        """Take in a worker's report. Returns what its steps are taken to cost from now on; a cost that cannot be one is passed over."""
        found: dict[ModelName, Coefficients] = {}
        for model, one in measured.items():
            cost = three(one.cost)
            if cost is None or model not in self._guesses:
                continue
            num_steps, best = self._best.get((device_kind, model), (0, self._guesses[model]))
            is_first = one.num_steps > 0 and one.num_steps >= num_steps
            if is_first:
                self._best[device_kind, model] = one.num_steps, cost
            is_other = one.num_steps >= ENOUGH_STEPS and not 1 / TELLING <= _step_s(cost) / _step_s(best) <= TELLING
            found[model] = cost if is_first or is_other else best
        return found


def _step_s(cost: Coefficients) -> float:
    return max(cost[0] + SMALL_STEP * cost[1], 1e-12)


def three(coefficients: tuple[float, ...]) -> Coefficients | None:
    """None for what cannot be a cost: a prediction from it would be negative, zero or not a number."""
    if len(coefficients) != 3 or not all(0 <= c < math.inf for c in coefficients) or not any(coefficients):
        return None
    first, second, third = coefficients
    return first, second, third
