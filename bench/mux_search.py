"""What one run came to, and the search for the largest rate at which 90% of the tokens are on time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mux_driver import Served

from polymux.disagg.slo import SLO, goodput_per_s, request_attainment, token_attainment

TARGET = 0.9
WIDEN = 1.6  # factor between rates until the target is bracketed


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of the measured requests of one run. Times in seconds; counters are the workers' over the whole run."""

    rate_per_s: float
    num_requests: int
    token_attainment: float
    request_attainment: float
    goodput_per_s: float
    tokens_per_s: float
    num_failed: int  # refused, failed or given up
    ttft_s: tuple[float, float, float]  # p50, p90, p99; infinite where no first token came
    tpot_s: tuple[float, float, float]
    counters: Mapping[str, float]


def figures(served: Sequence[Served], slo: SLO, rate: float, begin_s: float, end_s: float, counters: Mapping[str, float]) -> Figures:
    """Of requests that arrived in [begin, end): what came before warms up, what comes after keeps the load up."""
    counted = [one for one in served if begin_s <= one.ask.at_s < end_s]
    outcomes = [one.outcome(slo) for one in counted]
    gaps = [(t[-1] - t[0]) / (len(t) - 1) for one in counted if len(t := one.token_times_s) > 1]
    return Figures(
        rate_per_s=rate,
        num_requests=len(counted),
        token_attainment=token_attainment(outcomes),
        request_attainment=request_attainment(outcomes),
        goodput_per_s=goodput_per_s(outcomes, end_s - begin_s),
        tokens_per_s=sum(len(one.token_times_s) for one in counted) / (end_s - begin_s),
        num_failed=sum(len(one.token_times_s) < one.ask.num_output_tokens for one in counted),
        ttft_s=percentiles([one.token_times_s[0] if one.token_times_s else math.inf for one in counted]),
        tpot_s=percentiles(gaps),
        counters=counters,
    )


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p50, p90 and p99; infinite when there is nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.inf, math.inf, math.inf
    p50, p90, p99 = (ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9, 0.99))
    return p50, p90, p99


@dataclass
class Search:
    """Probes of one policy on one trace and seed: widened until the target lies between two rates, then halved between them."""

    start_per_s: float
    target: float = TARGET
    probes: list[Figures] = field(default_factory=list)

    @property
    def next_rate(self) -> float:
        low, high = self._bracket()
        if low is None and high is None:
            return self.start_per_s
        if low is None:
            assert high is not None
            return high.rate_per_s / WIDEN
        if high is None:
            return low.rate_per_s * WIDEN
        return math.sqrt(low.rate_per_s * high.rate_per_s)

    @property
    def estimate(self) -> float:
        """The rate at the target, between the two nearest probes by the logarithm of the rate; 0 when no probe reached the target.

        When every probe reached it, the highest rate tried: a lower bound.
        """
        low, high = self._bracket()
        if low is None:
            return 0.0
        if high is None:
            return low.rate_per_s
        share = (low.token_attainment - self.target) / max(low.token_attainment - high.token_attainment, 1e-9)
        return low.rate_per_s * (high.rate_per_s / low.rate_per_s) ** share

    @property
    def is_bracketed(self) -> bool:
        return None not in self._bracket()

    def _bracket(self) -> tuple[Figures | None, Figures | None]:
        """The highest rate that reached the target, and the lowest above it that did not."""
        reached = [probe for probe in self.probes if probe.token_attainment >= self.target]
        low = max(reached, key=lambda probe: probe.rate_per_s, default=None)
        floor = low.rate_per_s if low else 0.0
        missed = [probe for probe in self.probes if probe.token_attainment < self.target and probe.rate_per_s > floor]
        return low, min(missed, key=lambda probe: probe.rate_per_s, default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """0 when any is 0 or there is none."""
    return math.exp(statistics.fmean(math.log(v) for v in values)) if values and min(values) > 0 else 0.0
