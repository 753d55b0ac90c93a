"""How many devices a catalogue needs, and what a million tokens then cost: one device a model, switching between requests, polymux.

The fewest devices that reach the wanted attainment are found by halving and doubling from one a model, each size one simulation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polymux.deploy.simulation.cluster import ClusterSpec
from polymux.deploy.simulation.runs import Result, percent, run_policy
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.errors import ConfigError

STRATEGIES = {"dedicated": "static", "request level": "sllm-idle", "polymux": "slack"}
MEASURES = ("qos", "tok", "req")

# Of Aegaeon's production pool (SOSP '25): models, requests a second of each, mean seconds that one takes
PRODUCTION = (100, 0.037, 16.79)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """So much of a measure, as a share."""

    measure: str = "req"
    share: float = 0.9

    def __post_init__(self) -> None:
        if self.measure not in MEASURES or not 0 < self.share <= 1:
            raise ConfigError(f"attainment {self.measure}={self.share} must be a share in (0, 1] of {', '.join(MEASURES)}")

    def is_met(self, result: Result) -> bool:
        return float(getattr(result.attainment, self.measure)) >= self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One strategy on one kind of device; `result` is at `num_devices`, which may fall short where nothing met the goal."""

    strategy: str
    device: str
    num_devices: int
    price_per_h: float
    result: Result
    is_met: bool
    seconds: float  # in which the requests arrived
    gpus: int = 1  # of an instance

    @property
    def cost_per_hour(self) -> float:
        return self.num_devices * self.price_per_h


def to_dict(answers: Sequence[Answer], dedicated: int) -> dict[str, Any]:
    """One strategy on one kind of device: pools of instances of each size beside each other, compared with so many `dedicated` devices.

    A million tokens cost what they do at the rate at which the trace asks for them: what is still to be served after its last arrival runs
    beside what comes then. Shares are means over requests.
    """
    first, num_requests = answers[0], sum(one.result.attainment.num_requests for one in answers)
    num_devices, cost_per_hour = sum(one.num_devices for one in answers), sum(one.cost_per_hour for one in answers)
    tokens, seconds = sum(one.result.num_tokens for one in answers), max(one.seconds for one in answers)
    found: dict[str, Any] = {
        "strategy": first.strategy,
        "device": first.device,
        "devices": num_devices,
        "is_met": all(one.is_met for one in answers),
        "cost_per_hour": round(cost_per_hour, 2),
        "cost_per_million_tokens": round(cost_per_hour * seconds / 3600 / (tokens / 1e6), 3),
        "saving_percent": round(100 * (1 - num_devices / dedicated), 1),
    }
    for measure in MEASURES:
        share = sum(getattr(one.result.attainment, measure) * one.result.attainment.num_requests for one in answers) / num_requests
        found[measure] = percent(share)
    if len(answers) > 1:
        found["devices_by_size"] = {str(one.gpus): one.num_devices for one in answers}
    return found


def parse_prices(text: str) -> dict[str, float]:
    """`h100:2.5/h,h200:3.5/h`. Raises ConfigError."""
    prices = {}
    for part in text.split(","):
        name, _, price = part.strip().partition(":")
        try:
            prices[name] = float(price.removesuffix("/h"))
        except ValueError:
            raise ConfigError(f"--gpu {part!r} is not NAME:PRICE/h", param="gpu") from None
    return prices


def production_trace(costs: CostModel, kinds: Sequence[str], *, seconds: float = 300.0, seed: int = 0) -> tuple[SimRequest, ...]:
    """Poisson arrivals by the published statistics; services are exponential, their lengths what a device alone makes in that time."""
    num_models, rate, service_s = PRODUCTION
    rng = random.Random(f"production {seed}")
    found: list[SimRequest] = []
    at_s = 0.0
    while (at_s := at_s + rng.expovariate(num_models * rate)) < seconds:
        number = rng.randrange(num_models)
        kind = kinds[number % len(kinds)]
        input_len = max(1, min(3072, round(rng.lognormvariate(6.2, 0.8))))
        left_us = rng.expovariate(1 / service_s) * SECOND - costs.prefill_us(kind, [input_len])
        output_len = max(1, round(left_us / costs.decode_us(kind, 1, input_len + 500)))
        found.append(
            SimRequest(
                request_id=len(found),
                arrival_us=round(at_s * SECOND),
                model=f"model-{number:03d}",
                kind=kind,
                input_len=input_len,
                output_len=output_len,
            )
        )
    return tuple(found)


def plan(
    strategy: str,
    requests: Sequence[SimRequest],
    spec: ClusterSpec,
    targets: Targets,
    goal: Goal,
    *,
    price_per_h: float,
    max_devices: int,
    gpus: int = 1,
    on_size: Callable[[str, int], None] | None = None,
) -> Answer:
    """The fewest devices for one strategy, by instances of so many. A dedicated one needs an instance a model, whatever the goal."""
    costs = spec.cost_model(gpus)
    tried: dict[int, Result] = {}

    def is_met(num_devices: int) -> bool:
        if on_size is not None:
            on_size(strategy, num_devices * gpus)
        tried[num_devices] = run_policy(STRATEGIES[strategy], requests, costs, targets, spec.pool(num_devices, gpus))
        return goal.is_met(tried[num_devices])

    num_models = len({request.model for request in requests})
    if strategy == "dedicated":
        size, met = num_models, is_met(num_models)
    else:
        most = max(1, max_devices // gpus)
        size, met = _fewest(is_met, min(most, num_models), most)
    return Answer(
        strategy=strategy,
        device=spec.device,
        num_devices=size * gpus,
        gpus=gpus,
        price_per_h=price_per_h,
        result=tried[size],
        is_met=met,
        seconds=max(request.arrival_us for request in requests) / SECOND,
    )


def _fewest(is_met: Callable[[int], bool], start: int, most: int) -> tuple[int, bool]:
    """The least size at which it holds, if it goes on holding; else the largest tried, and False.

    Sizes far too small are not tried: an overloaded pool takes longest to simulate.
    """
    low, high = 0, start
    if is_met(start):
        while high > 1 and is_met(high // 2):
            high //= 2
        low = high // 2
    else:
        while not is_met(high := min(2 * high, most)):
            if high >= most:
                return high, False
        low = max(start, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high, True
