"""Seeded traces: `poisson`, `gamma` (bursts), `diurnal` and `sessions` (conversations whose prompts grow), each as NAME:key=value,...

Keys of all: models, rate (requests a second of each model on average), seconds, seed, zipf (popularity rank ** -zipf), input and output
(mean tokens, log-normal, about ShareGPT's by default) and longest (output). `gamma` has cv, of the gaps; `diurnal` has period (seconds)
and depth (0 to 1); `sessions` has turns (mean) and think (mean seconds between an answer and the next question).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.errors import ConfigError

SPREAD = 0.8  # sigma of the logarithm of a length
MAX_INPUT = 3072
ANSWER_S_PER_TOKEN = 0.05  # at which a session's user is assumed to read


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    models: int = 64
    rate: float = 0.1
    seconds: float = 120.0
    seed: int = 0
    zipf: float = 0.0
    input: float = 680.0
    output: float = 290.0
    longest: int = 1024
    cv: float = 2.5
    period: float = 600.0
    depth: float = 0.8
    turns: float = 4.0
    think: float = 10.0

    def __post_init__(self) -> None:
        for name in ("models", "rate", "seconds", "input", "output", "longest", "cv", "period", "turns"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0", param="trace")
        if not 0 <= self.depth <= 1 or self.zipf < 0 or self.think < 0:
            raise ConfigError(f"depth={self.depth} must be in [0, 1], zipf={self.zipf} and think={self.think} at least 0", param="trace")

    @property
    def total_rate(self) -> float:
        return self.rate * self.models


def zipf_weights(count: int, exponent: float) -> list[float]:
    return [(rank + 1) ** -exponent for rank in range(count)]


def _poisson(shape: Shape, rng: random.Random) -> Iterator[float]:
    while True:
        yield rng.expovariate(shape.total_rate)


def _gamma(shape: Shape, rng: random.Random) -> Iterator[float]:
    order = shape.cv**-2
    while True:
        yield rng.gammavariate(order, 1 / (order * shape.total_rate))


def _diurnal(shape: Shape, rng: random.Random) -> Iterator[float]:
    """A sine around the mean rate, by thinning a Poisson process of its peak."""
    at_s = last_s = 0.0
    peak = shape.total_rate * (1 + shape.depth)
    while True:
        at_s += rng.expovariate(peak)
        rate = shape.total_rate * (1 + shape.depth * math.sin(2 * math.pi * at_s / shape.period))
        if rng.random() < rate / peak:
            yield at_s - last_s
            last_s = at_s


GENERATORS: dict[str, Callable[[Shape, random.Random], Iterator[float]]] = {
    "poisson": _poisson,
    "gamma": _gamma,
    "diurnal": _diurnal,
    "sessions": _poisson,
}


def generate(text: str, kinds: Sequence[str]) -> list[SimRequest]:
    """By arrival. Models are of these kinds in turns. Raises ConfigError naming the key that is wrong."""
    name, _, settings = text.partition(":")
    shape = _shape(settings)
    if name == "sessions":
        shape = replace(shape, rate=shape.rate / shape.turns)  # of sessions
    rngs = {part: random.Random(f"{part} {name} {shape.seed}") for part in ("gaps", "models", "lengths", "order")}
    ranked = list(range(shape.models))
    rngs["order"].shuffle(ranked)
    weights = zipf_weights(shape.models, shape.zipf)
    found: list[tuple[float, int, int, int, int | None]] = []
    for number, at_s in enumerate(accumulate(GENERATORS[name](shape, rngs["gaps"]))):
        if at_s >= shape.seconds:
            break
        model = rngs["models"].choices(ranked, weights)[0]
        turns = _session(at_s, shape, rngs["lengths"]) if name == "sessions" else [(at_s, *_lengths(shape, rngs["lengths"]))]
        session = number if name == "sessions" else None
        found += [(began_s, model, num_input, num_output, session) for began_s, num_input, num_output in turns if began_s < shape.seconds]
    return [
        SimRequest(
            request_id=i,
            arrival_us=round(at_s * SECOND),
            model=f"model-{model:04d}",
            kind=kinds[model % len(kinds)],
            input_len=num_input,
            output_len=num_output,
            session=session,
        )
        for i, (at_s, model, num_input, num_output, session) in enumerate(sorted(found, key=lambda one: one[:4]))
    ]


def _session(at_s: float, shape: Shape, rng: random.Random) -> Iterator[tuple[float, int, int]]:
    """Each prompt is all that was said before and a new question, which is short."""
    history = 0
    while history < MAX_INPUT:
        question, answer = _lengths(replace(shape, input=shape.input / 4), rng)
        yield at_s, min(history + question, MAX_INPUT), answer
        if rng.random() < 1 / shape.turns:
            return
        history += question + answer
        at_s += answer * ANSWER_S_PER_TOKEN + rng.expovariate(1 / shape.think) if shape.think else answer * ANSWER_S_PER_TOKEN


def _lengths(shape: Shape, rng: random.Random) -> tuple[int, int]:
    return _length(rng, shape.input, MAX_INPUT), _length(rng, shape.output, shape.longest)


def _length(rng: random.Random, mean: float, most: int) -> int:
    return max(1, min(most, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))


def _shape(settings: str) -> Shape:
    known = {field.name: field for field in fields(Shape)}
    values: dict[str, float | int] = {}
    for part in filter(None, settings.split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise ConfigError(f"trace setting {key!r} is unknown; there are {', '.join(known)}", param="trace")
        try:
            values[key] = int(text) if isinstance(known[key].default, int) else float(text)
        except ValueError:
            raise ConfigError(f"trace setting {key}={text!r} is no number", param="trace") from None
    return Shape(**values)  # type: ignore[arg-type]
