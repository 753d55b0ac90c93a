"""The baseline: a model keeps a worker until its requests end, and the published rule says which line a request joins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.request_level import Line, RequestLevel, Run, choose_line
from polymux.disagg.turn_policies import turn_policy
from polymux.disagg.views import BatchView, DecodeView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName, SequenceId, WorkerId

A, B, C = (ModelName(name) for name in "abc")


def line(worker_id: str, *runs: tuple[ModelName, int], ended_at_s: float | None = None) -> Line:
    members = [tuple(SequenceId(f"{worker_id}-{i}-{k}") for k in range(count)) for i, (_, count) in enumerate(runs)]
    made = tuple(Run(model, ids) for (model, _), ids in zip(runs, members, strict=True))
    return Line(worker_id=WorkerId(worker_id), runs=made, run_ended_at_s=ended_at_s)


# ---------------------------------------------------------------- lines


def test_a_request_joins_the_last_run_of_its_model_and_no_other() -> None:
    there = Line(worker_id=WorkerId("w"))
    for member, model in (("1", A), ("2", A), ("3", B), ("4", A), ("5", A)):
        there = there.joined(SequenceId(member), model)
    assert there.runs == (Run(A, ("1", "2")), Run(B, ("3",)), Run(A, ("4", "5")))
    assert there.served == ("1", "2")


def test_the_next_run_has_the_worker_once_every_request_of_the_first_has_ended() -> None:
    there = Line(worker_id=WorkerId("w")).joined(SequenceId("1"), A).joined(SequenceId("2"), A).joined(SequenceId("3"), B)
    there = there.ended(SequenceId("1"), 5.0)
    assert there.served == ("2",) and there.run_ended_at_s is None
    there = there.ended(SequenceId("2"), 6.0)
    assert there.served == ("3",) and there.run_ended_at_s == 6.0
    assert there.ended(SequenceId("3"), 7.0) == Line(worker_id=WorkerId("w"), run_ended_at_s=7.0)


def test_a_request_that_is_given_up_while_it_waits_ends_no_run() -> None:
    there = line("w", (A, 1), (B, 1)).ended(SequenceId("w-1-0"), 5.0)
    assert there.runs == line("w", (A, 1)).runs and there.run_ended_at_s is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.sampled_from([A, B, C]))))
def test_a_line_serves_one_model_at_a_time_and_keeps_everyone_until_their_end(steps: list[tuple[bool, int, ModelName]]) -> None:
    there, models = Line(worker_id=WorkerId("w")), dict[SequenceId, ModelName]()
    for number, (is_arrival, pick, model) in enumerate(steps):
        if is_arrival:
            member = SequenceId(str(number))
            models[member] = model
            there = there.joined(member, model)
        elif models:
            member = sorted(models)[pick % len(models)]
            served, was_last = there.served, there.served == (member,)
            del models[member]
            there = there.ended(member, float(number))
            assert was_last or member in served or there.served == served
            assert (there.run_ended_at_s == float(number)) == was_last
        assert sorted(member for run in there.runs for member in run.members) == sorted(models)
        assert len({models[member] for member in there.served}) == (1 if models else 0)


# ---------------------------------------------------------------- whose line


def test_a_run_with_slots_left_is_joined_and_the_shortest_of_several() -> None:
    lines = [line("w0", (A, 3)), line("w1", (B, 1), (A, 2)), line("w2")]
    assert choose_line(A, lines) == "w1"


def test_full_runs_send_a_request_to_the_worker_that_finished_a_run_longest_ago_even_a_busy_one() -> None:
    lines = [line("w0", (A, 4)), line("w1", (B, 9), ended_at_s=1.0), line("w2", ended_at_s=2.0)]
    assert choose_line(A, lines) == "w1"
    assert choose_line(A, lines, idle_first=True) == "w2"
    assert choose_line(A, lines, slots=5) == "w0"


def test_a_worker_that_never_finished_a_run_is_preferred_as_published() -> None:
    lines = [line("w0", ended_at_s=0.0), line("w1", (B, 1))]
    assert choose_line(A, lines) == "w1"
    assert choose_line(A, lines, idle_first=True) == "w0"


def test_where_every_line_ends_with_the_model_the_shortest_is_joined_though_it_is_full() -> None:
    assert choose_line(A, [line("w0", (A, 6)), line("w1", (A, 5))]) == "w1"


# ---------------------------------------------------------------- turns


def view(*models: ModelName) -> DecodeView:
    batches = (BatchView(model=m, num_seqs=1, kv_tokens=10, step_s=0.01, tpot_slo_s=0.1, switch_s=0.1) for m in models)
    return DecodeView(now_s=0.0, active=None, batches=tuple(batches))


def test_a_model_keeps_its_turn_until_it_has_no_work_and_the_longest_waiting_is_next() -> None:
    policy = RequestLevel()
    memory, order = policy.start(), []
    for present in ((B,), (B, C), (A, B, C), (A, C), (A, B, C), (A, B), ()):
        turn, memory = policy.next_turn(view(*present), memory)
        order.append(turn.model if turn else None)
        assert turn is None or turn.quota_s is None
    assert order == [B, B, B, C, C, A, None]


def test_it_is_a_policy_by_name() -> None:
    assert isinstance(turn_policy("request_level", max_quota_s=2.0), RequestLevel)
    with pytest.raises(ConfigError):
        RequestLevel(max_quota_s=0.0)
