"""Tokens on time, by three measures."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.sim.outcome import Progress, Targets, attainment
from polymux.disagg.sim.workload import SimRequest

TARGETS = Targets(ttft_us=1000, tpot_us=100)


def progress(*tokens_us: int, output_len: int | None = None, arrival_us: int = 0) -> Progress:
    request = SimRequest(
        request_id=0,
        arrival_us=arrival_us,
        model="a",
        kind="k",
        input_len=1,
        output_len=len(tokens_us) if output_len is None else output_len,
    )
    one = Progress(request, TARGETS)
    for at_us in tokens_us:
        one.token(at_us)
    return one


def published_qos(tokens_us: list[int]) -> float:
    """The metric as its authors compute it, over the gaps."""
    gaps = [after - before for before, after in zip([0, *tokens_us], tokens_us, strict=False)]
    qos = start = accum = total = 0
    target = TARGETS.ttft_us
    for gap in gaps:
        total += gap
        if total - start <= target:
            accum = target
        else:
            qos += accum
            start, accum = total, 0
        target += TARGETS.tpot_us
    return (qos + min(target, total - start)) / total


def test_tokens_at_their_deadlines_are_on_time() -> None:
    one = progress(1000, 1100, 1200, arrival_us=0)
    assert (one.num_on_time, one.is_attained, one.qos) == (3, True, 1.0)


def test_a_late_token_costs_its_request_but_not_the_tokens_after_it() -> None:
    one = progress(1001, 1100, 1250)
    assert (one.num_on_time, one.is_attained) == (1, False)
    assert one.qos == pytest.approx((1250 - 1001) / 1250)  # the wait for the late first one counts for nothing


def test_a_request_without_tokens_has_no_share_and_its_tokens_are_due_all_the_same() -> None:
    failed = progress(output_len=3)
    failed.has_failed = True
    found = attainment([failed, progress(500)])
    assert (found.qos, found.tok, found.req, found.num_failed) == (0.5, 0.25, 0.5, 1)


def test_ttft_and_tpot_are_of_the_request() -> None:
    one = progress(500, 600, 800, arrival_us=100)
    assert (one.ttft_us, one.tpot_us) == (400, 150.0)
    assert progress(500).tpot_us is None


times = (
    st.sampled_from((TARGETS.tpot_us, 4 * TARGETS.tpot_us))
    .flatmap(lambda most: st.lists(st.integers(1, most), min_size=1, max_size=60))
    .map(lambda gaps: list(accumulate(gaps)))
)


@given(times, st.integers(0, 1500))
def test_the_published_metric_is_computed_as_published(tokens_us: list[int], wait_us: int) -> None:
    tokens_us = [wait_us + at_us for at_us in tokens_us]
    assert progress(*tokens_us).qos == pytest.approx(published_qos(tokens_us), abs=1e-12)


@given(times, st.integers(0, 5000), st.integers(0, 60))
def test_many_tokens_at_once_are_the_same_as_one_by_one(tokens_us: list[int], wait_us: int, first: int) -> None:
    tokens_us = [wait_us + at_us for at_us in tokens_us]
    one_by_one = progress(*tokens_us)
    at_once = progress(*tokens_us[:first], output_len=len(tokens_us))
    rest = tokens_us[first:]
    at_once.tokens(rest, max((b - a for a, b in pairwise(rest)), default=0))
    for name in Progress.__slots__:
        if name not in ("request", "targets"):
            assert getattr(at_once, name) == getattr(one_by_one, name), name
