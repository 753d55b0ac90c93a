"""Grouped FCFS: groups in line, bounded in all that ever joined them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.prefill import Group, GroupedFcfs, GroupedMemory, PrefillStep, prefill_policy
from polymux.disagg.views import PrefillView, PromptView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName, SequenceId

A, B = ModelName("a"), ModelName("b")


def prompt(order: int, model: str, num_tokens: int = 16, num_done: int = 0) -> PromptView:
    return PromptView(sequence_id=SequenceId(f"s{order}"), model=ModelName(model), order=order, num_tokens=num_tokens, num_done=num_done)


def view(*prompts: PromptView, budget: int = 16) -> PrefillView:
    return PrefillView(now_s=0.0, active=None, prompts=prompts, max_num_batched_tokens=budget)


def drain(policy: GroupedFcfs, prompts: list[PromptView], budget: int = 16) -> list[PrefillStep]:
    """Every step until nothing waits."""
    memory, steps = policy.start(), []
    left = {p.sequence_id: p for p in prompts}
    for _ in range(2000):
        step, memory = policy.next_step(view(*left.values(), budget=budget), memory)
        if step is None:
            break
        steps.append(step)
        for chunk in step.chunks:
            old = left.pop(chunk.sequence_id)
            if not chunk.is_last:
                left[chunk.sequence_id] = prompt(old.order, old.model, old.num_tokens, chunk.start + chunk.num_tokens)
    assert not left
    return steps


def order(steps: list[PrefillStep]) -> list[str]:
    return [chunk.sequence_id for step in steps for chunk in step.chunks if chunk.is_last]


def test_prompts_of_one_model_are_computed_together_before_an_older_one_of_another() -> None:
    steps = drain(GroupedFcfs(), [prompt(1, "a"), prompt(2, "b"), prompt(3, "a")])
    assert order(steps) == ["s1", "s3", "s2"]


def test_a_full_group_is_not_joined() -> None:
    steps = drain(GroupedFcfs(max_group_size=2), [prompt(1, "a"), prompt(2, "a"), prompt(3, "b"), prompt(4, "a")])
    assert order(steps) == ["s1", "s2", "s3", "s4"]


def test_a_group_that_is_refilled_while_it_drains_still_ends() -> None:
    """The published rule counts those left in a group: one model's steady stream then keeps all others waiting for ever."""
    policy = GroupedFcfs(max_group_size=4)
    memory, other = policy.start(), prompt(1, "b")
    line = [prompt(0, "a"), prompt(2, "a")]
    served = []
    for count in range(3, 12):
        step, memory = policy.next_step(view(*line, other), memory)
        assert step is not None
        served.append(step.model)
        line = [line[1], prompt(count, "a")]  # one is done, and one more has come
    assert served[:5] == ["a", "a", "a", "a", "b"]


def test_small_prompts_of_the_leading_groups_share_a_step() -> None:
    (step, last) = drain(GroupedFcfs(max_group_size=1), [prompt(1, "a"), prompt(2, "a"), prompt(3, "b")], budget=64)
    assert [chunk.sequence_id for chunk in step.chunks] == ["s1", "s2"]
    assert last.model == "b"


def test_a_long_prompt_is_cut_into_chunks_under_the_budget() -> None:
    steps = drain(GroupedFcfs(), [prompt(1, "a", 100)], budget=32)
    assert [step.chunks[0].num_tokens for step in steps] == [32, 32, 32, 4]


def test_the_next_other_model_in_line_is_named_for_prefetch() -> None:
    step, _ = GroupedFcfs().next_step(view(prompt(1, "a"), prompt(2, "a"), prompt(3, "b")), GroupedMemory())
    assert step is not None
    assert (step.model, step.prefetch) == (A, B)


def test_a_cancelled_prompt_leaves_its_group() -> None:
    memory = GroupedMemory((Group(A, (SequenceId("s1"), SequenceId("s2")), 2),))
    step, memory = GroupedFcfs().next_step(view(prompt(2, "a")), memory)
    assert step is not None
    assert memory.groups == (Group(A, (SequenceId("s2"),), 2),)


def test_nothing_waiting_means_no_step() -> None:
    assert GroupedFcfs().next_step(view(prompt(1, "a", 16, 16)), GroupedMemory()) == (None, GroupedMemory())


prompts = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), min_size=1, max_size=30).map(
    lambda rows: [prompt(i, model, num_tokens) for i, (model, num_tokens) in enumerate(rows)]
)


@settings(deadline=None)
@given(prompts, st.integers(1, 5), st.sampled_from([16, 40, 128]))
def test_every_prompt_is_computed_once_in_steps_of_one_model_under_the_budget(
    waiting: list[PromptView], max_group_size: int, budget: int
) -> None:
    steps = drain(GroupedFcfs(max_group_size=max_group_size), waiting, budget)
    models = {p.sequence_id: p.model for p in waiting}
    for step in steps:
        assert {models[chunk.sequence_id] for chunk in step.chunks} == {step.model}
        assert 0 < sum(chunk.num_tokens for chunk in step.chunks) <= budget
    assert sorted(order(steps)) == sorted(models)


@settings(deadline=None)
@given(prompts, st.integers(1, 5))
def test_fewer_than_a_group_of_later_prompts_of_each_other_model_overtake_one(waiting: list[PromptView], max_group_size: int) -> None:
    """A prompt is overtaken only by those that join groups before its own, each of which was opened by an older prompt."""
    done = order(drain(GroupedFcfs(max_group_size=max_group_size), waiting))
    by_id = {p.sequence_id: p for p in waiting}
    for at, sequence_id in enumerate(done):
        mine = by_id[SequenceId(sequence_id)]
        for model in "abc":
            before = [by_id[SequenceId(other)] for other in done[:at]]
            overtook = [p for p in before if p.order > mine.order and p.model == model]
            assert len(overtook) < max_group_size
            assert not (overtook and model == mine.model)


def test_a_policy_is_chosen_by_name_and_an_unknown_name_is_answered_with_those_there_are() -> None:
    assert prefill_policy("grouped_fcfs", max_group_size=3) == GroupedFcfs(max_group_size=3)
    with pytest.raises(ConfigError, match=r"policies\.prefill='sjf'.*grouped_fcfs"):
        prefill_policy("sjf")
    with pytest.raises(ConfigError, match="max_group_size=0"):
        prefill_policy("grouped_fcfs", max_group_size=0)
