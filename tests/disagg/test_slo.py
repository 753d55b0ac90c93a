"""Deadlines of tokens, attainment and goodput."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.slo import SLO, Outcome, goodput_per_s, request_attainment, token_attainment

EXACT = SLO(ttft_s=2.0, tpot_s=0.5)


def outcome(*times_s: float, num_due: int | None = None) -> Outcome:
    return Outcome(slo=EXACT, token_times_s=times_s, num_due=len(times_s) if num_due is None else num_due)


def test_a_token_is_due_one_tpot_after_the_one_before_and_not_after_when_that_one_came() -> None:
    assert [EXACT.due_s(i) for i in range(3)] == [2.0, 2.5, 3.0]
    assert outcome(0.1, 2.5, 3.0).is_attained  # the early first token leaves its time to the second
    assert not outcome(0.1, 2.6, 3.0).is_attained


def test_slack_is_what_is_left_until_the_next_token_is_due() -> None:
    assert EXACT.slack_s(num_delivered=2, elapsed_s=1.0) == 2.0
    assert EXACT.slack_s(num_delivered=0, elapsed_s=3.0) == -1.0


def test_a_failed_request_is_a_miss_with_all_its_missing_tokens_late() -> None:
    failed = outcome(1.0, num_due=4)
    assert not failed.is_attained
    assert token_attainment([failed, outcome(1.0, 2.0, 2.5, 3.0)]) == 5 / 8
    assert request_attainment([failed, outcome(1.0)]) == 0.5


def test_tokens_beyond_those_due_earn_nothing() -> None:
    assert token_attainment([outcome(0.1, 0.2, 0.3, num_due=1), outcome(num_due=1)]) == 0.5


def test_a_refused_request_counts_against_both_shares() -> None:
    refused = outcome(num_due=10)
    assert token_attainment([refused]) == 0.0
    assert request_attainment([refused]) == 0.0


def test_goodput_counts_only_requests_with_every_token_on_time() -> None:
    assert goodput_per_s([outcome(1.0), outcome(1.0, 9.0), outcome(2.0, 2.5)], duration_s=4.0) == 0.5


def test_an_idle_system_misses_nothing() -> None:
    assert token_attainment([]) == request_attainment([]) == 1.0
    assert goodput_per_s([], duration_s=1.0) == 0.0


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "met"), [(2.0, 0.5, True), (2.1, 0.5, False), (2.0, 0.6, False), (1.0, None, True), (None, None, False)]
)
def test_the_two_means_of_a_finished_request_decide_whether_it_met_its_slo(ttft_s: float | None, tpot_s: float | None, met: bool) -> None:
    assert EXACT.is_met(ttft_s, tpot_s) is met


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0, 5))
def test_a_token_that_comes_later_never_raises_attainment(times_s: list[float], delay_s: float) -> None:
    late = Outcome(slo=EXACT, token_times_s=tuple(t + delay_s for t in times_s), num_due=len(times_s))
    assert late.num_on_time <= outcome(*times_s).num_on_time
