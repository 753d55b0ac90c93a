"""Where weights lie: models that are moved together, and room past the reserve that they borrow from KV; to the bit."""

from __future__ import annotations

import pytest
import torch
from demo_store import OTHER, SMALL, Store, logits_of
from fake_images import FakeImages, HeldCopy, residency_of

from polymux.actors.engine import Engine
from polymux.transport.units import MIB, ModelName

A, B, C = ModelName("a"), ModelName("b"), ModelName("c")


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


# ---------------------------------------------------------------- moves


def test_a_model_that_was_moved_computes_the_same_bits(store: Store) -> None:
    engine = store.engine(SMALL, OTHER)
    for model in (OTHER, SMALL):
        engine.activate(model)
    expected = logits_of(engine)
    engine.residency.evict(OTHER)
    resident = engine.residency.residents[SMALL]
    assert resident.span.offset > 0
    for offset in (resident.span.offset - 512, 0, 1024):  # ranges that overlap, too
        engine.residency._move(resident, offset)
        engine.residency.check()
        assert torch.equal(logits_of(engine), expected)
    engine.close()


def test_models_with_work_are_moved_together_where_no_gap_is_large_enough() -> None:
    images = FakeImages({A: 4, B: 4, C: 4, ModelName("d"): 8})
    residency = residency_of(images, 16)
    for model in "abc":
        residency.switch(images.spec(model))
    residency.evict(B)  # four groups free in the middle, four at the end
    switch = residency.switch(images.spec("d"), wanted=(A, C))
    assert switch.evicted == () and set(residency.residents) == {A, C, "d"}
    for model, resident in residency.residents.items():
        assert bytes(resident.weights.numpy()) == images.data[model]
    residency.check()
    residency.close()
    images.close()


# ---------------------------------------------------------------- room past the reserve


def test_weights_borrow_room_that_no_kv_needs_and_make_way_for_it() -> None:
    images = FakeImages({A: 5, B: 5})
    residency = residency_of(images, 5, num_lent=5)
    for model in "ab":
        residency.switch(images.spec(model))
    assert set(residency.residents) == {A, B} and residency.arena.num_free_slabs == 5
    assert residency.arena.take_slab() is not None
    assert set(residency.residents) == {B} and residency.active == B, "the idle model left, and the active one moved into the reserve"
    assert bytes(residency.residents[B].weights.numpy()) == images.data[B]
    residency.check()
    residency.close()
    images.close()


def test_a_model_that_is_still_loading_keeps_what_it_borrowed_until_it_is_there(copy: HeldCopy) -> None:
    images = FakeImages({A: 5, B: 5})
    residency = residency_of(images, 5, num_lent=5)
    for model in "aba":
        residency.switch(images.spec(model))
    residency.evict(B)
    copy.num_begun, copy.hold_from = 0, 3
    residency.switch(images.spec("b"))
    assert residency.arena.num_free_slabs == 0 and residency.arena.take_slab() is None
    copy.go.set()
    residency.await_layer(5)
    assert residency.arena.num_free_slabs == 5
    residency.close()
    images.close()


class Cache:
    """Cached KV of a given worth."""

    def __init__(self, engine: Engine, worth: float) -> None:
        self._arena, self._worth = engine.arena, worth
        self.slabs = [engine.arena.take_slab(), engine.arena.take_slab()]

    @property
    def num_bytes(self) -> int:
        return len(self.slabs) * self._arena.slab_bytes

    def value(self) -> float:
        return self._worth

    def release(self, nbytes: int) -> int:
        for slab in self.slabs:
            assert slab is not None
            self._arena.return_slab(slab)
        released, self.slabs = self.num_bytes, []
        return released


@pytest.mark.parametrize(("worth", "stays"), [(0.0, True), (1e9, False)])
def test_kv_takes_the_room_of_cached_kv_or_of_borrowing_weights_by_what_a_byte_of_each_is_worth(
    store: Store, worth: float, stays: bool
) -> None:
    engine = store.engine(OTHER, kv_bytes=4 * MIB)
    cache = Cache(engine, worth)
    engine.reclaimers = [cache]
    for model in (SMALL, OTHER):
        engine.activate(model)
    borrowed = next(r for r in engine.residency.residents.values() if r.span.end > engine.arena.weight_reserve_bytes)
    slabs = []
    while (slab := engine.arena.take_slab()) is not None:
        slabs.append(slab)
        if slab * engine.arena.slab_bytes < borrowed.span.end or not cache.slabs or len(engine.residency.residents) < 2:
            break
    assert (len(engine.residency.residents) == 2) == stays and bool(cache.slabs) != stays
    engine.residency.check()
    engine.close()
