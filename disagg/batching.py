"""Which sequences step next: grants, decode batches, chunks of prompts, and who is preempted when blocks run out.

One order rules all of them: first come, first served. The oldest sequence is never preempted, so some sequence always ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from polymux.disagg.views import HolderView, PromptView, RunningView, WaitingView
from polymux.transport.units import BLOCK_SIZE, ModelName, SequenceId


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one prompt."""

    sequence_id: SequenceId
    start: int
    num_tokens: int
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBatch:
    """`step` takes one token each, oldest first, once `preempt` gave its blocks back."""

    step: tuple[SequenceId, ...]
    preempt: tuple[SequenceId, ...]  # youngest first
    num_new_blocks: int  # that `step` needs
    num_short_blocks: int  # that the oldest lacks even so: take them from other models (`choose_victims`) or wait


def form_batch(sequences: Sequence[RunningView], *, max_num_seqs: int, num_free_blocks: int, block_size: int = BLOCK_SIZE) -> DecodeBatch:
    """The next decode step of one model.

    Oldest first, at most `max_num_seqs`. A sequence without room for its next token takes the blocks of the youngest; the youngest
    itself just sits this step out, and loses its blocks only when an older one needs them.
    """
    line = sorted(sequences, key=lambda s: s.order)
    end = len(line)  # line[end:] are preempted
    free = num_free_blocks
    step: list[SequenceId] = []
    num_new = num_short = i = 0
    while i < end and len(step) < max_num_seqs:
        need = max(0, -(-(line[i].context_len + 1) // block_size) - line[i].num_blocks)
        while need > free and end - 1 > i:
            end -= 1
            free += line[end].num_blocks
        if need <= free:
            free -= need
            num_new += need
            step.append(line[i].sequence_id)
        elif i == 0:
            num_short = need - free
        i += 1
    preempt = tuple(s.sequence_id for s in reversed(line[end:]))
    return DecodeBatch(step=tuple(step), preempt=preempt, num_new_blocks=num_new, num_short_blocks=num_short)


def choose_victims(holders: Iterable[HolderView], *, needed_bytes: int, order: int) -> tuple[SequenceId, ...]:
    """Whom to preempt, of any model, so that the sequence of place `order` gets `needed_bytes`: the youngest first, only younger ones.

    Empty when all of them together do not hold enough: preempting would help nobody.
    """
    victims: list[SequenceId] = []
    for holder in sorted(holders, key=lambda h: -h.order):
        if needed_bytes <= 0 or holder.order <= order:
            break
        victims.append(holder.sequence_id)
        needed_bytes -= holder.kv_bytes
    return tuple(victims) if needed_bytes <= 0 else ()


def next_grant(
    waiting: Iterable[WaitingView],
    *,
    num_held: Mapping[ModelName, int],
    num_free_blocks: Mapping[ModelName, int],
    max_num_seqs: int,
    num_reserved_blocks: int = 1,
) -> SequenceId | None:
    """Which waiting sequence gets blocks now; ask again after each, with what is then free.

    `num_held` counts each model's sequences that hold blocks. The oldest goes first, and one that lacks blocks is overtaken by
    nobody, so that a long prompt is not starved by short ones. A model whose batch is full waits aside. `num_reserved_blocks` stay
    free for the growth of those that run, unless none does.
    """
    reserved = num_reserved_blocks if any(num_held.values()) else 0
    for sequence in sorted(waiting, key=lambda s: s.order):
        if num_held.get(sequence.model, 0) >= max_num_seqs:
            continue
        if sequence.num_blocks + reserved <= num_free_blocks.get(sequence.model, 0):
            return sequence.sequence_id
        return None
    return None


def fill_step(prompts: Iterable[PromptView], budget: int, block_size: int = BLOCK_SIZE) -> tuple[Chunk, ...]:
    """Chunks of these prompts, in this order, of at most `budget` tokens together.

    A chunk that does not finish its prompt ends on a block boundary, so that each block is pushed once; a budget too small for
    that is used up all the same. Never empty while a prompt has tokens left and `budget` > 0.
    """
    chunks: list[Chunk] = []
    for prompt in prompts:
        left = prompt.num_tokens - prompt.num_done
        take = min(left, budget)
        if 0 < take < left:
            whole = take - (prompt.num_done + take) % block_size
            take = whole if whole > 0 or chunks else take
        if take <= 0:
            break
        chunks.append(Chunk(sequence_id=prompt.sequence_id, start=prompt.num_done, num_tokens=take, is_last=take == left))
        budget -= take
        if take < left:
            break
    return tuple(chunks)
