"""Prompts by deadline: first tokens on time per second, models kept together, and the oldest is not overtaken for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.prefill import Deadline, DeadlineMemory, PrefillStep, prefill_policy
from polymux.disagg.views import PrefillView, PromptView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName, SequenceId

NAMES = [ModelName(name) for name in "abcd"]


def prompt(
    order: int, model: str, *, due_s: float = 10.0, prefill_s: float = 0.1, switch_s: float = 0.0, num_tokens: int = 16
) -> PromptView:
    return PromptView(
        sequence_id=SequenceId(f"s{order}"),
        model=ModelName(model),
        order=order,
        num_tokens=num_tokens,
        num_done=0,
        due_at_s=due_s,
        prefill_s=prefill_s,
        switch_s=switch_s,
    )


def first(*prompts: PromptView, budget: int = 16, policy: Deadline | None = None) -> PrefillStep:
    step, _ = (policy or Deadline()).next_step(
        PrefillView(now_s=0.0, active=None, prompts=prompts, max_num_batched_tokens=budget), DeadlineMemory()
    )
    assert step is not None
    return step


def test_nothing_waiting_means_no_step() -> None:
    view = PrefillView(now_s=0.0, active=None, prompts=(), max_num_batched_tokens=16)
    assert Deadline().next_step(view, DeadlineMemory()) == (None, DeadlineMemory())


def test_the_tighter_deadline_goes_first_whoever_came_first() -> None:
    assert first(prompt(1, "a", due_s=60.0), prompt(2, "b", due_s=1.0)).model == "b"


def test_the_resident_model_goes_first_at_equal_deadlines() -> None:
    assert first(prompt(1, "a", due_s=2.0, switch_s=1.0), prompt(2, "b", due_s=2.0)).model == "b"


def test_a_switch_is_made_for_many_rather_than_for_one() -> None:
    many = [prompt(i, "b", due_s=3.0, switch_s=1.0) for i in range(2, 6)]
    step = first(prompt(1, "a", due_s=3.0, switch_s=1.0), *many, budget=64)
    assert step.model == "b" and len(step.chunks) == 4


def test_a_short_prompt_passes_a_long_one_that_has_time() -> None:
    step = first(prompt(1, "a", due_s=60.0, prefill_s=5.0), prompt(2, "a", due_s=60.0, prefill_s=0.1))
    assert step.chunks[0].sequence_id == "s2"


def test_a_prompt_long_overdue_does_not_make_others_late() -> None:
    assert first(prompt(1, "a", due_s=-100.0), prompt(2, "b", due_s=0.15)).model == "b"


def test_the_next_model_is_named_for_prefetch() -> None:
    step = first(prompt(1, "a", due_s=0.2), prompt(2, "b", due_s=5.0, switch_s=1.0), prompt(3, "c", due_s=3.0, switch_s=1.0))
    assert (step.model, step.prefetch) == ("a", "c")


rows = st.lists(
    st.tuples(st.sampled_from(NAMES), st.floats(-50, 100), st.floats(0, 2), st.sampled_from([0.0, 1.0]), st.integers(1, 90)),
    min_size=1,
    max_size=20,
)


def drawn(found: list[tuple[ModelName, float, float, float, int]]) -> list[PromptView]:
    switches_s = {model: switch_s for model, _, _, switch_s, _ in found}
    return [prompt(i, m, due_s=d, prefill_s=p, switch_s=switches_s[m], num_tokens=n) for i, (m, d, p, _, n) in enumerate(found)]


@settings(deadline=None)
@given(rows, st.integers(0, 99), st.integers(1, 100))
def test_a_step_is_of_one_model_within_the_budget_whatever_the_order_of_the_view(
    found: list[tuple[ModelName, float, float, float, int]], seed: int, budget: int
) -> None:
    prompts = drawn(found)
    step = first(*prompts, budget=budget)
    models = {p.sequence_id: p.model for p in prompts}
    assert {models[chunk.sequence_id] for chunk in step.chunks} == {step.model}
    assert 0 < sum(chunk.num_tokens for chunk in step.chunks) <= budget
    assert step.prefetch != step.model
    assert step == first(*random.Random(seed).sample(prompts, len(prompts)), budget=budget)


@settings(deadline=None, max_examples=30)
@given(rows, st.integers(0, 10**6))
def test_no_prompt_starves(found: list[tuple[ModelName, float, float, float, int]], seed: int) -> None:
    """However many come with tighter deadlines, the oldest is computed after a bounded number of steps."""
    policy, rng = Deadline(max_group_size=2, max_groups_skipped=2), random.Random(seed)
    waiting = {p.sequence_id: p for p in drawn(found)}
    memory, number, num_steps = policy.start(), len(waiting), dict.fromkeys(waiting, 0)
    for _ in range(120):
        oldest = min(waiting.values(), key=lambda p: p.order).sequence_id
        view = PrefillView(now_s=0.0, active=None, prompts=tuple(waiting.values()), max_num_batched_tokens=1000)
        step, memory = policy.next_step(view, memory)
        assert step is not None
        served = {chunk.sequence_id for chunk in step.chunks}
        num_steps[oldest] = num_steps.get(oldest, 0) + 1
        assert oldest in served or num_steps[oldest] <= 4
        waiting = {key: p for key, p in waiting.items() if key not in served}
        for _ in range(3):
            new = prompt(number, rng.choice(NAMES), due_s=0.2, prefill_s=0.01)
            waiting[new.sequence_id] = new
            number += 1


def test_the_policy_is_chosen_by_name_and_its_settings_are_checked() -> None:
    assert prefill_policy("deadline", max_group_size=3) == Deadline(max_group_size=3)
    with pytest.raises(ConfigError, match="max_group_size=0"):
        prefill_policy("deadline", max_group_size=0)
