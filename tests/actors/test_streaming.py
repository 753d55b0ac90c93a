"""Weights that arrive while their first layers compute: order, failure and prefetch; to the bit."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from demo_store import OTHER, SMALL, Store, logits_of, num_pieces
from fake_images import GROUP_BYTES, FakeImages, HeldCopy, manifest_of, residency_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polymux.actors.weights.load import cut
from polymux.transport.errors import CheckpointError, PeerLost, PolymuxError
from polymux.transport.image_maps import ImageMaps
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName

A, B, C = ModelName("a"), ModelName("b"), ModelName("c")


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


# ---------------------------------------------------------------- the order of copies and layers


def test_the_first_layer_computes_before_the_last_has_arrived(store: Store, copy: HeldCopy) -> None:
    engine = store.engine(SMALL)
    engine.activate(SMALL)
    expected = logits_of(engine)
    engine.residency.evict(SMALL)
    copy.num_begun, copy.hold_from = 0, num_pieces(store, SMALL) - 1
    copy.num_begun = 0
    switch = engine.activate(SMALL)
    assert switch is not None and switch.nbytes == store.specs[SMALL].weight_bytes and switch.first_layer_s > 0
    assert not copy.go.is_set()

    def computed(layer: int) -> None:
        if layer == 0:
            copy.go.set()

    assert torch.equal(logits_of(engine, computed), expected)
    assert not copy.timed_out, "the last piece was copied before the first layer had computed"
    assert engine.residency.residents[SMALL].load is None
    engine.close()


def test_an_image_that_was_never_verified_is_loaded_whole_before_it_computes(copy: HeldCopy) -> None:
    images = FakeImages({A: 5})
    residency = residency_of(images, 8)
    residency.switch(images.spec("a"))
    assert residency.residents[A].load is None and copy.num_begun == 5
    residency.close()
    images.close()


def test_an_image_that_could_change_is_verified_each_time(copy: HeldCopy) -> None:
    images = FakeImages({A: 5, B: 5}, is_sealed=False)
    residency = residency_of(images, 8)
    residency.switch(images.spec("a"))
    residency.evict(A)
    images.faults[A] = "damaged"
    with pytest.raises(CheckpointError, match="group4"):
        residency.switch(images.spec("a"))
    assert residency.residents == {}
    residency.check()
    residency.close()
    images.close()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 10))
def test_pieces_cover_an_image_once_in_order(num_groups: int, piece_groups: int) -> None:
    manifest = manifest_of("a", bytes(num_groups * GROUP_BYTES))
    pieces = cut(manifest, piece_groups * GROUP_BYTES - 1)
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == manifest.nbytes
    assert all(end % GROUP_BYTES == 0 for _, end in pieces), "a layer's last byte comes with a piece of the next layer"


# ---------------------------------------------------------------- failure


def test_a_load_that_fails_after_the_first_layer_leaves_the_former_model_serving(store: Store, copy: HeldCopy) -> None:
    engine = store.engine(SMALL, OTHER)
    engine.activate(OTHER)
    engine.activate(SMALL)
    expected = logits_of(engine)
    engine.residency.evict(OTHER)
    copy.hold_from, copy.error = num_pieces(store, OTHER) - 1, OSError("the disk below went away")
    copy.num_begun = 0
    engine.activate(OTHER)
    layers: list[int] = []

    def computed(layer: int) -> None:
        layers.append(layer)
        copy.go.set()

    with pytest.raises(PolymuxError, match="the disk below went away"):
        logits_of(engine, computed)
    assert layers[0] == 0
    engine.residency.check()
    assert engine.residency.active == SMALL and set(engine.residency.residents) == {SMALL}
    assert torch.equal(logits_of(engine), expected)
    engine.close()


def test_a_former_model_that_had_to_leave_is_loaded_again_when_the_stream_fails(store: Store, copy: HeldCopy) -> None:
    engine = store.engine(SMALL)
    for model in (OTHER, SMALL):
        engine.activate(model)
    expected = logits_of(engine)
    copy.hold_from, copy.error = num_pieces(store, OTHER) - 1, OSError("gone")
    copy.num_begun = 0
    switch = engine.activate(OTHER)
    assert switch is not None and switch.evicted == (SMALL,)

    def computed(_layer: int) -> None:
        copy.go.set()

    with pytest.raises(PolymuxError, match="gone"):
        logits_of(engine, computed)
    assert engine.residency.active == SMALL
    assert torch.equal(logits_of(engine), expected)
    engine.residency.check()
    engine.close()


@pytest.mark.parametrize(
    ("fault", "error"), [("damaged", CheckpointError), ("short", CheckpointError), ("renamed", CheckpointError), ("lost", PeerLost)]
)
def test_a_verified_model_whose_new_image_is_bad_is_refused_and_the_former_serves(fault: str, error: type[PolymuxError]) -> None:
    images = FakeImages({A: 5, B: 5})
    residency = residency_of(images, 8)
    for model in "bab":  # b's first image was verified; it is evicted by a, and its next image is another one
        residency.switch(images.spec(model))
    residency.switch(images.spec("a"))
    images.faults[B] = fault
    with pytest.raises(error):
        residency.switch(images.spec("b"))
    assert residency.active == A and bytes(residency.residents[A].weights.numpy()) == images.data[A]
    residency.check()
    residency.close()
    images.close()


# ---------------------------------------------------------------- prefetch


def test_a_prefetched_model_costs_its_switch_no_copy(copy: HeldCopy) -> None:
    images = FakeImages({A: 5, B: 5})
    residency = residency_of(images, 10)
    residency.switch(images.spec("a"))
    assert residency.prefetch(images.spec("b")) and not residency.prefetch(images.spec("b"))
    load = residency.residents[B].load
    assert load is not None
    load.wait()
    loaded: list[ModelName] = []
    residency.on_loaded = lambda done: loaded.append(done.model)
    switch = residency.switch(images.spec("b"))
    assert loaded == [B]
    assert switch.was_prefetched and switch.waited_s == 0.0 and switch.nbytes == 5 * GROUP_BYTES
    assert not residency.switch(images.spec("a")).was_prefetched
    assert residency.switch(images.spec("b")).nbytes == 0
    residency.close()
    images.close()


def test_a_prefetch_never_evicts_the_active_model_nor_a_pinned_one() -> None:
    images = FakeImages({A: 5, B: 5, C: 5})
    residency = residency_of(images, 10)
    residency.switch(images.spec("a", is_pinned=True))
    residency.switch(images.spec("b"))
    assert not residency.prefetch(images.spec("c"))
    assert set(residency.residents) == {A, B}
    residency.close()
    images.close()


def test_a_prefetch_takes_the_room_of_the_model_whose_turn_is_furthest_off() -> None:
    images = FakeImages({A: 5, B: 5, C: 5, ModelName("d"): 5})
    now = 0.0
    residency = residency_of(images, 15, clock=lambda: now)
    for model in "abc":
        now += 1.0
        residency.switch(images.spec(model))
    assert residency.prefetch(images.spec("d"), wanted="abcd")  # a's turn comes round before b's
    assert set(residency.residents) == {A, C, "d"}
    residency.close()
    images.close()


def test_a_prefetch_that_fails_is_forgotten_and_the_next_switch_tries_again(copy: HeldCopy) -> None:
    images = FakeImages({A: 5, B: 5})
    residency = residency_of(images, 10)
    residency.switch(images.spec("a"))
    images.faults[B] = "lost"
    residency.prefetch(images.spec("b"))
    load = residency.residents[B].load
    assert load is not None
    with pytest.raises(PeerLost):
        load.wait()
    residency.settle()
    assert set(residency.residents) == {A} and residency.active == A
    residency.check()
    images.faults.clear()
    residency.switch(images.spec("b"))
    assert bytes(residency.residents[B].weights.numpy()) == images.data[B]
    residency.close()
    images.close()


def test_an_eviction_waits_for_the_copy_under_way_and_nothing_is_written_after_it(copy: HeldCopy) -> None:
    images = FakeImages({A: 5, B: 5})
    residency = residency_of(images, 10)
    residency.switch(images.spec("a"))
    copy.num_begun, copy.hold_from = 0, 2
    residency.prefetch(images.spec("b"))
    assert copy.held.wait(10)
    weights = residency.residents[B].weights
    evicting = threading.Thread(target=residency.evict, args=(B,))
    evicting.start()
    time.sleep(0.05)
    assert evicting.is_alive(), "the range was given back while a piece was being copied into it"
    copy.go.set()
    evicting.join(10)
    weights.fill_(7)
    residency.close()
    assert bool((weights == 7).all()) and copy.num_begun == 3
    images.close()


def test_prefetches_and_evictions_beside_it_do_not_change_what_a_model_computes(store: Store, copy: HeldCopy) -> None:
    engine = store.engine(SMALL, OTHER)
    engine.activate(SMALL)
    expected = logits_of(engine)
    for _ in range(30):
        assert engine.prefetch(OTHER)
        assert torch.equal(logits_of(engine), expected)
        engine.residency.evict(OTHER)
        engine.residency.check()
    engine.close()


# ---------------------------------------------------------------- anything, in any order


SIZES = {ModelName(name): size for name, size in (("a", 2), ("b", 3), ("c", 4), ("d", 5), ("e", 7))}
OPERATIONS = st.one_of(
    st.tuples(st.just("switch"), st.sampled_from(sorted(SIZES)), st.sampled_from(["", "", "", "lost", "damaged", "short"])),
    st.tuples(st.just("prefetch"), st.sampled_from(sorted(SIZES)), st.sampled_from(["", "", "lost", "damaged"])),
    st.tuples(st.just("evict"), st.sampled_from(sorted(SIZES)), st.just("")),
    st.tuples(st.sampled_from(["read", "take", "take", "return"]), st.just(A), st.just("")),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operations=st.lists(OPERATIONS, min_size=1, max_size=25), pinned=st.sampled_from(["", "a", "b"]), num_lent=st.sampled_from([0, 4, 9])
)
def test_whatever_is_switched_prefetched_evicted_or_fails_the_books_and_the_bytes_are_right(
    operations: list[tuple[str, ModelName, str]], pinned: str, num_lent: int, copy: HeldCopy
) -> None:
    images = FakeImages(SIZES)
    residency = residency_of(images, 12, num_lent=num_lent)
    slabs: list[int] = []
    try:
        for operation, model, fault in operations:
            active = residency.active
            images.faults = {model: fault} if fault else {}
            spec: ModelSpec = images.spec(model, is_pinned=model == pinned)
            if operation == "switch":
                try:
                    residency.switch(spec, wanted=(B, C))
                    assert residency.active == model
                except PolymuxError:
                    assert residency.active == active
            elif operation == "prefetch":
                residency.prefetch(spec, wanted=(B, C))
                assert residency.active == active
            elif operation == "evict" and model in residency.residents and model != active:
                residency.evict(model)
            elif operation == "read" and active is not None:
                residency.await_layer(len(images.data[active]) // GROUP_BYTES)
            elif operation == "take":
                num_free, slab = residency.arena.num_free_slabs, residency.arena.take_slab()
                assert (slab is not None) == (num_free > 0), "KV was promised a slab that weights kept"
                assert residency.active == active
                slabs += [slab] if slab is not None else []
            elif operation == "return" and slabs:
                residency.arena.return_slab(slabs.pop())
            residency.check()
            for name, resident in residency.residents.items():
                if resident.load is None:
                    assert bytes(resident.weights.numpy()) == images.data[name]
    finally:
        residency.close()
        assert residency.arena.weight_spans == ()
        images.close()


# ---------------------------------------------------------------- maps of images


def test_a_map_goes_when_its_image_was_not_loaded_for_a_while_and_stays_verified() -> None:
    images = FakeImages({A: 5})
    maps = ImageMaps()
    with images.fetch(A) as image:
        found = maps.open(image.fd, 0.0)
        assert found is not None
        maps.mark_verified(found[0], image.manifest)
        maps.expire(59.0)
        assert len(maps) == 1
        maps.expire(61.0)
        assert len(maps) == 0
        again = maps.open(image.fd, 70.0)
        assert again is not None and maps.is_verified(again[0], image.manifest)
        assert not maps.is_verified(again[0], manifest_of("a", bytes(5 * GROUP_BYTES)).to_bytes())
    images.close()
