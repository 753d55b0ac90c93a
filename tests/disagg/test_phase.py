"""Prefill or decode: what can be on time is, and neither waits for ever."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.phase import MAX_PASSED_OVER, Phase, next_phase
from polymux.disagg.views import PhaseView, WorkView


def work(due_in_s: float, *, step_s: float = 0.01, switch_s: float = 0.0, num_tokens: int = 1, num_passed_over: int = 0) -> WorkView:
    return WorkView(due_at_s=due_in_s, step_s=step_s, switch_s=switch_s, num_tokens=num_tokens, num_passed_over=num_passed_over)


def choose(prefill: WorkView | None, decode: WorkView | None) -> Phase:
    return next_phase(PhaseView(now_s=0.0, prefill=prefill, decode=decode))


def test_the_only_kind_of_work_is_done_and_no_work_is_an_error() -> None:
    assert choose(work(1.0), None) is Phase.PREFILL
    assert choose(None, work(1.0)) is Phase.DECODE
    with pytest.raises(ValueError, match="neither"):
        choose(None, None)


def test_a_prefill_goes_first_while_the_batch_can_spare_its_time() -> None:
    assert choose(work(5.0, step_s=0.2), work(0.3)) is Phase.PREFILL


def test_a_batch_without_credit_goes_before_a_prompt_that_has_time() -> None:
    assert choose(work(5.0, step_s=0.2), work(0.1)) is Phase.DECODE


def test_a_late_batch_goes_before_a_prompt_that_has_time_and_not_before_one_that_has_not() -> None:
    assert choose(work(5.0, step_s=0.2), work(inf)) is Phase.DECODE
    assert choose(work(0.02, step_s=0.015), work(inf)) is Phase.PREFILL


def test_a_switch_counts_as_time_that_the_batch_must_spare() -> None:
    assert choose(work(5.0, step_s=0.05, switch_s=1.0), work(0.3)) is Phase.DECODE


def test_where_only_one_can_be_on_time_the_one_that_makes_more_tokens_a_second_is() -> None:
    assert choose(work(0.2, step_s=0.15), work(0.02, num_tokens=16)) is Phase.DECODE
    assert choose(work(0.06, step_s=0.05), work(0.05, step_s=0.03, num_tokens=1)) is Phase.DECODE


@given(st.integers(MAX_PASSED_OVER, 100), st.floats(-10, 10), st.floats(-10, 10))
def test_neither_kind_is_passed_over_for_more_than_the_bound(count: int, prefill_due_s: float, decode_due_s: float) -> None:
    assert choose(work(prefill_due_s, num_passed_over=count), work(decode_due_s)) is Phase.PREFILL
    assert choose(work(prefill_due_s), work(decode_due_s, num_passed_over=count)) is Phase.DECODE
