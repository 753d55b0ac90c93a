"""Memory of the scripted peers: of one rank or several, on the host or on a device, and what is written to it and read again."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from polymux.transport.head_slices import heads_of, sharded
from polymux.transport.messages import KVLayout
from polymux.transport.region import BlockGrid, Region

NUM_BLOCKS = 256  # of the small layout, in either region
LAYOUTS = {
    "small": KVLayout(num_layers=4, num_kv_heads=2, head_dim=16, dtype="bfloat16", block_size=16),  # 8 KiB a block
    "large": KVLayout(num_layers=8, num_kv_heads=2, head_dim=16, dtype="float32", block_size=16),  # 32 KiB a block
}


def pattern(sequence_id: str, num_blocks: int, layout: KVLayout) -> Any:
    """What a sequence's KV is: different in every layer of every block."""
    words = layout.moved_layer_bytes // 8
    block, layer, word = np.ogrid[:num_blocks, : layout.num_layers, :words]
    seed = np.uint64(zlib.crc32(sequence_id.encode()) << 32)
    return seed + ((block << 16) + (layer << 10) + word).astype(np.uint64)


def num_units(layout: KVLayout) -> int:
    """Blocks of the small layout that one of this layout is as large as, on as many ranks."""
    return layout.block_bytes // sharded(LAYOUTS["small"], layout.num_ranks).block_bytes


def region_bytes(num_ranks: int) -> int:
    """Of each rank."""
    return NUM_BLOCKS * sharded(LAYOUTS["small"], num_ranks).block_bytes


def regions_of(config: dict[str, Any], side: int) -> list[Any]:
    """`gpu`: "stand-in", or "cuda" for a real one; `limits` are those of its communicators. `ranks`: of the source and of the sink (side 0
    and 1). `handles`: what processes of the other ranks have, in hexadecimal; without them this process has the memory of all ranks."""
    num_ranks = config.get("ranks", (1, 1))[side]
    nbytes = region_bytes(num_ranks)
    if "gpu" not in config:
        return [Region.wrap(bytearray(nbytes)) if config.get("plain") else Region.create(nbytes) for _ in range(num_ranks)]
    from polymux.transport.cuda.mover import Mover
    from polymux.transport.cuda.region import DeviceRegion, MappedRegion
    from polymux.transport.nccl.comm import CommLimits

    if config["gpu"] == "cuda":
        region = DeviceRegion.create(nbytes)
    else:
        import stand_in

        region = stand_in.region(nbytes, config.get("nccl_path"))
    fence = {"fence": config["fence"]} if "fence" in config else {}
    region._mover = Mover(region, nccl_path=region._nccl_path, limits=CommLimits(**config.get("limits", {})), **fence)
    if "handles" in config:
        handles = map(bytes.fromhex, config["handles"])
        others = [MappedRegion(region.runtime, region.index, handle, nbytes, region.device) for handle in handles]
    else:
        others = [stand_in.OtherRank(region) for _ in range(num_ranks - 1)]
    return [region, *others]


def words_of(region: Any, layout: KVLayout) -> Any:
    """A rank's blocks: [block, layer, k|v, head, 64-bit word]."""
    if isinstance(region, Region):
        return BlockGrid(region.buffer, layout).heads
    import torch

    from polymux.transport.cuda.region import DeviceGrid

    grid = DeviceGrid(region.tensor, layout)
    return grid.kv.view(-1).view(torch.int64).view(grid.num_blocks, layout.num_layers, 2, layout.rank_kv_heads, -1)


def write(regions: list[Any], layout: KVLayout, block_ids: list[int], layers: range, cells: Any) -> Any:
    """Put 64-bit words there, on each rank those of its heads; on a GPU, the event after which they are there."""
    shape = (len(block_ids), len(layers), 2, layout.num_kv_heads, layout.head_bytes // 8)
    whole = np.broadcast_to(cells, (*shape[:2], layout.moved_layer_bytes // 8)).reshape(shape)
    shard = sharded(layout, len(regions))
    for rank, region in enumerate(regions):
        part, rows = whole[:, :, :, list(heads_of(shard, rank))], words_of(region, shard)
        if isinstance(region, Region):
            rows[block_ids, layers.start : layers.stop] = part
            continue
        import torch

        ids = torch.tensor(block_ids, device=rows.device)
        rows[ids, layers.start : layers.stop] = torch.from_numpy(part.astype(np.int64)).to(rows.device)
    return regions[0].mark()


def read(regions: list[Any], layout: KVLayout, block_ids: list[int]) -> Any:
    """[block, layer, 64-bit word] of all heads, which those that hold the same ones agree on."""
    shard = sharded(layout, len(regions))
    whole = np.zeros((len(block_ids), layout.num_layers, 2, layout.num_kv_heads, layout.head_bytes // 8), dtype=np.uint64)
    for rank, region in enumerate(regions):
        rows, heads = words_of(region, shard), heads_of(shard, rank)
        part = rows[block_ids] if isinstance(region, Region) else rows[block_ids].cpu().numpy().astype(np.uint64)
        assert not rank or heads.start not in heads_of(shard, rank - 1) or np.array_equal(whole[:, :, :, list(heads)], part), rank
        whole[:, :, :, list(heads)] = part
    return whole.reshape(len(block_ids), layout.num_layers, -1)


def close_all(regions: list[Any]) -> None:
    """The first one last: its mover may copy from the others."""
    if not isinstance(regions[0], Region):
        regions[0].mover.close()
    for region in reversed(regions):
        region.close()
