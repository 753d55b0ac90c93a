"""The door: what can never fit is a client's error, what does not fit now is told when to come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.admission import MAX_RETRY_S, MIN_RETRY_S, AdmissionLimits, Verdict, decide, max_kv_tokens
from polymux.disagg.views import DoorView
from polymux.transport.errors import ConfigError, ContextLengthExceeded, ModelLoading, Overloaded
from polymux.transport.messages import KVLayout

DOOR = DoorView(
    num_queued=0,
    num_queued_tokens=0,
    num_inflight=0,
    num_sequences=1,
    num_prompt_tokens=100,
    num_total_tokens=200,
    max_model_len=2048,
    max_kv_tokens=4096,
    deadline_s=60.0,
    ttft_slo_s=2.0,
    is_idle=True,
    ttft_s=0.1,
    switch_s=0.0,
)
BUSY = replace(DOOR, is_idle=False, num_queued=4, num_queued_tokens=400, num_inflight=4, ttft_s=1.0)
LIMITS = AdmissionLimits(max_queued_requests=8, max_queued_tokens=1000, max_inflight_requests=16, ttft_refusal_factor=4.0)


def test_an_idle_pool_accepts_and_a_busy_one_lets_queue() -> None:
    assert decide(DOOR, LIMITS).verdict is Verdict.ACCEPT
    assert decide(BUSY, LIMITS).verdict is Verdict.QUEUE


def test_an_idle_pool_accepts_whatever_its_costs_predict() -> None:
    """A guess that is far too high would otherwise refuse everything, and nothing would ever correct it."""
    assert decide(replace(DOOR, ttft_s=1e6, switch_s=1e6), LIMITS).verdict is Verdict.ACCEPT


def test_memory_that_is_full_refuses_only_while_others_wait_for_it() -> None:
    full = replace(BUSY, kv_bytes=101, free_kv_bytes=100)
    assert decide(replace(full, num_queued=0, num_queued_tokens=0), LIMITS).verdict is Verdict.QUEUE
    assert decide(replace(full, free_kv_bytes=None), LIMITS).verdict is Verdict.QUEUE
    assert decide(replace(full, free_kv_bytes=101), LIMITS).verdict is Verdict.QUEUE
    assert decide(full, LIMITS).verdict is Verdict.REFUSE


@pytest.mark.parametrize(("max_model_len", "max_kv_tokens"), [(199, 4096), (2048, 199)])
def test_what_can_never_fit_is_the_clients_error_and_says_the_limit(max_model_len: int, max_kv_tokens: int) -> None:
    error = decide(replace(DOOR, max_model_len=max_model_len, max_kv_tokens=max_kv_tokens), LIMITS).error
    assert isinstance(error, ContextLengthExceeded)
    assert error.status == 400
    assert "199 tokens" in error.message
    assert error.param == "max_tokens"


def test_a_prompt_that_is_too_long_by_itself_is_named_as_such() -> None:
    error = decide(replace(DOOR, num_prompt_tokens=3000, num_total_tokens=3001), LIMITS).error
    assert error is not None
    assert error.param == "prompt"


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"num_queued": 8}, "max_queued_requests=8"),
        ({"num_queued_tokens": 901}, "max_queued_tokens=1000"),
        ({"num_inflight": 16}, "max_inflight_requests=16"),
        ({"num_sequences": 5}, "max_queued_requests=8"),
        ({"kv_bytes": 101, "free_kv_bytes": 100}, "neither arena nor host tier"),
    ],
)
def test_a_full_queue_refuses_naming_the_limit(change: dict[str, int], limit: str) -> None:
    error = decide(replace(BUSY, **change), LIMITS).error  # type: ignore[arg-type]
    assert isinstance(error, Overloaded)
    assert limit in error.message
    assert error.status == 503
    assert error.retry_after_s is not None


def test_an_empty_queue_takes_one_request_of_any_size() -> None:
    assert decide(replace(DOOR, num_sequences=50), LIMITS).verdict is Verdict.ACCEPT


def test_a_first_token_that_would_come_too_late_is_refused_with_the_seconds_to_wait() -> None:
    error = decide(replace(BUSY, ttft_s=20.0), LIMITS).error
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == pytest.approx(12.0)


def test_the_deadline_counts_where_it_is_shorter_than_the_slo_allows() -> None:
    assert decide(replace(BUSY, ttft_s=3.0, deadline_s=2.5), LIMITS).verdict is Verdict.REFUSE


def test_without_a_factor_only_the_deadline_refuses() -> None:
    limits = replace(LIMITS, ttft_refusal_factor=None)
    assert decide(replace(BUSY, ttft_s=50.0), limits).verdict is Verdict.QUEUE
    assert decide(replace(BUSY, ttft_s=61.0), limits).verdict is Verdict.REFUSE


def test_a_wait_that_is_the_models_loading_is_named_so() -> None:
    error = decide(replace(BUSY, ttft_s=20.0, switch_s=15.0), LIMITS).error
    assert isinstance(error, ModelLoading)


@settings(deadline=None)
@given(
    st.builds(
        DoorView,
        num_queued=st.integers(0, 20),
        num_queued_tokens=st.integers(0, 2000),
        num_inflight=st.integers(0, 20),
        num_sequences=st.integers(1, 8),
        num_prompt_tokens=st.integers(1, 3000),
        num_total_tokens=st.integers(3001, 5000),
        max_model_len=st.integers(1, 6000),
        max_kv_tokens=st.integers(0, 6000),
        deadline_s=st.floats(0.01, 100),
        ttft_slo_s=st.floats(0.01, 100),
        is_idle=st.booleans(),
        ttft_s=st.floats(0, 1000),
        switch_s=st.floats(0, 1000),
    )
)
def test_a_refusal_has_an_error_and_a_retry_only_where_a_retry_may_help(door: DoorView) -> None:
    admission = decide(door, LIMITS)
    assert (admission.error is None) == (admission.verdict is not Verdict.REFUSE)
    if admission.error is not None:
        assert admission.error.retryable == (admission.error.retry_after_s is not None)
        if admission.error.retry_after_s is not None:
            assert MIN_RETRY_S <= admission.error.retry_after_s <= MAX_RETRY_S


def test_capacity_is_what_the_weights_leave_in_whole_blocks() -> None:
    kv = KVLayout(num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16")
    assert max_kv_tokens(kv.block_bytes * 33 - 1, 0, kv) == 32 * 16
    assert max_kv_tokens(1 << 20, 1 << 20, kv) == 0
    assert max_kv_tokens(1 << 20, 1 << 30, kv) == 0


@pytest.mark.parametrize("setting", [{"max_queued_requests": 0}, {"max_inflight_requests": -1}, {"ttft_refusal_factor": 0.0}])
def test_a_limit_that_would_refuse_everything_is_refused_itself(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        AdmissionLimits(**setting)  # type: ignore[arg-type]
