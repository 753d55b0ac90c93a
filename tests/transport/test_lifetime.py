"""Latencies as differences of events."""

from __future__ import annotations

import pytest

from polymux.transport.lifetime import Lifetime, RequestEvent


def finished() -> Lifetime:
    life = Lifetime()
    life.mark(RequestEvent.ARRIVED, 10.0)
    life.mark(RequestEvent.ADMITTED, 10.1)
    life.mark(RequestEvent.PREFILL_STARTED, 10.5)
    life.tokens(1, 11.0)
    life.mark(RequestEvent.DECODE_STARTED, 11.25)
    life.tokens(1, 11.5)
    life.tokens(3, 13.0)
    life.mark(RequestEvent.FINISHED, 13.5)
    return life


def test_every_latency_is_a_difference_of_two_events() -> None:
    life = finished()
    assert life.ttft_s == pytest.approx(1.0)
    assert life.tpot_s == pytest.approx(2.0 / 4)
    assert life.queue_s == pytest.approx(0.5)
    assert life.prefill_s == pytest.approx(0.5)
    assert life.handover_s == pytest.approx(0.25)
    assert life.decode_s == pytest.approx(1.75)
    assert life.e2e_s == pytest.approx(3.5)


def test_what_has_not_happened_has_no_latency() -> None:
    life = Lifetime()
    life.mark(RequestEvent.ARRIVED, 1.0)
    assert [life.ttft_s, life.tpot_s, life.e2e_s] == [None, None, None]
    life.tokens(1, 2.0)
    assert life.ttft_s == 1.0
    assert life.tpot_s is None


def test_a_request_ends_once_and_nothing_counts_after_it() -> None:
    life = finished()
    assert not life.mark(RequestEvent.CANCELLED, 14.0)
    life.tokens(5, 14.0)
    assert (life.outcome, life.num_output_tokens, life.e2e_s) == (RequestEvent.FINISHED, 5, 3.5)


def test_a_replay_does_not_move_the_first_start() -> None:
    life = Lifetime()
    life.mark(RequestEvent.ARRIVED, 0.0)
    assert life.mark(RequestEvent.PREFILL_STARTED, 1.0)
    assert not life.mark(RequestEvent.PREFILL_STARTED, 5.0)
    assert life.queue_s == 1.0
