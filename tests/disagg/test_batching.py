"""Grants, decode batches, preemption and chunks: nothing is overtaken, and the oldest always goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.batching import choose_victims, fill_step, form_batch, next_grant
from polymux.disagg.views import HolderView, PromptView, RunningView, WaitingView
from polymux.transport.units import ModelName, SequenceId

A, B = ModelName("a"), ModelName("b")


def running(order: int, context_len: int, num_blocks: int | None = None) -> RunningView:
    held = -(-context_len // 16) if num_blocks is None else num_blocks
    return RunningView(sequence_id=SequenceId(f"s{order}"), order=order, context_len=context_len, num_blocks=held)


def prompt(order: int, num_tokens: int, num_done: int = 0, model: ModelName = A) -> PromptView:
    return PromptView(sequence_id=SequenceId(f"s{order}"), model=model, order=order, num_tokens=num_tokens, num_done=num_done)


def waiting(order: int, num_blocks: int, model: ModelName = A) -> WaitingView:
    return WaitingView(sequence_id=SequenceId(f"s{order}"), model=model, order=order, num_blocks=num_blocks)


# ---------------------------------------------------------------- decode


def test_a_sequence_with_room_in_its_last_block_needs_none() -> None:
    batch = form_batch([running(1, 15), running(2, 17)], max_num_seqs=8, num_free_blocks=0)
    assert (batch.step, batch.preempt, batch.num_new_blocks) == (("s1", "s2"), (), 0)


def test_a_full_block_needs_a_new_one() -> None:
    assert form_batch([running(1, 16)], max_num_seqs=8, num_free_blocks=1).num_new_blocks == 1


def test_an_older_sequence_takes_the_blocks_of_the_youngest() -> None:
    batch = form_batch([running(3, 5), running(1, 32), running(2, 40)], max_num_seqs=8, num_free_blocks=0)
    assert (batch.step, batch.preempt) == (("s1", "s2"), ("s3",))


def test_the_youngest_sits_out_rather_than_being_preempted_for_itself() -> None:
    batch = form_batch([running(1, 5), running(2, 16)], max_num_seqs=8, num_free_blocks=0)
    assert (batch.step, batch.preempt) == (("s1",), ())


def test_the_oldest_alone_says_what_it_lacks_and_keeps_what_it_has() -> None:
    batch = form_batch([running(1, 16)], max_num_seqs=8, num_free_blocks=0)
    assert (batch.step, batch.preempt, batch.num_short_blocks) == ((), (), 1)


views = st.lists(st.integers(1, 100), max_size=12).map(lambda lens: [running(i, n) for i, n in enumerate(lens)])


@settings(deadline=None)
@given(views, st.integers(1, 12), st.integers(0, 6))
def test_a_batch_never_needs_more_blocks_than_are_free_after_its_preemptions(
    sequences: list[RunningView], max_num_seqs: int, free: int
) -> None:
    batch = form_batch(sequences, max_num_seqs=max_num_seqs, num_free_blocks=free)
    by_id = {s.sequence_id: s for s in sequences}
    freed = sum(by_id[s].num_blocks for s in batch.preempt)
    need = sum(max(0, -(-(by_id[s].context_len + 1) // 16) - by_id[s].num_blocks) for s in batch.step)
    assert need == batch.num_new_blocks <= free + freed
    assert len(batch.step) <= max_num_seqs
    assert not set(batch.step) & set(batch.preempt)
    youngest = sorted(sequences, key=lambda s: -s.order)[: len(batch.preempt)]
    assert batch.preempt == tuple(s.sequence_id for s in youngest)
    assert not sequences or "s0" not in batch.preempt
    assert bool(batch.step) or not sequences or batch.num_short_blocks > 0


@dataclass
class Live:
    context_len: int
    left: int
    num_blocks: int


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=10),
    st.integers(8, 20),
    st.integers(1, 4),
)
def test_every_sequence_ends_in_a_pool_that_holds_the_longest_one_alone(
    lengths: list[tuple[int, int]], num_blocks: int, width: int
) -> None:
    """Grant, step, preempt, grant again: prompts and outputs of up to 120 tokens need 8 blocks."""
    waits = {i: Live(prompt_len, left, 0) for i, (prompt_len, left) in enumerate(lengths)}
    runs: dict[int, Live] = {}
    free = num_blocks
    for _ in range(5000):
        while True:
            line = [waiting(i, -(-(live.context_len + 1) // 16)) for i, live in waits.items()]
            chosen = next_grant(line, num_held=Counter({A: len(runs)}), num_free_blocks={A: free}, max_num_seqs=width)
            if chosen is None:
                break
            i = int(chosen[1:])
            runs[i] = waits.pop(i)
            runs[i].num_blocks = -(-(runs[i].context_len + 1) // 16)
            free -= runs[i].num_blocks
        if not runs:
            break
        view = [running(i, live.context_len, live.num_blocks) for i, live in runs.items()]
        batch = form_batch(view, max_num_seqs=width, num_free_blocks=free)
        for i in (int(s[1:]) for s in batch.preempt):
            waits[i] = runs.pop(i)
            free += waits[i].num_blocks
        free -= batch.num_new_blocks
        assert free >= 0
        for i in (int(s[1:]) for s in batch.step):
            live = runs[i]
            live.context_len, live.left = live.context_len + 1, live.left - 1
            live.num_blocks = max(live.num_blocks, -(-live.context_len // 16))
            if not live.left:
                free += runs.pop(i).num_blocks
    assert not waits
    assert not runs
    assert free == num_blocks


# ---------------------------------------------------------------- victims across models


def test_victims_are_the_youngest_of_any_model_and_no_more_than_needed() -> None:
    holders = [
        HolderView(sequence_id=SequenceId(f"s{order}"), model=model, order=order, kv_bytes=kv_bytes)
        for order, model, kv_bytes in ((1, A, 90), (2, B, 10), (3, A, 10), (4, B, 10))
    ]
    assert choose_victims(holders, needed_bytes=15, order=0) == ("s4", "s3")
    assert choose_victims(holders, needed_bytes=0, order=0) == ()


def test_an_older_sequence_is_never_preempted_for_a_younger_one() -> None:
    holders = [HolderView(sequence_id=SequenceId("s1"), model=A, order=1, kv_bytes=100)]
    assert choose_victims(holders, needed_bytes=1, order=2) == ()


def test_nobody_is_preempted_in_vain() -> None:
    holders = [HolderView(sequence_id=SequenceId(f"s{order}"), model=A, order=order, kv_bytes=10) for order in (1, 2)]
    assert choose_victims(holders, needed_bytes=21, order=0) == ()


# ---------------------------------------------------------------- grants


def test_a_long_prompt_is_not_overtaken_by_short_ones_while_it_waits_for_blocks() -> None:
    line = [waiting(2, 1), waiting(1, 10)]
    assert next_grant(line, num_held={}, num_free_blocks={A: 9}, max_num_seqs=8) is None
    assert next_grant(line, num_held={}, num_free_blocks={A: 10}, max_num_seqs=8) == "s1"


def test_a_model_whose_batch_is_full_lets_others_pass() -> None:
    line = [waiting(1, 1, A), waiting(2, 1, B)]
    assert next_grant(line, num_held={A: 2}, num_free_blocks={A: 9, B: 9}, max_num_seqs=2) == "s2"


def test_blocks_are_kept_back_for_the_growth_of_those_that_run_unless_none_does() -> None:
    line = [waiting(1, 4)]
    assert next_grant(line, num_held={B: 1}, num_free_blocks={A: 5}, max_num_seqs=8, num_reserved_blocks=2) is None
    assert next_grant(line, num_held={}, num_free_blocks={A: 4}, max_num_seqs=8, num_reserved_blocks=2) == "s1"


# ---------------------------------------------------------------- chunks


def test_a_chunk_that_does_not_finish_its_prompt_ends_on_a_block_boundary() -> None:
    (first,) = fill_step([prompt(1, 100)], 50)
    assert (first.start, first.num_tokens, first.is_last) == (0, 48, False)
    (last,) = fill_step([prompt(1, 100, num_done=48)], 60)
    assert (last.start, last.num_tokens, last.is_last) == (48, 52, True)


def test_a_budget_below_one_block_still_advances() -> None:
    (chunk,) = fill_step([prompt(1, 100, num_done=3)], 5)
    assert (chunk.start, chunk.num_tokens) == (3, 5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 199)), min_size=1, max_size=8), st.integers(1, 300))
def test_chunks_keep_to_the_budget_the_order_and_their_prompts(shapes: list[tuple[int, int]], budget: int) -> None:
    prompts = [prompt(i, done + left, num_done=done) for i, (left, done) in enumerate(shapes)]
    chunks = fill_step(prompts, budget)
    assert 0 < sum(chunk.num_tokens for chunk in chunks) <= budget
    for chunk, view in zip(chunks, prompts, strict=False):
        assert (chunk.sequence_id, chunk.start) == (view.sequence_id, view.num_done)
        assert 0 < chunk.num_tokens <= view.num_tokens - view.num_done
        assert chunk.is_last == (chunk.start + chunk.num_tokens == view.num_tokens)
    assert all(chunk.is_last for chunk in chunks[:-1])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 2000), st.integers(16, 512))
def test_a_prompt_is_computed_in_contiguous_chunks_to_its_end(num_tokens: int, budget: int) -> None:
    done = 0
    for _ in range(2000):
        (chunk,) = fill_step([prompt(1, num_tokens, num_done=done)], budget)
        assert chunk.start == done
        done += chunk.num_tokens
        if chunk.is_last:
            break
    assert done == num_tokens
