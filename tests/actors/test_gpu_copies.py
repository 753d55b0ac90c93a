"""The order of copies beside a GPU's steps, on streams that are as late as their events allow: no byte is read or overwritten too early."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_images import GROUP_BYTES, FakeImages
from hypothesis import given, settings
from hypothesis import strategies as st
from late_runtime import LateRuntime
from torch import Tensor

from polymux.actors.arena import Arena
from polymux.actors.copier import Copied, Copier, runs
from polymux.actors.gpu.device import CudaDevice
from polymux.actors.gpu.graphs import CudaGraphs
from polymux.actors.gpu.pinned import PinnedMaps
from polymux.actors.weights.residency import Residency
from polymux.transport.errors import CheckpointError
from polymux.transport.units import KIB, ModelName

A, B, C = ModelName("a"), ModelName("b"), ModelName("c")
SEEDS = st.one_of(st.none(), st.integers(0, 1000))


def device_of(runtime: LateRuntime) -> CudaDevice:
    return CudaDevice(runtime, CudaGraphs())  # type: ignore[arg-type]


@contextmanager
def residency_on(runtime: LateRuntime, images: FakeImages, num_groups: int) -> Iterator[Residency]:
    device = device_of(runtime)
    reserve = num_groups * GROUP_BYTES
    arena = Arena(device.create(reserve + 2 * GROUP_BYTES), weight_reserve_bytes=reserve, slab_bytes=GROUP_BYTES, device=device)
    for _ in range(2):
        arena.take_slab()
    residency = Residency(arena, images)
    arena.make_way = residency.vacate
    yield residency
    residency.close()
    device.close()
    assert not runtime.registered and not runtime.waiting
    images.close()


def compute_group(runtime: LateRuntime, residency: Residency, group: int, seen: list[tuple[str, int, bytes]]) -> None:
    """What a layer does: the device reads its weights, when its turn comes."""
    assert residency.active is not None
    model, weights = residency.active, residency.residents[residency.active].weights
    part = weights[group * GROUP_BYTES : (group + 1) * GROUP_BYTES]
    runtime.compute.put(lambda: seen.append((model, group, part.numpy().tobytes())))


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.lists(st.sampled_from("abc"), min_size=1, max_size=7), st.booleans(), st.booleans(), st.booleans())
def test_layers_compute_with_their_own_weights_whatever_the_copies_order(
    seed: int | None, switches: list[str], can_pin: bool, fits_two: bool, is_eager: bool
) -> None:
    runtime, images = LateRuntime(seed, can_pin, is_eager), FakeImages({A: 5, B: 4, C: 5})
    seen: list[tuple[str, int, bytes]] = []
    with residency_on(runtime, images, 10 if fits_two else 6) as residency:
        for name, following in zip(switches, [*switches[1:], None], strict=True):
            if residency.active != name:
                residency.switch(images.spec(name))
            if following is not None:
                residency.prefetch(images.spec(following))
            num_groups = len(images.data[ModelName(name)]) // GROUP_BYTES
            for group in range(num_groups):
                if group >= 1:
                    residency.await_layer(group - 1)
                compute_group(runtime, residency, group, seen)
            residency.check()
        runtime.synchronize()
    for model, group, found in seen:
        assert found == images.data[ModelName(model)][group * GROUP_BYTES : (group + 1) * GROUP_BYTES]
    assert [model for model, _, _ in seen] == [name for name in switches for _ in range(len(images.data[ModelName(name)]) // GROUP_BYTES)]


def test_a_damaged_image_is_found_before_it_computes() -> None:
    runtime, images = LateRuntime(), FakeImages({A: 5, B: 5})
    with residency_on(runtime, images, 6) as residency:
        residency.switch(images.spec("b"))
        images.faults[A] = "damaged"
        with pytest.raises(CheckpointError, match="group4"):
            residency.switch(images.spec("a"))
        assert residency.active == B


def test_an_image_that_is_not_sealed_is_refused() -> None:
    runtime, images = LateRuntime(), FakeImages({A: 5}, is_sealed=False)
    with residency_on(runtime, images, 6) as residency, pytest.raises(CheckpointError, match="not sealed"):
        residency.switch(images.spec("a"))


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
def test_moved_weights_are_the_same_bytes_wherever_they_overlap(seed: int | None, size: int, source: int, target: int) -> None:
    runtime = LateRuntime(seed)
    device = device_of(runtime)
    region = device.create(80)
    content = torch.randint(0, 256, (size,), dtype=torch.uint8)
    runtime.compute.copy(device.tensor(region)[source : source + size], content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polymux.actors.gpu.device.MOVE_BYTES", 7)
        device.move(region, source, target, size)
    device.mark().wait()
    assert torch.equal(device.tensor(region)[target : target + size], content)


def blocks_of(memory: Tensor) -> Tensor:
    return memory.view(-1, 2, 4)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(0, 1000))
def test_blocks_leave_with_what_was_computed_and_come_back_the_same(seed: int | None, shuffle: int) -> None:
    rng, runtime = random.Random(shuffle), LateRuntime(seed)
    device = device_of(runtime)
    device.pinned = PinnedMaps(runtime, chunk_bytes=24)  # chunks that blocks straddle  # type: ignore[arg-type]
    kv, host = blocks_of(device.tensor(device.create(20 * 8))), blocks_of(torch.zeros(20 * 8, dtype=torch.uint8))
    device_ids, host_ids, back_ids = (rng.sample(range(20), 9) for _ in range(3))
    content = torch.randint(1, 256, (9, 2, 4), dtype=torch.uint8)
    for block_id, block in zip(device_ids, content, strict=True):
        runtime.compute.copy(kv[block_id], block.clone())
    out = device.copy_blocks(kv, device_ids, host, host_ids)
    assert len(list(out)) == len(runs(device_ids, host_ids, 1000))
    assert torch.equal(host[host_ids], content)
    for _ in device.copy_blocks(host, host_ids, kv, back_ids):
        pass
    assert torch.equal(kv[back_ids], content)
    device.close()


def test_a_copy_that_is_cut_off_has_nothing_under_way() -> None:
    runtime = LateRuntime()
    device = device_of(runtime)
    kv, host = blocks_of(device.tensor(device.create(80))), blocks_of(torch.zeros(80, dtype=torch.uint8))
    pieces = device.copy_blocks(kv, [0, 2, 4], host, [1, 3, 5])
    next(pieces)
    pieces.close()
    assert not runtime.waiting
    device.close()


def test_the_copier_hands_blocks_over_when_they_are_there() -> None:
    runtime, ended = LateRuntime(), list[Copied]()
    device = device_of(runtime)
    kv, host = blocks_of(device.tensor(device.create(80))), blocks_of(torch.zeros(80, dtype=torch.uint8))
    copier = Copier(lambda call: call(), copy=device.copy_blocks)
    runtime.compute.copy(kv[3], torch.full((2, 4), 9, dtype=torch.uint8))
    copier.submit(kv, [3], host, [5], ended.append)
    assert copier.close() or ended
    assert ended[0].error is not None or bool((host[5] == 9).all())
    device.close()


# ---------------------------------------------------------------- pinning


@pytest.fixture
def mapped() -> Iterator[memoryview]:
    fd = os.memfd_create("image")
    os.truncate(fd, 40 * KIB)
    view = memoryview(mmap.mmap(fd, 40 * KIB, prot=mmap.PROT_READ))
    os.close(fd)
    yield view


def test_only_what_is_used_is_pinned_and_once(mapped: memoryview) -> None:
    runtime = LateRuntime()
    pinned = PinnedMaps(runtime, chunk_bytes=16 * KIB)  # type: ignore[arg-type]
    number = pinned.use_buffer(mapped)
    sizes = [len(piece) for piece in pinned.pieces(number, number + 15 * KIB, 20 * KIB)]
    assert sizes == [KIB, 16 * KIB, 3 * KIB] and pinned.num_pinned_bytes == 40 * KIB
    assert all(read_only for _, read_only in runtime.registered.values())
    assert len(list(pinned.pieces(number, number, 40 * KIB))) == 3 == len(runtime.registered)
    pinned.forget(mapped)
    assert runtime.registered, "it is in use"
    pinned.release(number)
    assert not runtime.registered


def test_a_map_that_is_used_again_stays_pinned(mapped: memoryview) -> None:
    runtime = LateRuntime()
    pinned = PinnedMaps(runtime, chunk_bytes=16 * KIB)  # type: ignore[arg-type]
    number = pinned.use_buffer(mapped[8 * KIB :])
    list(pinned.pieces(number, number, KIB))
    pinned.release(number)
    assert runtime.registered
    assert pinned.use_buffer(mapped) == number
    pinned.forget(mapped)
    pinned.release(number)
    assert not runtime.registered


def test_no_page_is_pinned_twice_where_memory_begins_within_one() -> None:
    runtime = LateRuntime()
    pinned = PinnedMaps(runtime, chunk_bytes=16 * KIB)  # type: ignore[arg-type]
    memory = torch.frombuffer(mmap.mmap(-1, 64 * KIB), dtype=torch.uint8, offset=100, count=50 * KIB)
    number = pinned.use_tensor(memory)
    first = memory.data_ptr()
    assert sum(len(piece) for piece in pinned.pieces(number, first, 50 * KIB)) == 50 * KIB == pinned.num_pinned_bytes
    pages = [page for at, (size, _) in runtime.registered.items() for page in range(at // 4096, -(-(at + size) // 4096))]
    assert len(pages) == len(set(pages)) and len(runtime.registered) == 4
    pinned.release(number)
    pinned.close()
    assert not runtime.registered


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(mapped: memoryview, caplog: pytest.LogCaptureFixture) -> None:
    pinned = PinnedMaps(LateRuntime(can_pin=False), chunk_bytes=16 * KIB)  # type: ignore[arg-type]
    number = pinned.use_buffer(mapped)
    assert sum(map(len, pinned.pieces(number, number, 40 * KIB))) == 40 * KIB
    assert [record.message.split(" ")[0] for record in caplog.records] == ["memory.not_pinned"]
