"""The prefix cache: a hit is exact whatever happened before, every block is accounted for, and nothing cached is ever in the way."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from host_tiers import tier_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polymux.actors.arena import Arena, Span
from polymux.actors.host_prefixes import HostPrefixes
from polymux.actors.host_tier import HostTier
from polymux.actors.kv_blocks import BlockManager
from polymux.actors.prefix_cache import PrefixCache
from polymux.disagg.cost import Roofline
from polymux.disagg.reuse import REUSE_HALF_LIFE_S, Worth
from polymux.transport.errors import NoFreeBlocks, OutOfMemory
from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.prefix import marks_of
from polymux.transport.region import Region
from polymux.transport.units import BLOCK_SIZE, KIB, MIB, ModelName, pack_ids, unpack_ids

SMALL = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, dtype="float32")  # 8 KiB
ODD = KVLayout(num_layers=3, num_kv_heads=2, head_dim=48, dtype="float32")  # 36 KiB: no divisor of a slab
BASE = ModelSpec(
    model=ModelName("a"),
    path="",
    digest="a",
    config_json='{"num_hidden_layers": 2}',
    dtype="float32",
    kv=SMALL,
    weight_bytes=1 * MIB,
    vocab_size=1000,
    max_model_len=4096,
    eos_token_ids=(),
)
SPECS = (BASE, replace(BASE, model=ModelName("b"), digest="b"), replace(BASE, model=ModelName("c"), digest="c", kv=ODD))
SYMBOLS = st.lists(st.integers(0, 1), max_size=6)
ALIAS = replace(BASE, model=ModelName("alias"))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Workbench:
    """A cache over an arena, and prompts that are "computed": each block's first number names the prefix that it holds the KV of."""

    def __init__(self, nbytes: int = 2 * MIB, *, host_bytes: int = 0, is_enabled: bool = True) -> None:
        self.arena = Arena(Region.create(nbytes), weight_reserve_bytes=256 * KIB, slab_bytes=128 * KIB)
        self.blocks = BlockManager(self.arena)
        self.clock = Clock()
        self.cache = PrefixCache(self.blocks, self.clock, is_enabled=is_enabled)
        self.names: dict[object, int] = {}
        self.tier: HostTier | None = None
        if host_bytes:
            self.tier = tier_of(host_bytes)
            self.cache.host = HostPrefixes(self.tier)

    def name(self, spec: ModelSpec, salt: str, tokens: Sequence[int]) -> float:
        return float(self.names.setdefault((spec.digest, spec.kv, salt, tuple(tokens)), len(self.names) + 1))

    def begin(self, spec: ModelSpec, salt: str, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Take blocks for a prompt, cached ones first, and compute the rest. Raises NoFreeBlocks."""
        pool = self.blocks.pool(spec.kv)
        found = self.cache.match(spec, salt, pack_ids(tokens))
        self.check_hit(spec, salt, tokens, found)
        try:
            block_ids = found + pool.allocate(spec.kv.num_blocks(len(tokens)) - len(found))
        except NoFreeBlocks:
            pool.free(found)
            raise
        for i in range(len(found), len(block_ids)):
            pool.kv[block_ids[i]].view(-1)[0] = self.name(spec, salt, tokens[: (i + 1) * BLOCK_SIZE])
        return block_ids, len(found)

    def check_hit(self, spec: ModelSpec, salt: str, tokens: Sequence[int], found: Sequence[int]) -> None:
        assert len(found) * BLOCK_SIZE < len(tokens)
        kv = self.blocks.pool(spec.kv).kv
        for i, block_id in enumerate(found):
            assert float(kv[block_id].view(-1)[0]) == self.name(spec, salt, tokens[: (i + 1) * BLOCK_SIZE])

    def serve(self, spec: ModelSpec, tokens: Sequence[int], salt: str = "") -> int:
        """From begin to end; the tokens that came from the cache."""
        block_ids, num_found = self.begin(spec, salt, tokens)
        self.cache.insert(spec, salt, pack_ids(tokens), block_ids)
        self.blocks.pool(spec.kv).free(block_ids)
        self.check()
        return num_found * BLOCK_SIZE

    def check(self) -> None:
        self.blocks.check()
        self.cache.check()
        if self.tier is not None:
            self.tier.blocks.check()
            assert self.tier.blocks.num_out == 0


def prompt(*symbols: int, rest: int = 1) -> list[int]:
    """A block of each symbol, and some tokens more."""
    return [symbol for symbol in symbols for _ in range(BLOCK_SIZE)] + [999] * rest


def test_a_prompt_that_came_before_is_found_but_for_its_last_token() -> None:
    bench = Workbench()
    assert bench.serve(BASE, prompt(1, 2, 3, rest=0)) == 0
    assert bench.serve(BASE, prompt(1, 2, 3, rest=0)) == 2 * BLOCK_SIZE
    assert bench.serve(BASE, prompt(1, 2, 3, rest=1)) == 3 * BLOCK_SIZE
    assert bench.serve(BASE, prompt(1, 2, 9)) == 2 * BLOCK_SIZE
    assert bench.serve(BASE, prompt(2, 2, 3)) == 0


def test_models_and_salts_share_nothing_and_names_of_one_model_share_all() -> None:
    bench = Workbench()
    bench.serve(BASE, prompt(1, 2))
    assert bench.serve(SPECS[1], prompt(1, 2)) == 0
    assert bench.serve(BASE, prompt(1, 2), "salt") == 0
    assert bench.serve(ALIAS, prompt(1, 2)) == 2 * BLOCK_SIZE
    assert bench.serve(BASE, prompt(1, 2), "salt") == 2 * BLOCK_SIZE


def test_a_shared_block_is_out_until_its_last_holder_frees_it() -> None:
    bench = Workbench()
    bench.serve(BASE, prompt(1, 2))
    pool = bench.blocks.pool(SMALL)
    first, _ = bench.begin(BASE, "", prompt(1, 2))
    second, _ = bench.begin(BASE, "", prompt(1, 2))
    assert first[:2] == second[:2] and first[2] != second[2] and pool.num_out == 4
    pool.free(first)
    assert pool.num_out == 3 and not pool.is_idle(second[0])
    pool.free(second)
    assert pool.num_out == 0 and pool.is_idle(second[0])
    with pytest.raises(KeyError):
        pool.free(second)
    with pytest.raises(KeyError):
        pool.share([second[0], second[2]])
    bench.check()


def test_cached_blocks_count_as_free_and_go_when_room_is_wanted() -> None:
    bench = Workbench()
    pool = bench.blocks.pool(SMALL)
    whole = pool.num_free
    for symbol in range(20):
        bench.serve(BASE, prompt(symbol, symbol, symbol, rest=0))
    assert bench.cache.num_blocks == 60 and bench.blocks.num_out == 0 and pool.num_free == whole
    everything = pool.allocate(whole)
    assert bench.cache.num_blocks == 0
    pool.free(everything)
    bench.check()


def test_cached_blocks_of_an_idle_model_do_not_starve_another_layout() -> None:
    bench = Workbench()
    small, odd = bench.blocks.pool(SMALL), bench.blocks.pool(ODD)
    whole = odd.num_free
    for symbol in range(200):
        bench.serve(BASE, prompt(symbol))
    assert small.num_idle > 100 and odd.num_free == whole
    odd.free(odd.allocate(whole))
    assert bench.cache.num_blocks == 0
    bench.check()


def test_the_prefix_used_longest_ago_goes_first_and_from_its_end() -> None:
    bench = Workbench()
    pool = bench.blocks.pool(SMALL)
    for symbol in (1, 2):
        bench.serve(BASE, prompt(symbol, symbol, symbol))
        bench.clock.now_s += 1
    bench.serve(BASE, prompt(1))  # the first block of the older one is used again
    held = pool.allocate(pool.num_free - 4)
    assert bench.serve(BASE, prompt(1, 1, 1, rest=0)) == BLOCK_SIZE
    pool.free(held)
    bench.check()


def test_held_blocks_are_never_reclaimed() -> None:
    bench = Workbench()
    pool = bench.blocks.pool(SMALL)
    bench.serve(BASE, prompt(1, 2, 3))
    block_ids, _ = bench.begin(BASE, "", prompt(1, 2, 3))
    others = pool.allocate(pool.num_free)
    assert not set(others) & set(block_ids)
    with pytest.raises(NoFreeBlocks):
        pool.allocate(1)
    bench.check_hit(BASE, "", prompt(1, 2, 3), block_ids[:3])
    pool.free(others)
    pool.free(block_ids)
    assert bench.serve(BASE, prompt(1, 2, 3)) == 3 * BLOCK_SIZE


def test_a_cache_that_is_off_keeps_nothing() -> None:
    bench = Workbench(is_enabled=False)
    assert [bench.serve(BASE, prompt(1, 2)) for _ in range(2)] == [0, 0]
    assert bench.arena.num_free_slabs == bench.arena.max_kv_slabs


def test_a_prompt_half_done_goes_on_with_what_others_have_computed() -> None:
    bench = Workbench()
    bench.serve(BASE, prompt(1, 2, 3, 4))
    found = bench.cache.match(BASE, "", pack_ids(prompt(1, 2, 3, 7)), first_block=1)
    assert len(found) == 2
    bench.blocks.pool(SMALL).free(found)
    assert bench.cache.match(BASE, "", pack_ids(prompt(1, 7)), first_block=1) == []
    bench.check()


def test_the_router_is_told_what_was_used_last() -> None:
    bench = Workbench()
    for spec in SPECS:
        bench.clock.now_s += 1
        bench.serve(spec, prompt(1, 2), "s")
    marks = unpack_ids(bench.cache.marks())
    assert len(marks) == len(set(marks)) == 6
    expected = [unpack_ids(marks_of(spec, "s", [pack_ids(prompt(1, 2))])) for spec in SPECS]
    assert set(marks) == {mark for one in expected for mark in one}
    assert set(marks[:2]) == set(expected[-1])


def test_what_leaves_the_arena_comes_back_from_the_host_tier() -> None:
    bench = Workbench(host_bytes=4 * MIB)
    for spec in SPECS:
        bench.serve(spec, prompt(1, 2, 3), "s")
        bench.cache.release(1 << 40)
        assert bench.cache.num_blocks == 0
        marks = unpack_ids(bench.cache.marks())
        assert marks[:3] != [] and set(unpack_ids(marks_of(spec, "s", [pack_ids(prompt(1, 2, 3))]))) <= set(marks)
        assert bench.serve(spec, prompt(1, 2, 3), "t") == 0
        assert bench.serve(spec, prompt(1, 2, 7), "s") == 2 * BLOCK_SIZE
        assert bench.serve(spec, prompt(1, 2, 3), "s") == 3 * BLOCK_SIZE
    assert bench.cache.host is not None and bench.cache.host.num_blocks >= 9


def test_a_prefix_may_lie_on_both_levels() -> None:
    bench = Workbench(host_bytes=4 * MIB)
    pool = bench.blocks.pool(SMALL)
    bench.serve(BASE, prompt(1, 2, 3, 4))
    held, _ = bench.begin(BASE, "", prompt(1, 2))
    pool.free(pool.allocate(pool.num_free))
    assert bench.cache.num_blocks == 2
    found = bench.cache.match(BASE, "", pack_ids(prompt(1, 2, 3, 4)), first_block=1)
    assert len(found) == 3
    pool.free(found + held)
    assert bench.serve(BASE, prompt(1, 2, 3, 4)) == 4 * BLOCK_SIZE


def test_cached_blocks_leave_half_of_the_host_tier_and_give_the_rest_to_swaps() -> None:
    bench = Workbench(host_bytes=1 * MIB)
    pool = bench.blocks.pool(SMALL)
    for symbol in range(200):
        bench.serve(BASE, prompt(symbol))
        pool.free(pool.allocate(pool.num_free))
    assert bench.tier is not None and bench.tier.num_free_slabs * 2 >= bench.tier.max_kv_slabs - 2
    assert bench.serve(BASE, prompt(199)) == BLOCK_SIZE and bench.serve(BASE, prompt(0)) == 0
    host = bench.tier.pool(ODD)
    assert host is not None
    host.free(host.allocate(bench.tier.max_kv_slabs * host.blocks_per_slab))
    assert bench.cache.host is not None and bench.cache.host.num_blocks <= 16  # a slab, which was not needed after all
    bench.check()


def test_slabs_go_back_to_whoever_wants_bytes_the_least_valuable_first() -> None:
    bench = Workbench()
    slab = bench.arena.slab_bytes
    for symbol in range(32):
        bench.serve(BASE, prompt(symbol))
        bench.clock.now_s += 60
    free, worth = bench.arena.num_free_slabs, bench.cache.value()
    assert bench.cache.num_bytes == (bench.arena.max_kv_slabs - free) * slab and worth > 0
    assert bench.cache.release(slab + 1) == 2 * slab and bench.arena.num_free_slabs == free + 2
    assert bench.cache.value() > worth
    assert bench.serve(BASE, prompt(31)) == BLOCK_SIZE and bench.serve(BASE, prompt(0)) == 0
    bench.cache.release(1 << 40)
    assert bench.arena.num_free_slabs == bench.arena.max_kv_slabs and bench.cache.num_bytes == 0 == bench.cache.num_blocks
    assert bench.cache.value() == 0.0
    bench.check()


def test_cached_blocks_may_be_reclaimed_in_the_middle_of_an_allocation() -> None:
    """The arena asks for bytes back while it is asked for a slab: weights and cached KV make way for each other."""
    bench = Workbench()
    take = bench.arena.take_slab

    def make_way() -> int | None:
        bench.cache.release(bench.arena.slab_bytes)
        return take()

    for symbol in range(100):
        bench.serve(BASE, prompt(symbol))
    bench.arena.take_slab = make_way  # type: ignore[method-assign]
    for pool in (bench.blocks.pool(SMALL), bench.blocks.pool(ODD)):
        held = pool.allocate(pool.num_free)
        bench.check()
        pool.free(held)
        bench.check()
    assert bench.arena.num_free_slabs == bench.arena.max_kv_slabs


def test_worth_falls_with_time_and_rises_with_use() -> None:
    worth = Worth(seconds=0.01, nbytes=1000, copied_bytes=2000).touched(0.0)
    assert worth.per_byte(0.0, 0.0) > worth.per_byte(0.0, REUSE_HALF_LIFE_S) > 0
    assert worth.touched(0.0).per_byte(0.0, 0.0) > worth.per_byte(0.0, 0.0)
    assert replace(worth, seconds=0.02).per_byte(0.0, 0.0) == pytest.approx(2 * worth.per_byte(0.0, 0.0))


def test_a_block_is_kept_on_the_host_where_copying_all_ranks_shares_is_quicker_than_computing() -> None:
    worth = Worth(seconds=0.001, nbytes=1000, copied_bytes=2000)
    assert worth.pays_a_copy
    assert not replace(worth, copied_bytes=2 * int(0.001 * Roofline().copy_bytes_per_s)).pays_a_copy


@dataclass
class Running:
    spec: ModelSpec
    salt: str
    tokens: list[int]
    block_ids: list[int]


class CacheMachine(RuleBasedStateMachine):
    """Prompts of three models under two salts come and go in an arena that holds few of them, beside weights that come and go too."""

    @initialize()
    def start(self) -> None:
        self.bench = Workbench(1 * MIB)
        self.running: list[Running] = []
        self.weights: list[Span] = []

    @rule(spec=st.sampled_from(SPECS), salt=st.sampled_from(("", "s")), symbols=SYMBOLS, rest=st.integers(1, 16))
    def begin(self, spec: ModelSpec, salt: str, symbols: list[int], rest: int) -> None:
        tokens = prompt(*symbols, rest=rest)
        free, wanted = self.bench.blocks.pool(spec.kv).num_free, spec.kv.num_blocks(len(tokens))
        try:
            block_ids, _ = self.bench.begin(spec, salt, tokens)
        except NoFreeBlocks:
            assert free < wanted, "cached blocks were in the way"
        else:
            self.running.append(Running(spec, salt, tokens, block_ids))

    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        """Some of a prompt's blocks are final: chunks end anywhere."""
        if self.running:
            one = data.draw(st.sampled_from(self.running))
            done = one.tokens[: data.draw(st.integers(0, len(one.tokens)))]
            self.bench.cache.insert(one.spec, one.salt, pack_ids(done), one.block_ids)

    @rule(data=st.data(), is_kept=st.booleans())
    def end(self, data: st.DataObject, is_kept: bool) -> None:
        if self.running:
            one = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            if is_kept:
                self.bench.cache.insert(one.spec, one.salt, pack_ids(one.tokens), one.block_ids)
            self.bench.blocks.pool(one.spec.kv).free(one.block_ids)

    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        """A prompt half done takes over what others have computed meanwhile."""
        if self.running:
            one = data.draw(st.sampled_from(self.running))
            first = data.draw(st.integers(0, len(one.tokens) // BLOCK_SIZE))
            found = self.bench.cache.match(one.spec, one.salt, pack_ids(one.tokens), first_block=first)
            self.bench.blocks.pool(one.spec.kv).free(one.block_ids[first : first + len(found)])
            one.block_ids[first : first + len(found)] = found

    @rule(spec=st.sampled_from(SPECS), share=st.floats(0, 1))
    def fill(self, spec: ModelSpec, share: float) -> None:
        pool = self.bench.blocks.pool(spec.kv)
        pool.free(pool.allocate(int(pool.num_free * share)))

    @rule(nbytes=st.integers(1, 300_000), unit=st.integers(0, 2048))
    def place(self, nbytes: int, unit: int) -> None:
        with suppress(OutOfMemory):
            self.weights.append(self.bench.arena.place_weights(nbytes, unit * 256))

    @rule()
    def unplace(self) -> None:
        if self.weights:
            self.bench.arena.free_weights(self.weights.pop())

    @rule(nbytes=st.integers(0, 400_000))
    def release(self, nbytes: int) -> None:
        before = self.bench.cache.num_bytes
        released = self.bench.cache.release(nbytes)
        assert released >= min(nbytes, before) and self.bench.cache.num_bytes == before - released

    @rule(seconds=st.floats(0, 300))
    def wait(self, seconds: float) -> None:
        self.bench.clock.now_s += seconds

    @invariant()
    def all_is_accounted_for(self) -> None:
        self.bench.check()
        for spec in SPECS:
            held = [block_id for one in self.running if one.spec.kv == spec.kv for block_id in one.block_ids]
            assert self.bench.blocks.pool(spec.kv).num_out == len(set(held))

    @invariant()
    def what_is_held_keeps_its_bytes(self) -> None:
        for one in self.running:
            kv = self.bench.blocks.pool(one.spec.kv).kv
            for i, block_id in enumerate(one.block_ids):
                name = self.bench.name(one.spec, one.salt, one.tokens[: (i + 1) * BLOCK_SIZE])
                assert float(kv[block_id].view(-1)[0]) == name

    def teardown(self) -> None:
        for one in self.running:
            self.bench.blocks.pool(one.spec.kv).free(one.block_ids)
        assert self.bench.blocks.num_out == 0
        self.bench.check()
        for spec in SPECS:
            pool = self.bench.blocks.pool(spec.kv)
            pool.free(pool.allocate(pool.num_free))
        self.bench.check()


class TieredMachine(CacheMachine):
    """The same over a host tier of few slabs, which swaps want too."""

    @initialize()
    def start(self) -> None:
        super().start()
        self.bench = Workbench(1 * MIB, host_bytes=512 * KIB)

    @rule(spec=st.sampled_from(SPECS), share=st.floats(0, 1))
    def swap(self, spec: ModelSpec, share: float) -> None:
        assert self.bench.tier is not None
        host = self.bench.tier.pool(spec.kv)
        assert host is not None
        host.free(host.allocate(int(host.num_free * share)))


TestPrefixCache = CacheMachine.TestCase
TestTieredPrefixCache = TieredMachine.TestCase
TestTieredPrefixCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPrefixCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
