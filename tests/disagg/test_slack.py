"""Slack: credit waits, switches are worth their cost, and nobody starves."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.multiplex import Turn, is_over
from polymux.disagg.slack import Slack, SlackMemory
from polymux.disagg.turn_policies import turn_policy
from polymux.disagg.views import BatchView, DecodeView, Due
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName

SLACK = Slack()
A, B, C = (ModelName(name) for name in "abc")
NAMES = [ModelName(name) for name in "abcdefgh"]


def batch(
    model: str, *due_in_s: float, step_s: float = 0.01, tpot_slo_s: float = 0.1, switch_s: float = 0.0, is_kept: bool = True
) -> BatchView:
    """Of one sequence for each due time; the clock stands at 0."""
    dues = tuple(Due(at_s, tpot_slo_s, is_kept) for at_s in due_in_s)
    return BatchView(
        model=ModelName(model), num_seqs=len(dues), kv_tokens=100, step_s=step_s, tpot_slo_s=tpot_slo_s, switch_s=switch_s, dues=dues
    )


def view(*batches: BatchView, now_s: float = 0.0, can_prefetch: bool = False, load_drag: float = 0.0) -> DecodeView:
    return DecodeView(now_s=now_s, active=None, batches=batches, can_prefetch=can_prefetch, load_drag=load_drag)


def next_turn(
    *batches: BatchView, memory: SlackMemory | None = None, now_s: float = 0.0, can_prefetch: bool = False, load_drag: float = 0.0
) -> Turn:
    turn, _ = SLACK.next_turn(view(*batches, now_s=now_s, can_prefetch=can_prefetch, load_drag=load_drag), memory or SLACK.start())
    assert turn is not None
    return turn


# ---------------------------------------------------------------- whose turn


def test_no_batch_means_no_turn_and_one_batch_has_no_quota() -> None:
    assert SLACK.next_turn(view(), SlackMemory(last=A)) == (None, SlackMemory(last=A))
    assert next_turn(batch("a", 1.0)) == Turn(model=A, quota_s=None)


def test_a_batch_with_credit_waits_for_one_without() -> None:
    assert next_turn(batch("a", 5.0), batch("b", 0.05)).model == B


def test_a_switch_is_not_made_for_what_the_resident_model_could_save_meanwhile() -> None:
    assert next_turn(batch("a", 0.2), batch("b", 0.2, switch_s=1.0)).model == A


def test_a_switch_is_made_once_the_resident_model_is_far_enough_ahead() -> None:
    assert next_turn(batch("a", 10.0), batch("b", 1.2, switch_s=1.0)).model == B


def test_a_new_model_with_a_tight_deadline_is_next_however_many_wait() -> None:
    others = [batch(name, 8.0, switch_s=0.5) for name in "bcdefgh"]
    assert next_turn(batch("a", 20.0), *others, batch("new", 0.8, switch_s=0.5)).model == "new"


def test_more_sequences_in_one_step_go_before_fewer() -> None:
    assert next_turn(batch("a", 0.1), batch("b", *[0.1] * 4)).model == B


def test_a_batch_costs_what_its_step_is_measured_to_cost() -> None:
    """Ten sequences whose step takes a hundred times as long as that of one save fewer tokens a second."""
    assert next_turn(batch("a", 0.5, step_s=0.002), batch("b", *[0.5] * 10, step_s=0.2)).model == A


def test_a_hopelessly_late_batch_does_not_drag_the_others_down() -> None:
    assert next_turn(batch("a", -60.0, is_kept=False), batch("b", 0.03)).model == B


def test_a_batch_that_catches_up_in_a_few_steps_is_saved_before_one_that_never_would() -> None:
    assert next_turn(batch("a", -30.0, is_kept=False), batch("b", -0.2, is_kept=False)).model == B


def test_a_request_on_time_so_far_goes_before_one_that_has_missed_a_token() -> None:
    assert next_turn(batch("a", 0.05, is_kept=False), batch("b", 0.05)).model == B


def test_the_looser_deadline_class_waits_for_the_tighter() -> None:
    assert next_turn(batch("a", 0.3, tpot_slo_s=1.0), batch("b", 0.3, tpot_slo_s=0.05)).model == B


def test_a_prompt_is_weighed_with_the_time_of_its_prefill() -> None:
    dues = (Due(1.0, 0.1, is_prompt=True),)
    new = BatchView(model=B, num_seqs=1, kv_tokens=16, step_s=0.01, tpot_slo_s=0.1, switch_s=0.0, prefill_s=0.9, dues=dues)
    assert next_turn(batch("a", 0.5), new).model == A
    assert next_turn(batch("a", 0.5), replace(new, prefill_s=0.01, dues=(Due(0.3, 0.1, is_prompt=True),))).model == B


def test_with_credit_for_minutes_the_one_due_first_still_goes_first_whatever_its_name() -> None:
    assert next_turn(batch("a", 120.0), batch("b", 100.0)).model == B
    assert next_turn(batch("a", 100.0), batch("b", 120.0)).model == A


def test_without_a_word_on_deadlines_turns_still_change() -> None:
    memory, models = SLACK.start(), []
    for i in range(12):
        turn, memory = SLACK.next_turn(view(batch("a"), batch("b"), now_s=1.0 * i), memory)
        assert turn is not None
        models.append(turn.model)
    assert set(models) == {A, B}


# ---------------------------------------------------------------- how long


def test_a_turn_that_cost_a_switch_lasts_as_long_as_the_switch() -> None:
    turn = next_turn(batch("a", 10.0), batch("b", 1.2, switch_s=1.0))
    assert turn.quota_s == 1.0


def test_with_free_switches_a_turn_is_as_short_as_a_step_or_a_share_of_a_deadline() -> None:
    assert next_turn(batch("a", 0.1, step_s=0.03), batch("b", 0.2)).quota_s == 0.03
    assert next_turn(batch("a", 0.1, step_s=0.001), batch("b", 0.2)).quota_s == pytest.approx(0.1 / 8)


def test_a_turn_ends_at_the_token_boundary_after_another_sequence_came() -> None:
    turn = next_turn(batch("a", 0.1), batch("b", 5.0))
    assert is_over(turn, 0.0, can_step=True, others_can_step=True, has_news=True)
    assert not is_over(turn, 0.0, can_step=True, others_can_step=True)


def test_others_get_their_turn_after_the_longest_run_of_one() -> None:
    memory = SlackMemory(last=A, since_s=0.0)
    assert next_turn(batch("a", 4.0), batch("b", 90.0), memory=memory, now_s=3.9).model == A
    assert next_turn(batch("a", 4.0), batch("b", 90.0), memory=memory, now_s=4.0).model == B


# ---------------------------------------------------------------- loading beside another's work


def test_a_model_is_loaded_while_a_resident_one_computes() -> None:
    turn = next_turn(batch("a", 10.0), batch("b", 1.2, switch_s=1.0), can_prefetch=True)
    assert (turn.model, turn.prefetch, turn.quota_s) == (A, B, 1.0)


def test_a_load_under_way_is_waited_for_and_not_given_up_for_another() -> None:
    first, memory = SLACK.next_turn(view(batch("a", 10.0), batch("b", 1.2, switch_s=1.0), can_prefetch=True), SLACK.start())
    assert first is not None and first.prefetch == B
    both = batch("a", 10.0), batch("b", 1.2, switch_s=0.4), batch("c", 0.7, 0.7, 0.7, switch_s=0.5)
    turn = next_turn(*both, memory=memory, now_s=0.6, can_prefetch=True)
    assert (turn.model, turn.prefetch, turn.quota_s) == (A, B, pytest.approx(0.4))


def test_a_load_that_does_not_come_is_not_waited_for_any_longer() -> None:
    """A prediction too low, or a prefetch that had no room: the switch is then made outright."""
    batches = batch("a", 10.0), batch("b", 1.2, switch_s=1.0)
    _, memory = SLACK.next_turn(view(*batches, can_prefetch=True), SLACK.start())
    assert next_turn(*batches, memory=memory, now_s=1.2, can_prefetch=True).model == A
    assert next_turn(*batches, memory=memory, now_s=1.6, can_prefetch=True).model == B


def test_the_most_urgent_model_that_is_not_resident_is_loaded_meanwhile() -> None:
    turn = next_turn(batch("a", 0.1), batch("b", 9.0, switch_s=1.0), batch("c", 4.0, switch_s=1.0), can_prefetch=True)
    assert (turn.model, turn.prefetch) == (A, C)


def test_where_loads_take_their_time_from_the_steps_nobody_is_loaded_on_the_chance_that_its_turn_comes() -> None:
    batches = batch("a", 0.1), batch("b", 9.0, switch_s=1.0), batch("c", 4.0, switch_s=1.0)
    assert next_turn(*batches, can_prefetch=True, load_drag=0.4).prefetch == C
    assert next_turn(*batches, can_prefetch=True, load_drag=1.0).prefetch is None


def test_there_a_load_is_hidden_only_if_tokens_would_be_late_for_it() -> None:
    def turn(switch_s: float, load_drag: float) -> Turn:
        """Of two models of which one has far more credit than the other's load takes."""
        found = next_turn(batch("a", 90.0), batch("b", 0.3, switch_s=switch_s), can_prefetch=True, load_drag=load_drag)
        return replace(found, quota_s=None)

    beside, outright = Turn(model=A, quota_s=None, prefetch=B, ends_on_news=True), Turn(model=B, quota_s=None, ends_on_news=True)
    assert [turn(0.05, 0.0), turn(0.05, 1.0), turn(0.25, 1.0)] == [beside, outright, beside]


def test_what_a_load_takes_from_the_steps_counts_for_the_resident_model() -> None:
    batches = batch("a", 0.15), batch("b", 0.1, 0.1, switch_s=0.05)
    found = [next_turn(*batches, can_prefetch=True, load_drag=drag) for drag in (0.0, 3.0)]
    assert [turn.prefetch for turn in found] == [B, None] and found[1].model == A


# ---------------------------------------------------------------- what always holds

waits = st.lists(st.floats(-100, 100), min_size=1, max_size=4)
shapes = st.tuples(waits, st.floats(1e-3, 0.3), st.sampled_from([0.02, 0.1, 1.0]), st.sampled_from([0.0, 0.0, 0.02, 1.0]), st.booleans())


def drawn(rows: list[tuple[list[float], float, float, float, bool]]) -> list[BatchView]:
    return [
        batch(name, *dues, step_s=step_s, tpot_slo_s=tpot_s, switch_s=switch_s, is_kept=is_kept)
        for name, (dues, step_s, tpot_s, switch_s, is_kept) in zip(NAMES, rows, strict=False)
    ]


@settings(deadline=None)
@given(st.lists(shapes, min_size=2, max_size=8), st.booleans(), st.integers(0, 99))
def test_a_decision_does_not_depend_on_the_order_of_the_view(rows: list[tuple], can_prefetch: bool, seed: int) -> None:  # type: ignore[type-arg]
    batches = drawn(rows)
    shuffled = random.Random(seed).sample(batches, len(batches))
    one, other = (SLACK.next_turn(view(*order, can_prefetch=can_prefetch), SLACK.start()) for order in (batches, shuffled))
    assert one == other


@settings(deadline=None)
@given(st.lists(shapes, min_size=2, max_size=8), st.booleans())
def test_every_turn_is_of_a_model_that_can_step_and_its_quota_is_bounded(rows: list[tuple], can_prefetch: bool) -> None:  # type: ignore[type-arg]
    batches = drawn(rows)
    turn, _ = SLACK.next_turn(view(*batches, can_prefetch=can_prefetch), SLACK.start())
    assert turn is not None and turn.quota_s is not None
    assert turn.model in {b.model for b in batches} and turn.prefetch != turn.model
    assert 0 < turn.quota_s <= SLACK.max_quota_s


@settings(deadline=None, max_examples=60)
@given(st.lists(shapes, min_size=8, max_size=8), st.booleans(), st.integers(0, 10**6))
def test_no_model_starves(rows: list[tuple], can_prefetch: bool, seed: int) -> None:  # type: ignore[type-arg]
    """Whatever the deadlines, a model with work sees at most four rounds of others' runs, each of bounded length.

    Nothing that was named for prefetch ever comes here, models come and go, and news ends turns early.
    """
    rng = random.Random(seed)
    batches = {b.model: b for b in drawn(rows)}
    patient = rng.choice(NAMES)
    memory, now_s, last, run_began_s, num_runs = SLACK.start(), 0.0, None, 0.0, 0
    for _ in range(400):
        present = [b for b in batches.values() if b.model == patient or rng.random() < 0.8]
        turn, memory = SLACK.next_turn(view(*present, now_s=now_s, can_prefetch=can_prefetch), memory)
        assert turn is not None
        if turn.model != last:
            last, run_began_s = turn.model, now_s
            num_runs += 1
        if turn.model == patient:
            num_runs = 0
        assert num_runs <= (SLACK.max_rounds_skipped + 2) * len(NAMES)
        assert len(present) == 1 or turn.model == patient or now_s - run_began_s <= 2 * SLACK.max_quota_s + 2 * 1.5
        now_s += batches[turn.model].switch_s + rng.choice([0.3, 1.0]) * (turn.quota_s or 1.0)


def test_a_decision_over_twelve_batches_takes_microseconds() -> None:
    batches = [batch(f"m{i:02}", *(0.1 * k for k in range(8)), switch_s=0.5 * (i % 3)) for i in range(12)]
    memory = SLACK.start()
    best_s = 1.0
    for _ in range(20):
        began_s = time.perf_counter()
        SLACK.next_turn(view(*batches, can_prefetch=True), memory)
        best_s = min(best_s, time.perf_counter() - began_s)
    assert best_s < 1e-3


def test_the_policy_is_chosen_by_name_and_its_settings_are_checked() -> None:
    assert turn_policy("slack", max_quota_s=2.0) == Slack(max_quota_s=2.0)
    with pytest.raises(ConfigError, match="max_quota_s=0"):
        turn_policy("slack", max_quota_s=0.0)
