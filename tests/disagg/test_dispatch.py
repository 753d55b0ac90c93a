"""Where a sequence goes, counted in seconds."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.dispatch import DecodeChoice, PrefillChoice, choose_decode, choose_prefill, num_cached_tokens
from polymux.disagg.views import AskView, DecodeModelView, DecodeWorkerView, PrefillWorkerView
from polymux.transport.units import ModelName, WorkerId

A, B = ModelName("a"), ModelName("b")
ASK = AskView(model=A, num_prompt_tokens=100, num_output_tokens=50, tpot_slo_s=0.1, kv_bytes=1000, weight_bytes=10**9)


def prefill(
    worker_id: str,
    *,
    busy_s: float = 0.0,
    waiting: dict[ModelName, int] | None = None,
    resident: tuple[ModelName, ...] = (),
    per_token_s: float = 1e-3,
    cached: tuple[int, ...] = (),
) -> PrefillWorkerView:
    return PrefillWorkerView(
        worker_id=WorkerId(worker_id),
        busy_until_s=100.0 + busy_s,
        waiting=waiting or {},
        resident=frozenset(resident),
        costs=dict.fromkeys((A, B), (0.0, per_token_s, 0.0)),
        switch_bytes_per_s=1e9,
        cached=(frozenset(cached),),
    )


def decode(
    worker_id: str,
    *,
    running: dict[ModelName, int] | None = None,
    resident: tuple[ModelName, ...] = (),
    step_s: float = 0.01,
    free_kv_bytes: int = 10**6,
    max_num_seqs: int = 8,
) -> DecodeWorkerView:
    running = running or {}
    return DecodeWorkerView(
        worker_id=WorkerId(worker_id),
        models={m: DecodeModelView(num_seqs=n, kv_tokens=100 * n, tpot_slo_s=0.1, step_s=step_s) for m, n in running.items()},
        resident=frozenset(resident),
        costs=dict.fromkeys((A, B), (step_s, 0.0, 0.0)),
        load=len(running) * step_s / 0.1,
        round_switch_s=sum(1.0 for m in running if m not in resident),
        min_steps=0.1 / step_s if running else math.inf,
        num_seqs=sum(running.values()),
        free_kv_bytes=free_kv_bytes,
        max_num_seqs=max_num_seqs,
        switch_bytes_per_s=1e9,
    )


def to_prefill(*workers: PrefillWorkerView, ask: AskView = ASK) -> PrefillChoice:
    choice = choose_prefill(ask, workers, now_s=100.0, max_group_size=4)
    assert choice is not None
    return choice


def to_decode(*workers: DecodeWorkerView, ask: AskView = ASK) -> DecodeChoice:
    choice = choose_decode(ask, workers)
    assert choice is not None
    return choice


# ---------------------------------------------------------------- prefill


def test_the_worker_that_would_finish_first_is_chosen_in_seconds_and_not_in_requests() -> None:
    """Ten short prompts are less work than one long one."""
    choice = to_prefill(prefill("p1", busy_s=9.0, waiting={B: 1}, resident=(A,)), prefill("p2", busy_s=2.0, waiting={B: 10}, resident=(A,)))
    assert choice.worker_id == "p2"
    assert choice.finish_s == pytest.approx(2.1)


def test_a_loaded_model_is_preferred_to_an_idle_worker_without_it() -> None:
    assert to_prefill(prefill("p1"), prefill("p2", busy_s=0.5, resident=(A,))).worker_id == "p2"


def test_a_waiting_group_of_the_model_is_joined_without_a_switch() -> None:
    choice = to_prefill(prefill("p1"), prefill("p2", busy_s=1.5, waiting={A: 3}))
    assert (choice.worker_id, choice.joins, choice.switch_s) == ("p2", True, 0.0)


def test_a_full_group_is_not_joined() -> None:
    assert to_prefill(prefill("p1"), prefill("p2", busy_s=1.5, waiting={A: 4}, resident=(A,))).worker_id == "p1"


def test_a_group_far_down_the_line_is_not_waited_for() -> None:
    choice = to_prefill(prefill("p1"), prefill("p2", busy_s=5.0, waiting={A: 1}))
    assert (choice.worker_id, choice.switch_s) == ("p1", 1.0)


def test_a_slower_worker_gets_less() -> None:
    assert to_prefill(prefill("p1", resident=(A,), per_token_s=1e-2), prefill("p2", busy_s=0.5, resident=(A,))).worker_id == "p2"


# ---------------------------------------------------------------- decode


def test_a_models_sequences_gather_where_it_runs_while_the_slo_has_room() -> None:
    assert to_decode(decode("d1"), decode("d2", running={A: 3}, resident=(A,))).worker_id == "d2"


def test_a_batch_is_joined_on_a_busy_worker_since_a_second_one_would_cost_as_much_again() -> None:
    busy = decode("d2", running={A: 3, B: 3}, resident=(A, B), step_s=0.04)
    assert to_decode(decode("d1", resident=(A,), step_s=0.04), busy).worker_id == "d2"


def test_a_worker_that_is_late_is_left_for_an_idle_one_that_has_the_weights() -> None:
    models = {A: 3, **{ModelName(f"m{i}"): 1 for i in range(7)}}
    late = decode("d2", running=models, resident=tuple(models), step_s=0.02)
    assert to_decode(decode("d1", resident=(A,), step_s=0.02), late).worker_id == "d1"


def test_a_batch_that_grows_is_counted_once() -> None:
    choice = to_decode(decode("d1", running={A: 3, B: 1}, resident=(A, B)))
    assert choice.tpot_s == pytest.approx(0.02)


LIGHT = replace(ASK, weight_bytes=10**6)  # a switch of a millisecond


def test_a_full_batch_is_not_joined_where_a_switch_is_shorter_than_the_wait() -> None:
    full = decode("d2", running={A: 8}, resident=(A,))
    assert to_decode(decode("d1"), full, ask=LIGHT).worker_id == "d1"
    assert to_decode(decode("d1"), full, ask=ASK).worker_id == "d2"  # a switch of a second against one of eight ending


def test_a_worker_short_of_kv_is_avoided() -> None:
    short = decode("d2", running={A: 3}, resident=(A,), free_kv_bytes=10)
    assert to_decode(decode("d1"), short, ask=LIGHT).worker_id == "d1"


def test_a_worker_whose_rounds_are_long_already_gets_no_further_model() -> None:
    busy = decode("d1", running={ModelName(f"m{i}"): 1 for i in range(8)}, resident=(A,), step_s=0.02)
    assert to_decode(busy, decode("d2")).worker_id == "d2"


def test_an_idle_worker_with_the_weights_is_preferred_to_one_without() -> None:
    assert to_decode(decode("d1"), decode("d2", resident=(A,))).worker_id == "d2"


def test_the_predicted_gap_of_a_model_alone_is_its_step_and_of_a_shared_worker_the_round() -> None:
    assert to_decode(decode("d1", resident=(A,))).tpot_s == pytest.approx(0.01)
    shared = to_decode(decode("d1", running={B: 1}, resident=(A, B)))
    assert shared.tpot_s == pytest.approx(0.02)
    switching = to_decode(decode("d1", running={B: 1}, resident=(B,)))  # 1 s of switches in rounds of 4 s turns: TPOT * c / (n * QMAX) more
    assert switching.tpot_s == pytest.approx(0.02 + 0.1 * 1.0 / (10 * 4))


def test_an_idle_worker_has_nobody_to_wait_for_whatever_its_free_kv() -> None:
    assert to_decode(decode("d1", free_kv_bytes=0)).wait_s == 0.0


# ---------------------------------------------------------------- both


def test_excluded_workers_are_not_chosen_and_none_is_left_when_all_are() -> None:
    ask = replace(ASK, excluded=frozenset({WorkerId("w1")}))
    assert to_prefill(prefill("w1"), prefill("w2", busy_s=9.0), ask=ask).worker_id == "w2"
    assert to_decode(decode("w1"), decode("w2", running={B: 7}), ask=ask).worker_id == "w2"
    assert choose_prefill(ask, [prefill("w1")], now_s=100.0) is None
    assert choose_decode(ask, [decode("w1")]) is None


workers = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 6), st.booleans(), st.booleans()), min_size=1, max_size=6)


@settings(deadline=None)
@given(workers, st.integers(0, 99))
def test_a_choice_does_not_depend_on_the_order_of_the_workers(rows: list[tuple[float, int, bool, bool]], seed: int) -> None:
    prefills = [
        prefill(f"w{i}", busy_s=busy_s, waiting={A: n} if n else {}, resident=(A,) if resident else ())
        for i, (busy_s, n, resident, _) in enumerate(rows)
    ]
    decodes = [
        decode(f"w{i}", running={model: n for model, n in ((A, n), (B, int(other))) if n}, resident=(A,) if resident else ())
        for i, (_, n, resident, other) in enumerate(rows)
    ]
    rng = random.Random(seed)
    assert to_prefill(*prefills) == to_prefill(*rng.sample(prefills, len(prefills)))
    assert to_decode(*decodes) == to_decode(*rng.sample(decodes, len(decodes)))


@settings(deadline=None)
@given(workers)
def test_no_worker_would_have_finished_the_prompt_a_switch_sooner_than_the_one_chosen(rows: list[tuple[float, int, bool, bool]]) -> None:
    views = [
        prefill(f"w{i}", busy_s=busy_s, waiting={A: n} if n else {}, resident=(A,) if resident else ())
        for i, (busy_s, n, resident, _) in enumerate(rows)
    ]
    chosen = to_prefill(*views)
    for other in (to_prefill(view) for view in views):
        assert chosen.finish_s + chosen.switch_s <= other.finish_s + other.switch_s


def test_a_cached_prefix_is_worth_the_seconds_that_it_saves() -> None:
    ask = replace(ASK, prefix_marks=(1, 2, 3, 4, 5, 6))
    has_it = prefill("p2", resident=(A,), cached=(1, 2, 3), busy_s=0.04)
    chosen = choose_prefill(ask, [prefill("p1", resident=(A,)), has_it], now_s=100.0)
    assert chosen is not None and chosen.worker_id == "p2"
    assert chosen.prefill_s == pytest.approx(0.052) and chosen.finish_s == pytest.approx(0.092)
    later = choose_prefill(ask, [prefill("p1", resident=(A,)), replace(has_it, busy_until_s=100.05)], now_s=100.0)
    assert later is not None and later.worker_id == "p1"


def test_a_gap_ends_a_prefix_and_one_token_is_always_computed() -> None:
    worker = prefill("p1", cached=(1, 2, 4))
    assert num_cached_tokens(replace(ASK, prefix_marks=(1, 2, 3, 4)), worker) == 32
    assert num_cached_tokens(replace(ASK, prefix_marks=(3, 1, 2)), worker) == 0
    assert num_cached_tokens(replace(ASK, prefix_marks=(1, 2), num_prompt_tokens=32), worker) == 16
    assert num_cached_tokens(ASK, worker) == 0


@given(
    marks=st.lists(st.integers(0, 9), max_size=12),
    cached=st.lists(st.integers(0, 9), max_size=8),
    num_tokens=st.integers(1, 200),
    square=st.floats(0, 1e-5),
)
def test_a_prefix_never_makes_a_prompt_dearer_nor_free(marks: list[int], cached: list[int], num_tokens: int, square: float) -> None:
    ask = replace(ASK, prefix_marks=tuple(marks), num_prompt_tokens=num_tokens)
    costs = {A: (0.001, 1e-3, square)}
    cold, warm = (
        choose_prefill(ask, [replace(prefill("p", resident=(A,), cached=tuple(have)), costs=costs)], now_s=100.0) for have in ([], cached)
    )
    assert cold is not None and warm is not None
    assert 0.002 - 1e-9 <= warm.prefill_s <= cold.prefill_s + 1e-12


def test_a_near_worker_is_preferred_by_the_seconds_of_its_handover() -> None:
    far_first = {WorkerId("p0"): 0.05, WorkerId("p1"): 0.001}
    both = [prefill("p0", resident=(A,)), prefill("p1", resident=(A,))]
    chosen = choose_prefill(ASK, both, now_s=100.0, handover_s=far_first)
    assert chosen is not None and chosen.worker_id == "p1"
    busy = [both[0], replace(both[1], busy_until_s=100.06)]
    later = choose_prefill(ASK, busy, now_s=100.0, handover_s=far_first)
    assert later is not None and later.worker_id == "p0" and later.finish_s == pytest.approx(0.1)
