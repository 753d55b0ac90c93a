"""What became of each request: tokens on time by the three measures that are reported side by side.

- `qos`: the artifact's metric (Aegaeon, SOSP '25): the share of a request's time within target, averaged over requests. A miss restarts the
  clock at the late token with all the slack collected so far, so a request is never lost for good.
- `tok`: share of all tokens due that came by arrival + TTFT + i * TPOT.
- `req`: share of requests with every token on time.

A request that failed counts 0 in `qos`, misses its missing tokens in `tok` and misses `req`.
"""

from __future__ import annotations

from bisect import bisect_left
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

    def tokens(self, ends_us: Sequence[int], max_gap_us: int) -> None:
        """One more token at each of these times, in order, no two further apart than `max_gap_us`: the same as `token` for each.

        While tokens come at least as fast as they are due, lateness only falls: one on time means that all after it are.
        """
        tpot_us, count = self.targets.tpot_us, len(ends_us)
        if count < 3 or max_gap_us > tpot_us:
            for at_us in ends_us:
                self.token(at_us)
            return
        elapsed_us = ends_us[0] - self.request.arrival_us
        if self.first_us is None:
            self.first_us = ends_us[0]
        first_due_us = self.request.arrival_us + self.targets.due_us(self.num_tokens)
        num_late = 0
        if ends_us[0] > first_due_us:
            num_late = bisect_left(range(count), True, key=lambda i: ends_us[i] <= first_due_us + i * tpot_us)
        self.num_on_time += count - num_late
        self.num_tokens += count
        self.last_us = ends_us[-1]
        if elapsed_us - self._start > self._target:
            self._good += self._accum
            self._start = elapsed_us
        self._target += count * tpot_us
        self._accum = self._target - tpot_us

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
    def num_left(self) -> int:
        """Tokens that it still lacks. Only the simulation itself may ask; no policy knows."""
        return self.request.output_len - self.num_tokens

    @property
    def context_len(self) -> int:
        return self.request.input_len + self.num_tokens

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
