"""KV of an instance on GPUs, in rank 0's hands: other ranks' memory mapped by its handle, and copies in order with every rank's steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from late_runtime import LateRuntime, LateStream
from rank_memories import NUM_BLOCKS, RankMemories, layouts, random_blocks
from torch import Tensor

from polymux.actors.gpu.device import CudaDevice
from polymux.actors.gpu.graphs import CudaGraphs
from polymux.actors.gpu.pinned import PinnedMaps
from polymux.actors.kv_blocks import kv_view
from polymux.actors.parallel.weights import RankDevice
from polymux.transport.cuda.region import DeviceRegion, MappedRegion
from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.errors import ConfigError, RankLost
from polymux.transport.head_slices import heads_of
from polymux.transport.nccl.api import LIBRARY_VARIABLE
from polymux.transport.rank_messages import RankMemory

SEEDS = st.one_of(st.none(), st.integers(0, 1000))


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """Which may open its own memory."""
    if stand_in.compiler() is None:
        pytest.skip("no C compiler for the GPU's stand-in")
    stand_in.turn(**stand_in.RESTED)
    yield
    assert stand_in.count("maps") == 0


class SharedRuntime(LateRuntime):
    """A late device whose memory other processes can map."""

    def allocate(self, nbytes: int) -> Tensor:
        taken = stand_in.region(nbytes)
        self.taken: list[DeviceRegion] = [*getattr(self, "taken", ()), taken]
        return taken.tensor

    def give_back(self) -> None:
        for region in self.taken:
            region.close()


def device_of(runtime: LateRuntime) -> CudaDevice:
    return CudaDevice(runtime, CudaGraphs(), CudaRuntime.load(stand_in.library()))  # type: ignore[arg-type]


class OneProcess(RankMemories):
    """Every rank's device and memory in this process, and what joins their steps: rank 0 sums what all have handed over."""

    def __init__(self, runtime: LateRuntime, num_ranks: int, nbytes: int) -> None:
        self.lost = None
        self.runtime = runtime
        self.device = device_of(runtime)
        self.region = self.device.create(nbytes)
        self.followers = [device_of(runtime) for _ in range(num_ranks - 1)]
        lent = [follower.lend(follower.create(nbytes)) for follower in self.followers]
        self.regions = tuple(self.device.borrow(memory, nbytes) for memory in lent)
        self.streams: list[LateStream] = [runtime.compute, *(runtime.stream() for _ in self.followers)]

    def write(self, arenas: list[Tensor], block_ids: list[int], layout: Any, values: Tensor) -> None:
        """A step, in which each rank writes its heads of some blocks on its own stream, and a sum at its end on rank 0's."""
        for rank, (stream, arena) in enumerate(zip(self.streams, arenas, strict=True)):
            part = values[:, :, :, list(heads_of(layout, rank))]
            stream.put(lambda arena=arena, part=part: arena.__setitem__(block_ids, part))  # type: ignore[misc]
        for stream in self.streams[1:]:
            self.runtime.compute.wait(stream.record())

    def close(self) -> None:
        for region in self.regions:
            region.close()


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.booleans(), st.sampled_from(((2, 2), (4, 2), (2, 4), (1, 2))), st.integers(0, 1000))
def test_blocks_leave_with_what_every_rank_has_computed_and_come_back_to_all(
    seed: int | None, is_eager: bool, shape: tuple[int, int], shuffle: int
) -> None:
    num_heads, num_ranks = shape
    layout, whole = layouts(num_heads, num_ranks)
    runtime, rng = SharedRuntime(seed, is_eager=is_eager), random.Random(shuffle)
    ranks = OneProcess(runtime, num_ranks, NUM_BLOCKS * layout.block_bytes)
    ranks.device.pinned = PinnedMaps(runtime, chunk_bytes=1024)  # chunks that blocks straddle  # type: ignore[arg-type]
    device = RankDevice(ranks.device, ranks, ranks.region)
    arenas = [kv_view(memory, layout) for memory in (ranks.device.tensor(ranks.region), *ranks.memories)]
    host = kv_view(torch.zeros(NUM_BLOCKS * whole.block_bytes, dtype=torch.uint8), whole)
    away, at_host, back = (rng.sample(range(NUM_BLOCKS), 5) for _ in range(3))
    content, later = random_blocks(shuffle, whole)[:5], random_blocks(shuffle + 1, whole)[:5]
    ranks.write(arenas, away, layout, content)
    for _ in device.copy_blocks(arenas[0], away, host, at_host):
        pass
    ranks.write(arenas, away, layout, later)  # their room is somebody else's now, on every rank
    for _ in device.copy_blocks(host, at_host, arenas[0], back):
        pass
    expected = torch.zeros_like(host)  # the later step's blocks, and over them what came back behind it
    expected[away] = later
    expected[back] = content
    runtime.synchronize()
    for rank, arena in enumerate(arenas):
        assert torch.equal(arena, expected[:, :, :, list(heads_of(layout, rank))]), rank
    device.close()
    ranks.close()
    runtime.give_back()


def test_a_rank_that_cannot_be_reached_is_named_with_what_is_to_be_done() -> None:
    device = device_of(LateRuntime())
    with pytest.raises(ConfigError, match=r"the arena of a rank on GPU-2: cudaIpcOpenMemHandle.*; ranks need GPUs that reach each other"):
        device.borrow(RankMemory(gpu="GPU-2", handle=bytes(64)), 4096)


def test_a_machine_without_nccl_is_told_what_for_before_any_rank_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "libnccl.so"))
    with pytest.raises(RankLost, match=r"several ranks on GPUs sum over NCCL: libnccl cannot be loaded: .*libnccl\.so"):
        device_of(LateRuntime()).meeting_place(tmp_path)


def test_what_is_lent_is_the_region_itself() -> None:
    runtime = SharedRuntime()
    device = device_of(runtime)
    region = device.create(4096)
    lent = device.lend(region)
    mapped = device.borrow(lent, 4096)
    assert isinstance(mapped, MappedRegion) and lent.gpu.startswith("GPU-")
    mapped.tensor[9] = 3
    assert device.tensor(region)[9] == 3
    mapped.close()
    runtime.give_back()
