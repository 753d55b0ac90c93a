"""Turns: the published quotas where they are right, and nobody starves."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.multiplex import Turn, WeightedRoundRobin, WrrMemory, is_over, round_load
from polymux.disagg.turn_policies import POLICIES, turn_policy
from polymux.disagg.views import BatchView, DecodeView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName

WRR = WeightedRoundRobin()
NAMES = [ModelName(name) for name in "abcdefgh"]


def batch(model: str, *, step_s: float = 0.01, tpot_slo_s: float = 0.1, switch_s: float = 0.0) -> BatchView:
    return BatchView(model=ModelName(model), num_seqs=1, kv_tokens=100, step_s=step_s, tpot_slo_s=tpot_slo_s, switch_s=switch_s)


def view(*batches: BatchView, active: str | None = None) -> DecodeView:
    return DecodeView(now_s=0.0, active=ModelName(active) if active else None, batches=batches)


def turns(policy: WeightedRoundRobin, count: int, *batches: BatchView, active: str | None = None) -> list[Turn]:
    memory, found = policy.start(), []
    for _ in range(count):
        turn, memory = policy.next_turn(view(*batches, active=active), memory)
        assert turn is not None
        found.append(turn)
    return found


# ---------------------------------------------------------------- quotas

# H800 fits of the published artifact at 2000 tokens a batch; its callers all pass a batch size of -1, so its quotas are of these step times
QWEN = {"step_s": 8.49e-3 + 0.053e-6 * 2000 - 97.5e-6, "switch_s": 1.51}
YI = {"step_s": 11.75e-3 + 0.178e-6 * 2000 - 89.7e-6, "switch_s": 1.72}
LLAMA = {"step_s": 12.91e-3 + 0.435e-6 * 2000 - 116.7e-6, "switch_s": 2.54}


def test_three_equal_models_get_the_published_quotas() -> None:
    quotas = WRR.quotas([batch(name, **QWEN) for name in "abc"])
    assert quotas == pytest.approx(dict.fromkeys(["a", "b", "c"], 1.57), rel=0.005)


def test_an_overloaded_mix_gets_the_published_quotas_in_proportion_to_the_time_that_each_slo_needs() -> None:
    quotas = WRR.quotas([*(batch(name, **QWEN) for name in "abcde"), batch("y", **YI), batch("z", **LLAMA)])
    assert [quotas[ModelName(name)] for name in "ayz"] == pytest.approx([2.49, 3.52, 4.0], rel=0.005)


shapes = st.lists(
    st.tuples(st.floats(1e-3, 0.2), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.0, 0.05, 1.0])), min_size=2, max_size=8
).map(lambda rows: [batch(n, step_s=a, tpot_slo_s=b, switch_s=c) for n, (a, b, c) in zip(NAMES, rows, strict=False)])


def load_of(batches: list[BatchView]) -> float:
    steps = [b.tpot_slo_s / b.step_s for b in batches]
    return round_load(
        sum(1 / n for n in steps),
        num_models=len(batches),
        switch_s=sum(b.switch_s for b in batches),
        min_steps=min(steps, default=math.inf),
        max_quota_s=WRR.max_quota_s,
    )


@settings(deadline=None)
@given(shapes)
def test_a_round_is_alpha_times_as_long_as_every_models_tokens_may_take(batches: list[BatchView]) -> None:
    switch_s = sum(b.switch_s for b in batches)
    quotas = WRR.quotas(batches)
    assert all(0 < quota <= WRR.max_quota_s * (1 + 1e-9) for quota in quotas.values())
    if switch_s == 0:
        return
    alphas = [(switch_s + sum(quotas.values())) / (quotas[b.model] / b.step_s * b.tpot_slo_s) for b in batches]
    assert max(alphas) == pytest.approx(min(alphas))
    assert max(alphas) == pytest.approx(max(load_of(batches), WRR.min_alpha))


def test_switches_that_will_not_happen_do_not_lengthen_turns() -> None:
    """With all weights resident the published rule is 0/0; turns are then single steps, shared as the SLOs need."""
    quotas = WRR.quotas([batch("a", tpot_slo_s=0.1), batch("b", tpot_slo_s=0.4)])
    assert quotas == pytest.approx({"a": 0.04, "b": 0.01})


def test_an_overloaded_worker_with_resident_weights_still_shares_step_by_step() -> None:
    quotas = WRR.quotas([batch("a", step_s=0.09), batch("b", step_s=0.09)])
    assert quotas == pytest.approx({"a": 0.09, "b": 0.09})


# ---------------------------------------------------------------- turns


def test_a_model_alone_has_no_quota() -> None:
    assert turns(WRR, 3, batch("a", switch_s=1.0)) == [Turn(model=ModelName("a"), quota_s=None)] * 3


def test_a_turn_without_quota_ends_when_company_comes_and_not_before() -> None:
    alone = Turn(model=ModelName("a"), quota_s=None)
    assert not is_over(alone, 1e9, can_step=True, others_can_step=False)
    assert is_over(alone, 0.0, can_step=True, others_can_step=True)


def test_a_turn_ends_at_the_token_boundary_after_its_quota_unless_nobody_else_could_step() -> None:
    turn = Turn(model=ModelName("a"), quota_s=0.5)
    assert not is_over(turn, 0.49, can_step=True, others_can_step=True)
    assert is_over(turn, 0.5, can_step=True, others_can_step=True)
    assert not is_over(turn, 9.0, can_step=True, others_can_step=False)
    assert is_over(turn, 0.0, can_step=False, others_can_step=False)


def test_no_batch_means_no_turn() -> None:
    assert WRR.next_turn(view(), WrrMemory(last=NAMES[0])) == (None, WrrMemory(last=NAMES[0]))


def test_the_first_round_starts_with_the_model_that_is_active() -> None:
    order = [turn.model for turn in turns(WRR, 4, *(batch(name, switch_s=1.0) for name in "abc"), active="b")]
    assert order == ["b", "c", "a", "b"]


def test_the_next_model_to_load_is_named_for_prefetch_and_resident_ones_are_passed_over() -> None:
    first, second, third = turns(WRR, 3, batch("a"), batch("b"), batch("c", switch_s=1.0))
    assert (first.prefetch, second.prefetch) == ("c", "c")
    assert (third.model, third.prefetch) == ("c", None)


def test_a_model_that_comes_in_a_round_waits_for_the_next_one() -> None:
    one = [batch(name, switch_s=1.0) for name in "ac"]
    turn, memory = WRR.next_turn(view(*one), WRR.start())
    assert turn is not None
    order = [turn.model]
    for _ in range(4):
        turn, memory = WRR.next_turn(view(*one, batch("b", switch_s=1.0)), memory)
        assert turn is not None
        order.append(turn.model)
    assert order == ["a", "c", "a", "b", "c"]


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from(NAMES), min_size=0, max_size=8), min_size=1, max_size=60), st.data())
def test_no_model_starves(work: list[set[ModelName]], data: st.DataObject) -> None:
    """While a model has work, no other gets three turns before it gets one: it is passed over for the rest of one round at most."""
    patient = data.draw(st.sampled_from(NAMES))
    memory = WRR.start()
    since: dict[ModelName, int] = {}
    for present in work:
        batches = [batch(name, switch_s=0.5) for name in sorted(present | {patient})]
        turn, memory = WRR.next_turn(view(*batches), memory)
        assert turn is not None
        assert turn.model in present | {patient}
        since[turn.model] = since.get(turn.model, 0) + 1
        if turn.model == patient:
            since = {}
        assert all(count <= 2 for count in since.values())


@settings(deadline=None)
@given(shapes, st.integers(0, 99))
def test_a_decision_does_not_depend_on_the_order_of_the_view(batches: list[BatchView], seed: int) -> None:
    shuffled = random.Random(seed).sample(batches, len(batches))
    assert WRR.next_turn(view(*batches), WRR.start()) == WRR.next_turn(view(*shuffled), WRR.start())


def test_a_policy_is_chosen_by_name_and_an_unknown_name_is_answered_with_those_there_are() -> None:
    assert turn_policy("wrr", max_quota_s=2.0) == WeightedRoundRobin(max_quota_s=2.0)
    with pytest.raises(ConfigError, match=r"policies\.decode='fastest'.*wrr") as caught:
        turn_policy("fastest")
    assert caught.value.param == "policies.decode"
    assert "wrr" in POLICIES


@pytest.mark.parametrize("setting", [{"max_quota_s": 0.0}, {"min_alpha": -1.0}, {"max_quota_s": math.nan}])
def test_a_setting_that_cannot_work_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        turn_policy("wrr", **setting)


def test_an_idle_round_has_no_load() -> None:
    assert load_of([]) == 0.0
