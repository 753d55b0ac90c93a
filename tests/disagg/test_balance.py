"""Which batch moves: one that pays what it costs, from a worker that is late to one that is not; and no batch travels to and fro."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.balance import Balance, BalanceMemory, BatchMove
from polymux.disagg.views import BalanceView, DecodeModelView, DecodeWorkerView
from polymux.transport.errors import ConfigError
from polymux.transport.units import GIB, MIB, ModelName, WorkerId

A, B, C = (ModelName(name) for name in "abc")
COST = (0.01, 0.001, 0.0)  # seconds of a step: fixed, and for each sequence


def batch(num_seqs: int, tpot_slo_s: float = 0.05) -> DecodeModelView:
    return DecodeModelView(num_seqs=num_seqs, kv_tokens=100 * num_seqs, tpot_slo_s=tpot_slo_s, step_s=COST[0] + COST[1] * num_seqs)


def worker(name: str, models: dict[ModelName, DecodeModelView], free_kv_bytes: int = GIB) -> DecodeWorkerView:
    return DecodeWorkerView(
        worker_id=WorkerId(name),
        models=models,
        resident=frozenset((A, B, C)),
        costs=dict.fromkeys((A, B, C), COST),
        load=sum(one.step_s / one.tpot_slo_s for one in models.values()),
        round_switch_s=0.0,
        min_steps=min((one.tpot_slo_s / one.step_s for one in models.values()), default=float("inf")),
        num_seqs=sum(one.num_seqs for one in models.values()),
        free_kv_bytes=free_kv_bytes,
        max_num_seqs=64,
        switch_bytes_per_s=1e9,
    )


def view_of(*workers: DecodeWorkerView, now_s: float = 0.0) -> BalanceView:
    return BalanceView(
        now_s=now_s,
        workers=workers,
        targets=frozenset(w.worker_id for w in workers),
        token_bytes=dict.fromkeys((A, B, C), 4096.0),
        weight_bytes=dict.fromkeys((A, B, C), 100 * MIB),
        transfer_bytes_per_s=1e9,
    )


def choose(view: BalanceView) -> BatchMove | None:
    return Balance().next_move(view, BalanceMemory())[0]


def test_of_two_batches_that_are_late_together_one_moves_to_an_idle_worker() -> None:
    move = choose(view_of(worker("w0", {A: batch(20), B: batch(25)}), worker("w1", {})))
    assert move is not None
    assert (move.source, move.target) == ("w0", "w1")
    assert move.gain > 0.5 and move.cost_s < 0.2


def test_nothing_moves_from_a_worker_that_is_on_time() -> None:
    assert choose(view_of(worker("w0", {A: batch(5), B: batch(5)}), worker("w1", {}))) is None


def test_a_batch_alone_stays_since_it_is_as_late_anywhere() -> None:
    assert choose(view_of(worker("w0", {A: batch(60)}), worker("w1", {}))) is None


def test_nothing_moves_to_a_worker_that_would_be_as_late() -> None:
    both = {A: batch(20), B: batch(25)}
    assert choose(view_of(worker("w0", both), worker("w1", both))) is None


def test_nothing_moves_where_its_kv_has_no_room_or_that_is_given_nothing_new() -> None:
    late = worker("w0", {A: batch(20), B: batch(25)})
    assert choose(view_of(late, worker("w1", {}, free_kv_bytes=MIB))) is None
    assert choose(replace(view_of(late, worker("w1", {})), targets=frozenset({late.worker_id}))) is None


def test_a_move_that_costs_more_than_it_brings_is_not_made() -> None:
    late = worker("w0", {A: batch(20), B: batch(25)})
    slow = replace(worker("w1", {}), resident=frozenset(), switch_bytes_per_s=10 * MIB)  # ten seconds to load either model
    assert choose(view_of(late, slow)) is None


def test_a_worker_without_the_decode_role_can_still_be_relieved() -> None:
    late = worker("w0", {A: batch(20), B: batch(25)})
    view = replace(view_of(late, worker("w1", {})), targets=frozenset({WorkerId("w1")}))
    assert choose(view) is not None


def test_a_model_that_was_moved_rests() -> None:
    policy, memory = Balance(), BalanceMemory()
    late, idle = worker("w0", {A: batch(20), B: batch(25)}), worker("w1", {})
    first, memory = policy.next_move(view_of(late, idle), memory)
    assert first is not None
    second, memory = policy.next_move(view_of(late, idle, now_s=1.0), memory)
    assert second is None or second.model != first.model
    back, _ = policy.next_move(view_of(late, idle, now_s=1.0 + policy.rest_s), memory)
    assert back is not None


@given(
    st.lists(st.dictionaries(st.sampled_from((A, B, C)), st.integers(1, 60).map(batch), max_size=3), min_size=2, max_size=4),
)
def test_moving_as_it_says_ends_and_never_makes_the_busiest_busier(models: list[dict[ModelName, DecodeModelView]]) -> None:
    policy = Balance(rest_s=1e-9)
    loads = list(models)
    for step in range(40):
        workers = [worker(f"w{i}", one) for i, one in enumerate(loads)]
        before = max(policy.load(one.models, one) for one in workers)
        move, _ = policy.next_move(view_of(*workers, now_s=float(step)), BalanceMemory())
        if move is None:
            return
        source, target = int(move.source[1:]), int(move.target[1:])
        moved = loads[source][move.model]
        here = loads[target].get(move.model)
        loads[source] = {model: one for model, one in loads[source].items() if model != move.model}
        loads[target] = {**loads[target], move.model: batch(moved.num_seqs + (here.num_seqs if here else 0))}
        after = [worker(f"w{i}", one) for i, one in enumerate(loads)]
        assert max(policy.load(one.models, one) for one in after) <= before + 1e-9
    raise AssertionError("batches go on moving")


@pytest.mark.parametrize("name", ["horizon_s", "min_load", "min_gain", "times_cost", "rest_s", "max_quota_s"])
def test_settings_that_cannot_work_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Balance(**{name: 0.0})
