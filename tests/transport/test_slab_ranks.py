"""Slabs between instances: what is gathered from the ranks of one is what travels between CPUs, and fills the ranks of any other."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

import pytest
import stand_in
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.transport.cuda.region import DeviceGrid, DeviceRegion, device_grids
from polymux.transport.cuda.slab import Slab
from polymux.transport.errors import ConfigError
from polymux.transport.head_slices import heads_of, sharded
from polymux.transport.messages import KVLayout
from polymux.transport.region import BlockGrid, Region

NUM_BLOCKS = 10
DEGREES = st.sampled_from((1, 2, 3, 4, 6, 8))

pytestmark = pytest.mark.skipif(stand_in.compiler() is None, reason="no C compiler for the GPU's stand-in")


@pytest.fixture(scope="module")
def slab() -> Iterator[Slab]:
    region = stand_in.region(4096)
    made = Slab(region)
    yield made
    made.close()
    region.close()


def memories_of(layout: KVLayout, whole: Tensor) -> list[Tensor]:
    """Each rank's memory with its heads of whole blocks [N, layer, 2, head, slot, dim]."""
    return [whole[:, :, :, list(heads_of(layout, rank))].contiguous().view(-1).view(torch.uint8) for rank in range(layout.num_ranks)]


def grid_of(layout: KVLayout, memories: list[Tensor]) -> DeviceGrid:
    return device_grids(memories).of_model(layout)


@settings(deadline=None, max_examples=50)
@given(
    num_heads=st.sampled_from((1, 2, 3, 4, 6)),
    from_ranks=DEGREES,
    to_ranks=DEGREES,
    dtype=st.sampled_from(("bfloat16", "float32")),
    count=st.integers(1, NUM_BLOCKS // 2),
    layers=st.sampled_from((range(3), range(1), range(1, 3), range(2, 3))),
    seed=st.integers(0, 1000),
)
def test_whatever_the_degrees_each_rank_gets_its_heads_and_nothing_else(
    slab: Slab, num_heads: int, from_ranks: int, to_ranks: int, dtype: str, count: int, layers: range, seed: int
) -> None:
    assume(not any(num_heads % ranks and ranks % num_heads for ranks in (from_ranks, to_ranks)))
    model = KVLayout(num_layers=3, num_kv_heads=num_heads, head_dim=4, dtype=dtype)
    shape = (NUM_BLOCKS, 3, 2, num_heads, model.block_size, model.head_dim)
    item = {"bfloat16": torch.int16, "float32": torch.int32}[dtype]
    generator = torch.Generator().manual_seed(seed)
    whole, before = (torch.randint(1, 30_000, shape, generator=generator).to(item) for _ in range(2))
    source, target = sharded(model, from_ranks), sharded(model, to_ranks)
    given_memories, got_memories = memories_of(source, whole), memories_of(target, before)
    rng = random.Random(seed)
    source_ids, target_ids = rng.sample(range(NUM_BLOCKS), count), rng.sample(range(NUM_BLOCKS), count)
    slab.memory.zero_()

    slab.gather(grid_of(source, given_memories), source_ids, layers)
    nbytes = count * len(layers) * model.moved_layer_bytes
    assert not slab.memory[nbytes:].any()
    host = BlockGrid(memoryview(given_memories[0].numpy()), source, [memoryview(one.numpy()) for one in given_memories[1:]])
    travels = b"".join(bytes(view) for block_id in source_ids for view in host.views(block_id, layers.start, layers.stop))
    assert slab.memory[:nbytes].numpy().tobytes() == travels  # as from one CPU to another

    grid = grid_of(target, got_memories)
    slab.scatter(grid, target_ids, layers)
    expected = before.clone()
    expected[target_ids, layers.start : layers.stop] = whole[source_ids, layers.start : layers.stop]
    for rank, one in enumerate(grid.ranks):
        assert torch.equal(one.kv, expected[:, :, :, list(heads_of(target, rank))]), rank

    slab.memory.zero_()
    slab.gather_back(grid, count, layers)
    slab.download(nbytes)
    assert slab.checksum(nbytes) == zlib.crc32(travels)  # what the sink compares with the source's


def test_an_instance_has_all_its_memories_on_one_kind_of_device(at_rest: object) -> None:
    region = stand_in.region(4096)
    host = Region.create(4096)
    other = stand_in.OtherRank(region)
    with pytest.raises(ConfigError, match="another is not"):
        region.grids([host])
    with pytest.raises(ConfigError, match="another is not"):
        host.grids([other])
    with pytest.raises(ConfigError, match="2 ranks' memories"):
        DeviceGrid(region.tensor, KVLayout(num_layers=1, num_kv_heads=4, head_dim=4, dtype="float32", num_ranks=4), [other.tensor])
    for one in (other, host, region):
        one.close()


def test_what_is_mapped_is_the_other_rank_s_memory_and_let_go_once(at_rest: object) -> None:
    region = stand_in.region(4096)
    other = stand_in.OtherRank(region)
    again = DeviceRegion.handles(region, [other])[1]
    third = stand_in.MappedRegion(region.runtime, 0, again, 4096, torch.device("cpu"))  # as a peer does that was handed the handle on
    other.tensor[7] = 5
    assert third.tensor[7] == 5 and stand_in.count("maps") == 2
    for one in (third, third, other, other):
        one.close()
    assert stand_in.count("maps") == 0
    region.close()
