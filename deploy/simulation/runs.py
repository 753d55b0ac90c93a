"""One policy over one list of requests: its figures, and what pictures need."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.loop import Journal
from polymux.disagg.sim.outcome import Attainment, Progress, Targets, attainment
from polymux.disagg.sim.policies import Pool, simulation
from polymux.disagg.sim.traffic import LinksUse
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.errors import ConfigError

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    policy: str
    attainment: Attainment
    ttft_s: tuple[float, ...]  # sorted, of requests with a token
    tpot_s: tuple[float, ...]  # sorted, of requests with two
    num_tokens: int
    ended_s: float  # the last token, on the simulation's clock
    wall_s: float  # that the simulation took
    num_events: int
    journal: Journal | None = None
    links: LinksUse | None = None  # None: copies went over links of their own

    @property
    def goodput_per_s(self) -> float:
        """Requests with every token on time, a second of the simulation's clock."""
        return self.attainment.req * self.attainment.num_requests / self.ended_s if self.ended_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Shares in percent, times in seconds."""
        found = self.attainment
        shares = {
            "qos": percent(found.qos),
            "tok": percent(found.tok),
            "req": percent(found.req),
            "failed": found.num_failed,
            "goodput_per_s": round(self.goodput_per_s, 4),
            "ttft_s": _named(self.ttft_s, 4),
            "tpot_s": _named(self.tpot_s, 6),
        }
        return shares if self.links is None else shares | {"links": self.links.to_dict()}


def run_policy(
    policy: str,
    requests: Sequence[SimRequest],
    costs: CostModel,
    targets: Targets,
    pool: Pool,
    *,
    journal: Journal | None = None,
    on_arrival: Callable[[int], None] | None = None,
) -> Result:
    """Raises ConfigError for no requests, and for an unknown policy."""
    if not requests:
        raise ConfigError("the trace has no requests")
    world = simulation(policy, costs, targets, pool, journal)
    began_s = time.perf_counter()
    served = world.run(requests, on_arrival=on_arrival)
    wall_s = time.perf_counter() - began_s
    links = None if world.traffic is None else world.traffic.use(max(one.last_us for one in served))
    return _result(policy, served, wall_s, world.num_events, journal, links)


def _result(
    policy: str, served: Sequence[Progress], wall_s: float, num_events: int, journal: Journal | None, links: LinksUse | None
) -> Result:
    return Result(
        policy=policy,
        attainment=attainment(served),
        ttft_s=tuple(sorted(one.ttft_us / SECOND for one in served if one.ttft_us is not None)),
        tpot_s=tuple(sorted(one.tpot_us / SECOND for one in served if one.tpot_us is not None)),
        num_tokens=sum(one.num_tokens for one in served),
        ended_s=max(one.last_us for one in served) / SECOND,
        wall_s=wall_s,
        num_events=num_events,
        journal=journal,
        links=links,
    )


def percent(share: float) -> float:
    return round(100 * share, 4)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values, the least that this share of them does not exceed; 0 when there are none."""
    return ordered[min(len(ordered) - 1, max(0, -(-round(share * 10_000) * len(ordered) // 10_000) - 1))] if ordered else 0.0


def _named(ordered: Sequence[float], digits: int) -> dict[str, float]:
    return {f"p{round(100 * share)}": round(quantile(ordered, share), digits) for share in QUANTILES}
