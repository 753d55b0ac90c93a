"""What on time means: deadlines of tokens, SLO attainment and goodput. One definition for benches, the simulator and the live system.

Token i of a request (from 0) is due `ttft_s + i * tpot_s` after its arrival; a token that comes early leaves its time to those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Seconds to the first token, and per output token after it."""

    ttft_s: float
    tpot_s: float

    def due_s(self, index: int) -> float:
        """When token `index` is due, seconds after arrival."""
        return self.ttft_s + index * self.tpot_s

    def slack_s(self, num_delivered: int, elapsed_s: float) -> float:
        """Seconds until the next token is due, `elapsed_s` after arrival; negative when it is late."""
        return self.due_s(num_delivered) - elapsed_s

    def is_met(self, ttft_s: float | None, tpot_s: float | None) -> bool:
        """By the two means that a request's end reports; no first token is a miss, a single token has no TPOT to miss."""
        return ttft_s is not None and ttft_s <= self.ttft_s and (tpot_s is None or tpot_s <= self.tpot_s)


CLASSES = {"interactive": SLO(ttft_s=10.0, tpot_s=0.1), "batch": SLO(ttft_s=600.0, tpot_s=1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request's end. `token_times_s` are since its arrival, in order; `num_due` is how many tokens it should have made.

    A failed, refused or dropped request has fewer tokens than due; those missing are late, never left out of a mean.
    """

    slo: SLO
    token_times_s: tuple[float, ...]
    num_due: int

    @property
    def num_on_time(self) -> int:
        return sum(time_s <= self.slo.due_s(i) for i, time_s in enumerate(self.token_times_s[: self.num_due]))

    @property
    def is_attained(self) -> bool:
        return self.num_on_time == self.num_due


def token_attainment(outcomes: Sequence[Outcome]) -> float:
    """Share of all tokens due that came on time; 1 when none was due."""
    num_due = sum(outcome.num_due for outcome in outcomes)
    return sum(outcome.num_on_time for outcome in outcomes) / num_due if num_due else 1.0


def request_attainment(outcomes: Sequence[Outcome]) -> float:
    """Share of requests with every token on time; 1 when there was none."""
    return sum(outcome.is_attained for outcome in outcomes) / len(outcomes) if outcomes else 1.0


def goodput_per_s(outcomes: Sequence[Outcome], duration_s: float) -> float:
    """Requests a second with every token on time."""
    return sum(outcome.is_attained for outcome in outcomes) / duration_s if duration_s > 0 else 0.0
