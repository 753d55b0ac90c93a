"""Which KV heads lie on which rank, and what must be copied where when KV moves between instances of different degrees. Pure.

A model's heads are split evenly over the ranks; where there are more ranks than heads, each head lies on several neighbouring ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from polymux.transport.errors import LayoutMismatch
from polymux.transport.messages import KVLayout

MAX_RANKS = 64  # of one instance: they share a host


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSlice:
    """Heads [source_head, source_head + num_heads) of a source rank's blocks are heads [target_head, ...) of a target rank's."""

    source_rank: int
    source_head: int
    target_rank: int
    target_head: int
    num_heads: int


def sharded(layout: KVLayout, num_ranks: int) -> KVLayout:
    """The same model's KV on so many ranks. Raises LayoutMismatch where its heads can be neither split nor repeated evenly."""
    if not 1 <= num_ranks <= MAX_RANKS or (layout.num_kv_heads % num_ranks and num_ranks % layout.num_kv_heads):
        raise LayoutMismatch(f"{layout.num_kv_heads} KV heads cannot lie evenly on {num_ranks} ranks; take a divisor or a multiple")
    return replace(layout, num_ranks=num_ranks)


def num_holders(layout: KVLayout) -> int:
    """How many ranks hold the same heads."""
    return max(layout.num_ranks // layout.num_kv_heads, 1)


def heads_of(layout: KVLayout, rank: int) -> range:
    """The model's heads that a rank holds."""
    first = rank // num_holders(layout) * layout.rank_kv_heads
    return range(first, first + layout.rank_kv_heads)


def first_holders(layout: KVLayout) -> range:
    """Ranks that together hold every head once, in the heads' order."""
    return range(0, layout.num_ranks, num_holders(layout))


@cache
def plan_heads(source: KVLayout, target: KVLayout) -> tuple[HeadSlice, ...]:
    """The slices that fill every head of every target rank once. Ranks that hold the same heads share the work of giving them.

    Raises LayoutMismatch for layouts of two models, or of ranks that their heads do not fit.
    """
    if source.layout_hash != target.layout_hash:
        raise LayoutMismatch(f"KV of layout {source.layout_hash} cannot fill blocks of layout {target.layout_hash}")
    source, target = sharded(source, source.num_ranks), sharded(target, target.num_ranks)
    plan: list[HeadSlice] = []
    for target_rank in range(target.num_ranks):
        wanted = heads_of(target, target_rank)
        copy = target_rank % num_holders(source)  # which of those that hold the same heads gives them
        for source_rank in range(copy, source.num_ranks, num_holders(source)):
            held = heads_of(source, source_rank)
            first, end = max(wanted.start, held.start), min(wanted.stop, held.stop)
            if first < end:
                plan.append(
                    HeadSlice(
                        source_rank=source_rank,
                        source_head=first - held.start,
                        target_rank=target_rank,
                        target_head=first - wanted.start,
                        num_heads=end - first,
                    )
                )
    check_plan(plan, source, target)
    return tuple(plan)


def check_plan(plan: list[HeadSlice] | tuple[HeadSlice, ...], source: KVLayout, target: KVLayout) -> None:
    """Raise LayoutMismatch unless the plan gives every target rank each of its heads exactly once, from a rank that holds it."""
    filled: dict[tuple[int, int], int] = {}  # (target rank, its head) -> the model's head that it gets
    for one in plan:
        if not (0 <= one.source_rank < source.num_ranks and 0 <= one.target_rank < target.num_ranks and one.num_heads > 0):
            raise LayoutMismatch(f"{one} names a rank that there is not, or no head")
        held = heads_of(source, one.source_rank)[one.source_head :][: one.num_heads]
        if one.source_head < 0 or len(held) != one.num_heads:
            raise LayoutMismatch(f"{one} reads heads that its source rank does not hold")
        for place, head in enumerate(held, one.target_head):
            if (one.target_rank, place) in filled:
                raise LayoutMismatch(f"{one} fills a head a second time")
            filled[one.target_rank, place] = head
    expected = {(rank, place): head for rank in range(target.num_ranks) for place, head in enumerate(heads_of(target, rank))}
    if filled != expected:
        wrong = sorted(filled.items() ^ expected.items())
        raise LayoutMismatch(f"the plan of {source.num_ranks} to {target.num_ranks} ranks is wrong at (rank, head) {wrong[0][0]}")
