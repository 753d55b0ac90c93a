"""What became of each request: tokens on time by the three measures that are reported side by side.

- `qos`: the artifact's metric (Aegaeon, SOSP '25): the share of a request's time within target, averaged over requests. A miss restarts the
  clock at the late token with all the slack collected so far, so a request is never lost for good.
- `tok`: share of all tokens due that came by arrival + TTFT + i * TPOT.
- `req`: share of requests with every token on time.

A request that failed counts 0 in `qos`, misses its missing tokens in `tok` and misses `req`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polymux.disagg.sim.workload import SimRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    ttft_us: int
    tpot_us: int

    def due_us(self, index: int) -> int:
        """When token `index` is due, after arrival."""
        return self.ttft_us + index * self.tpot_us


class Progress:
    """One request's tokens as they come, without keeping their times."""

    __slots__ = (
        "_accum",
        "_good",
        "_start",
        "_target",
        "first_us",
        "has_failed",
        "last_us",
        "num_on_time",
        "num_tokens",
        "request",
        "targets",
    )

    def __init__(self, request: SimRequest, targets: Targets) -> None:
        self.request = request
        self.targets = targets
        self.num_tokens = self.num_on_time = 0
        self.first_us: int | None = None
        self.last_us = request.arrival_us
        self.has_failed = False
        self._good = self._start = self._accum = 0
        self._target = targets.ttft_us

    def token(self, at_us: int) -> None:
        """One more token, at that time."""
        elapsed_us = at_us - self.request.arrival_us
        if self.first_us is None:
            self.first_us = at_us
        self.num_on_time += elapsed_us <= self.targets.due_us(self.num_tokens)
        self.num_tokens += 1
        self.last_us = at_us
        if elapsed_us - self._start <= self._target:
            self._accum = self._target
        else:
            self._good += self._accum
            self._start, self._accum = elapsed_us, 0
        self._target += self.targets.tpot_us

    @property
    def is_done(self) -> bool:
        return self.num_tokens >= self.request.output_len

    @property
    def is_attained(self) -> bool:
        return self.num_on_time == self.request.output_len

    @property
    def qos(self) -> float:
        if not self.num_tokens or self.has_failed:
            return 0.0
        total_us = self.last_us - self.request.arrival_us
        return (self._good + min(self._target, total_us - self._start)) / total_us if total_us else 1.0

    @property
    def ttft_us(self) -> int | None:
        return None if self.first_us is None else self.first_us - self.request.arrival_us

    @property
    def tpot_us(self) -> float | None:
        """Mean over the tokens after the first; None for fewer than two."""
        if self.first_us is None or self.num_tokens < 2:
            return None
        return (self.last_us - self.first_us) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Shares in [0, 1]."""

    qos: float
    tok: float
    req: float
    num_requests: int
    num_failed: int


def attainment(requests: Sequence[Progress]) -> Attainment:
    """Raises ValueError for no requests at all."""
    num_due = sum(one.request.output_len for one in requests)
    return Attainment(
        qos=sum(one.qos for one in requests) / len(requests),
        tok=sum(one.num_on_time for one in requests) / num_due,
        req=sum(one.is_attained for one in requests) / len(requests),
        num_requests=len(requests),
        num_failed=sum(one.has_failed for one in requests),
    )
