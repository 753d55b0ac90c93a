"""Which heads lie where, and what is copied where between instances of different degrees: every head arrives once, from who has it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.transport.errors import LayoutMismatch
from polymux.transport.head_slices import check_plan, first_holders, heads_of, num_holders, plan_heads, sharded
from polymux.transport.messages import KVLayout

DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)
MODEL = KVLayout(num_layers=2, num_kv_heads=4, head_dim=8, dtype="float32")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[KVLayout, KVLayout]:
    """One model's KV on two instances."""
    model = replace(MODEL, num_kv_heads=draw(st.integers(1, 16)))
    able = [n for n in DEGREES if model.num_kv_heads % n == 0 or n % model.num_kv_heads == 0]
    return sharded(model, draw(st.sampled_from(able))), sharded(model, draw(st.sampled_from(able)))


@settings(deadline=None)
@given(layouts())
def test_ranks_hold_every_head_and_neighbours_hold_the_same(pair: tuple[KVLayout, KVLayout]) -> None:
    layout = pair[0]
    held = [heads_of(layout, rank) for rank in range(layout.num_ranks)]
    assert [head for rank in first_holders(layout) for head in held[rank]] == list(range(layout.num_kv_heads))
    assert all(len(heads) == layout.rank_kv_heads for heads in held)
    assert all(held[rank] == held[rank - rank % num_holders(layout)] for rank in range(layout.num_ranks))


@settings(deadline=None)
@given(layouts())
def test_a_plan_gives_each_target_head_the_right_one_exactly_once(pair: tuple[KVLayout, KVLayout]) -> None:
    source, target = pair
    got: dict[tuple[int, int], int] = {}
    for one in plan_heads(source, target):
        for i in range(one.num_heads):
            cell = (one.target_rank, one.target_head + i)
            assert cell not in got
            got[cell] = heads_of(source, one.source_rank)[one.source_head + i]
    assert got == {(rank, i): head for rank in range(target.num_ranks) for i, head in enumerate(heads_of(target, rank))}


@settings(deadline=None)
@given(layouts())
def test_ranks_of_the_same_heads_share_the_giving(pair: tuple[KVLayout, KVLayout]) -> None:
    source, target = pair
    givers = [one.source_rank for one in plan_heads(source, target)]
    used = {rank: givers.count(rank) for rank in range(source.num_ranks)}
    if target.num_ranks >= source.num_ranks and target.num_ranks % source.num_ranks == 0:
        assert len(set(used.values())) == 1


@settings(deadline=None)
@given(layouts())
def test_a_wrong_plan_is_refused(pair: tuple[KVLayout, KVLayout]) -> None:
    source, target = pair
    plan = plan_heads(source, target)
    with pytest.raises(LayoutMismatch):
        check_plan(plan[1:], source, target)
    with pytest.raises(LayoutMismatch):
        check_plan((*plan, plan[0]), source, target)
    for wrong in (replace(plan[0], source_rank=source.num_ranks), replace(plan[0], source_head=-1), replace(plan[0], num_heads=0)):
        with pytest.raises(LayoutMismatch):
            check_plan((wrong, *plan[1:]), source, target)


def test_another_model_and_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="cannot fill"):
        plan_heads(MODEL, replace(MODEL, head_dim=16))
    with pytest.raises(LayoutMismatch, match="4 KV heads cannot lie evenly on 3 ranks"):
        sharded(MODEL, 3)


def test_the_layout_hash_is_of_the_model_and_the_bytes_are_of_the_rank() -> None:
    halves, repeated = sharded(MODEL, 2), sharded(MODEL, 8)
    assert MODEL.layout_hash == halves.layout_hash == repeated.layout_hash
    assert halves.block_bytes * 2 == MODEL.block_bytes == repeated.block_bytes * 4
    assert MODEL.moved_layer_bytes == halves.moved_layer_bytes == repeated.moved_layer_bytes == MODEL.layer_bytes
