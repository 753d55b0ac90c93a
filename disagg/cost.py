"""Seconds for a prefill step, a decode step and a switch: linear costs, learned while serving, begun from a roofline guess.

A fit is recursive least squares with forgetting, in information form: `gram` and `cross` are the decayed sums of x xT and x y, every
observation divided by its predicted time, so that errors count in per cent and short steps are not drowned by long ones.
- Coefficients are the exact non-negative least squares (three features at most: every subset of them is tried), so a prediction is never
  negative and never falls when work is added.
- A time further from its prediction than is usual counts as one at the edge of usual, and lets the past count for less: a page fault or a
  neighbour's burst hardly moves the fit, a lasting change widens what is usual and is followed within some dozens of steps.
- What was never observed keeps the proportions of the guess at the learned level: the guess stays in the sums, ever fainter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from polymux.transport.errors import ConfigError
from polymux.transport.messages import ITEM_BYTES, ModelSpec

Vector = tuple[float, ...]

FORGETTING = 0.99  # an observation's weight falls to 1/e after a hundred others
SURPRISED = 0.8  # the same for a time that is out of the usual: the past counts for less
GUESS_WEIGHT = 1.0  # of the guess, in observations
EDGE = 3.0  # how many usual deviations count in full
MIN_SPREAD = 0.02
GUESS_FADES = 8.0  # observations until that weight is halved
_TRIANGLES = {k: [(i, j) for i in range(k) for j in range(i, k)] for k in range(1, 5)}  # indices of an upper triangle, row by row
TINY_S = 1e-7  # no prediction is below it

PREFILL_ANCHORS = ((1.0, 16.0, 256.0), (1.0, 256.0, 65536.0), (1.0, 4096.0, 16777216.0))
DECODE_ANCHORS = ((1.0, 1.0, 64.0), (1.0, 8.0, 4096.0), (1.0, 64.0, 65536.0))
SWITCH_ANCHORS = ((1.0, 1e6), (1.0, 1e9))
SWAP_ANCHORS = ((1.0, 1e4), (1.0, 1e7))


def prefill_features(chunks: Iterable[tuple[int, int]]) -> Vector:
    """Of one step over each chunk's (tokens cached before, tokens computed now). Squares of a prompt's chunks add up to the prompt's."""
    tokens = squares = 0
    for start, num_tokens in chunks:
        tokens += num_tokens
        squares += num_tokens * (2 * start + num_tokens)
    return (1.0, float(tokens), float(squares))


def decode_features(num_seqs: int, kv_tokens: int) -> Vector:
    return (1.0, float(num_seqs), float(kv_tokens))


def switch_features(num_bytes: int) -> Vector:
    return (1.0, float(num_bytes))


def dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return max(sum(c * x for c, x in zip(coefficients, features, strict=True)), TINY_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A linear cost as a value: `observe` gives the next one. Build with `Fit.guessed`."""

    guess: Vector
    anchors: tuple[Vector, ...]  # typical features at which the guess counts
    coefficients: Vector
    gram: Vector  # upper triangle, row by row
    cross: Vector
    ratio_sum: float = 0.0  # of observed to guessed, decayed
    weight: float = 0.0  # decayed number of observations
    spread: float = 1.0  # the usual deviation, as a share of the prediction
    num_observed: int = 0

    @classmethod
    def guessed(cls, guess: Vector, anchors: tuple[Vector, ...]) -> Fit:
        """Raises ValueError for a guess that is negative, not finite or zero everywhere."""
        k = len(guess)
        if not all(0 <= c < math.inf for c in guess) or not any(guess) or any(len(a) != k for a in anchors):
            raise ValueError(f"guess {guess} needs finite coefficients of at least 0, one above, and anchors of {k} features")
        zeros = (0.0,) * (k * (k + 1) // 2)
        return cls(guess=guess, anchors=anchors, coefficients=guess, gram=zeros, cross=(0.0,) * k)

    def predict(self, features: Sequence[float]) -> float:
        """Seconds, above 0."""
        return dot(self.coefficients, features)

    def observe(self, features: Sequence[float], seconds: float) -> Fit:
        """The fit that has seen this step too. Times that are not finite or not above 0 are ignored."""
        if not (math.isfinite(seconds) and seconds > 0):
            return self
        expected_s = self.predict(features)
        edge = 1.0 + EDGE * self.spread
        ratio = min(max(seconds / expected_s, 1 / edge), edge)
        keep = FORGETTING if 1 / edge < ratio < edge else SURPRISED
        deviation = max(ratio, 1 / ratio) - 1.0
        rate = max(1 / 16, 1 / (self.num_observed + 2))
        unit_s = seconds if seconds > 2 * expected_s else expected_s  # by a prediction far too low, this step would outweigh all others
        x = [feature / unit_s for feature in features]
        y = ratio * expected_s / unit_s
        gram = tuple([keep * g + x[i] * x[j] for g, (i, j) in zip(self.gram, _TRIANGLES[len(x)], strict=True)])
        cross = tuple([keep * c + xi * y for c, xi in zip(self.cross, x, strict=True)])
        ratio_sum = keep * self.ratio_sum + ratio * expected_s / dot(self.guess, features)
        weight = keep * self.weight + 1.0
        return Fit(
            guess=self.guess,
            anchors=self.anchors,
            coefficients=self._solved(gram, cross, ratio_sum / weight, GUESS_WEIGHT / (1.0 + weight / GUESS_FADES)),
            gram=gram,
            cross=cross,
            ratio_sum=ratio_sum,
            weight=weight,
            spread=max(MIN_SPREAD, self.spread + rate * (deviation - self.spread)),
            num_observed=self.num_observed + 1,
        )

    def _solved(self, gram: Sequence[float], cross: Sequence[float], level: float, guess_weight: float) -> Vector:
        """The coefficients of these sums and of the guess, which is observed at each anchor, `level` times as long as it says."""
        k = len(self.guess)
        full = [[0.0] * k for _ in range(k)]
        right = list(cross)
        for value, (i, j) in zip(gram, _TRIANGLES[k], strict=True):
            full[i][j] = full[j][i] = value
        for anchor in self.anchors:
            expected_s = level * dot(self.guess, anchor)
            share = guess_weight / len(self.anchors) / expected_s
            for i in range(k):
                right[i] += share * anchor[i]
                for j in range(k):
                    full[i][j] += share * anchor[i] * anchor[j] / expected_s
        return _non_negative(full, right)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "guess": list(self.guess),
            "anchors": [list(anchor) for anchor in self.anchors],
            "coefficients": list(self.coefficients),
            "gram": list(self.gram),
            "cross": list(self.cross),
            "ratio_sum": self.ratio_sum,
            "weight": self.weight,
            "spread": self.spread,
            "num_observed": self.num_observed,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fit:
        """Undo `to_dict`. Raises ConfigError for data that is not such a dict: delete the file it came from."""
        try:
            fit = cls(
                guess=_vector(data["guess"]),
                anchors=tuple(_vector(anchor) for anchor in data["anchors"]),
                coefficients=_vector(data["coefficients"]),
                gram=_vector(data["gram"]),
                cross=_vector(data["cross"]),
                ratio_sum=float(data["ratio_sum"]),
                weight=float(data["weight"]),
                spread=float(data["spread"]),
                num_observed=int(data["num_observed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"saved cost is damaged, {type(error).__name__}: {error}; delete the file and it is learned again") from error
        k = len(fit.guess)
        fits = len(fit.coefficients) == len(fit.cross) == k and len(fit.gram) == k * (k + 1) // 2 and {len(a) for a in fit.anchors} == {k}
        scalars = (fit.ratio_sum, fit.weight, fit.spread, fit.num_observed)
        if not (k in _TRIANGLES and fits and any(fit.guess) and all(0 <= v < math.inf for v in scalars)):
            raise ConfigError("saved cost is damaged: lengths or values do not fit; delete the file and it is learned again")
        return fit


def _vector(values: Iterable[Any]) -> Vector:
    """Raises ValueError for a number that is negative or not finite."""
    vector = tuple(float(value) for value in values)
    if not all(0 <= value < math.inf for value in vector):
        raise ValueError(f"{vector} has a number that is negative or not finite")
    return vector


def _non_negative(gram: Sequence[Sequence[float]], cross: Sequence[float]) -> Vector:
    """The x >= 0 that minimises x.gram.x - 2 cross.x: the best feasible one among the free minima over every subset of features."""
    k = len(cross)
    best: Vector = (0.0,) * k
    lowest = 0.0
    for size in range(k, 0, -1):
        for kept in combinations(range(k), size):
            part = _solve([[gram[i][j] for j in kept] for i in kept], [cross[i] for i in kept])
            if part is None or min(part) < 0:
                continue
            height = -sum(x * cross[i] for x, i in zip(part, kept, strict=True))
            if height < lowest:
                lowest = height
                found = dict(zip(kept, part, strict=True))
                best = tuple(found.get(i, 0.0) for i in range(k))
        if size == k and lowest < 0:
            break  # no constraint binds
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """A positive definite system by Cholesky, scaled to a unit diagonal; None when it is singular to working precision."""
    k = len(right)
    scale = [1 / math.sqrt(matrix[i][i]) if matrix[i][i] > 0 else 0.0 for i in range(k)]
    lower = [[0.0] * k for _ in range(k)]
    y = [0.0] * k
    for i in range(k):
        for j in range(i + 1):
            rest = matrix[i][j] * scale[i] * scale[j] - sum(lower[i][m] * lower[j][m] for m in range(j))
            if i != j:
                lower[i][j] = rest / lower[j][j]
            elif rest > 1e-12:
                lower[i][i] = math.sqrt(rest)
            else:
                return None
        y[i] = (right[i] * scale[i] - sum(lower[i][m] * y[m] for m in range(i))) / lower[i][i]
    for i in reversed(range(k)):
        y[i] = (y[i] - sum(lower[m][i] * y[m] for m in range(i + 1, k))) / lower[i][i]
    return [value * factor for value, factor in zip(y, scale, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What a device can do at best; the defaults are one core of a server CPU."""

    flops_per_s: float = 1e11
    memory_bytes_per_s: float = 1.5e10
    copy_bytes_per_s: float = 8e9  # into the arena
    step_overhead_s: float = 1e-3
    switch_overhead_s: float = 1e-3
    swap_overhead_s: float = 2e-5  # of one copy between the arena and the host tier


def guess_prefill(spec: ModelSpec, device: Roofline) -> Fit:
    """A pass over the weights, two operations a weight and token, and causal attention over half of all pairs."""
    num_weights = spec.weight_bytes / ITEM_BYTES[spec.dtype]
    num_heads = json.loads(spec.config_json).get("num_attention_heads", spec.kv.num_kv_heads)
    attention = 2.0 * spec.kv.num_layers * num_heads * spec.kv.head_dim
    pass_s = device.step_overhead_s + spec.weight_bytes / device.memory_bytes_per_s
    return Fit.guessed((pass_s, 2 * num_weights / device.flops_per_s, attention / device.flops_per_s), PREFILL_ANCHORS)


def guess_decode(spec: ModelSpec, device: Roofline) -> Fit:
    """A pass over the weights, two operations a weight and sequence, and a pass over the batch's cache."""
    num_weights = spec.weight_bytes / ITEM_BYTES[spec.dtype]
    pass_s = device.step_overhead_s + spec.weight_bytes / device.memory_bytes_per_s
    kv_s = spec.kv.block_bytes / spec.kv.block_size / device.memory_bytes_per_s
    return Fit.guessed((pass_s, 2 * num_weights / device.flops_per_s, kv_s), DECODE_ANCHORS)


def guess_switch(device: Roofline) -> Fit:
    return Fit.guessed((device.switch_overhead_s, 1 / device.copy_bytes_per_s), SWITCH_ANCHORS)


def guess_swap(device: Roofline) -> Fit:
    return Fit.guessed((device.swap_overhead_s, 1 / device.copy_bytes_per_s), SWAP_ANCHORS)
