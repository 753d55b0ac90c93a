"""Arena and block manager: nothing overlaps, nothing leaks, whatever the order of calls."""

import itertools
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polymux.actors.arena import Arena, Span
from polymux.actors.kv_blocks import BlockManager, BlockPool
from polymux.transport.errors import ConfigError, NoFreeBlocks, OutOfMemory
from polymux.transport.messages import KVLayout
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB

SMALL = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, dtype="float32")  # 8 KiB
ODD = KVLayout(num_layers=3, num_kv_heads=2, head_dim=96, dtype="bfloat16")  # 36 KiB: not a divisor of a slab


def make_arena(nbytes: int = 4 * MIB, reserve: int = 1 * MIB) -> Arena:
    return Arena(Region.create(nbytes), weight_reserve_bytes=reserve, slab_bytes=128 * KIB)


def test_kv_never_takes_the_weight_reserve() -> None:
    arena = make_arena(reserve=1 * MIB)
    slabs = [slab for _ in range(100) if (slab := arena.take_slab()) is not None]
    assert min(slabs) * arena.slab_bytes == 1 * MIB
    assert arena.place_weights(1 * MIB, 0) == Span(0, 1 * MIB)
    arena.check()


def test_the_border_moves_both_ways() -> None:
    arena = make_arena(reserve=0)
    span = arena.place_weights(3 * MIB, 0)
    assert arena.num_free_slabs == 8
    with pytest.raises(OutOfMemory):
        arena.place_weights(2 * MIB, 3 * MIB)
    arena.free_weights(span)
    assert arena.num_free_slabs == 32
    while arena.take_slab() is not None:
        pass
    with pytest.raises(OutOfMemory):
        arena.place_weights(1, 0)


def test_a_gap_between_weights_is_used_again() -> None:
    arena = make_arena()
    spans = [arena.place_weights(100_000, offset) for offset in (0, 100_096, 200_192)]
    arena.free_weights(spans[1])
    assert arena.place_weights(90_000, 100_096) == Span(100_096, 90_000)
    with pytest.raises(OutOfMemory):
        arena.place_weights(90_000, 150_016)
    arena.check()


def test_blocks_are_given_all_or_none() -> None:
    manager = BlockManager(make_arena())
    pool = manager.pool(SMALL)
    taken = pool.allocate(pool.num_free)
    with pytest.raises(NoFreeBlocks):
        pool.allocate(1)
    pool.free(taken)
    assert manager.num_out == 0
    manager.check()


def test_an_empty_slab_serves_another_shape() -> None:
    manager = BlockManager(make_arena())
    small, odd = manager.pool(SMALL), manager.pool(ODD)
    taken = small.allocate(small.num_free)
    with pytest.raises(NoFreeBlocks):
        odd.allocate(1)
    small.free(taken)
    assert len(odd.allocate(1)) == 1
    manager.check()


def test_a_block_is_a_view_of_the_arena_at_its_grid_place() -> None:
    arena = make_arena()
    pool = BlockManager(arena).pool(ODD)
    block_id = pool.allocate(1)[0]
    pool.kv[block_id] = 1.0
    lit = arena.memory.nonzero().flatten()
    start = block_id * ODD.block_bytes
    assert start <= int(lit[0]) and int(lit[-1]) < start + ODD.block_bytes


def test_freeing_a_block_twice_is_an_error() -> None:
    pool = BlockManager(make_arena()).pool(SMALL)
    ids = pool.allocate(2)
    pool.free(ids)
    with pytest.raises(KeyError):
        pool.free(ids)


def test_a_block_larger_than_a_slab_is_refused_with_the_remedy() -> None:
    huge = KVLayout(num_layers=40, num_kv_heads=8, head_dim=128, dtype="float32")
    with pytest.raises(ConfigError, match="raise arena_bytes"):
        BlockManager(make_arena()).pool(huge)


class ArenaMachine(RuleBasedStateMachine):
    """Random weights and blocks of two shapes in one arena; `check` after every call."""

    @initialize()
    def start(self) -> None:
        self.arena = make_arena(2 * MIB, 256 * KIB)
        self.manager = BlockManager(self.arena)
        self.held: list[tuple[KVLayout, list[int]]] = []
        self.weights: list[Span] = []

    @rule(layout=st.sampled_from((SMALL, ODD)), count=st.integers(0, 40))
    def allocate(self, layout: KVLayout, count: int) -> None:
        pool = self.manager.pool(layout)
        free = pool.num_free
        try:
            self.held.append((layout, pool.allocate(count)))
        except NoFreeBlocks:
            assert free < count

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            layout, ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.manager.pool(layout).free(ids)

    @rule(nbytes=st.integers(1, 600_000), unit=st.integers(0, 8192))
    def place(self, nbytes: int, unit: int) -> None:
        with suppress(OutOfMemory):
            self.weights.append(self.arena.place_weights(nbytes, unit * 256))

    @rule(data=st.data())
    def unplace(self, data: st.DataObject) -> None:
        if self.weights:
            self.arena.free_weights(self.weights.pop(data.draw(st.integers(0, len(self.weights) - 1))))

    @invariant()
    def nothing_overlaps(self) -> None:
        self.manager.check()
        ranges = [(i * layout.block_bytes, (i + 1) * layout.block_bytes) for layout, ids in self.held for i in ids]
        ranges += [(span.offset, span.end) for span in self.weights]
        ranges.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))

    def teardown(self) -> None:
        for layout, ids in self.held:
            self.manager.pool(layout).free(ids)
        assert self.manager.num_out == 0


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_model_may_be_added_while_the_engine_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = BlockManager(make_arena())
    manager.pool(SMALL)

    def count(pool: BlockPool) -> int:
        manager.pool(ODD)  # another thread, at the worst moment
        return len(pool._holders)

    monkeypatch.setattr(BlockPool, "num_out", property(count))
    assert manager.num_out == 0
    assert manager.pool(ODD) is manager.pool(ODD)
