"""Tile sizes of attention, keyed by head size, element size and GQA ratio: chosen here, once, so that no step ever tunes."""

from __future__ import annotations

from polymux.kernels.gpu.work import TileConfig

WAVES = 4  # thread blocks a multiprocessor that a decode launch is cut into, counting splits: about two rounds of two at a time
MIN_SPLIT_KEYS = 256  # shorter parts cost more to combine than they save
STAGE_BYTES = 32 << 10  # K and V of one decode iteration: three in flight are 96 KiB, and two thread blocks fit a multiprocessor


def decode_config(head_dim: int, item_bytes: int, group: int) -> TileConfig:
    """Few rows, many keys: bound by how many bytes are in flight. A tile holds the group once."""
    block_n = STAGE_BYTES // (2 * padded_dim(head_dim) * item_bytes)
    return TileConfig(block_m=max(16, _power_of_2(group)), block_n=min(max(block_n, 16), 128), num_warps=4, num_stages=3, one_loop=True)


def prefill_config(head_dim: int, item_bytes: int) -> TileConfig:
    """Many rows: bound by the matrix units. Two warpgroups of 64 rows each; K and V of two iterations in shared memory beside Q."""
    if item_bytes > 2:
        return TileConfig(block_m=64, block_n=32 if head_dim <= 128 else 16, num_warps=4, num_stages=2, one_loop=False)
    wide = head_dim > 128
    return TileConfig(block_m=128, block_n=64 if wide else 128, num_warps=8, num_stages=2, one_loop=False)


def invariant_config(head_dim: int, item_bytes: int, group: int) -> TileConfig:
    """One shape of tile for both phases, so that a row's sums and their order never depend on what else is computed."""
    block_n = 32 if head_dim > 128 or item_bytes > 2 else 64
    return TileConfig(block_m=max(64, _power_of_2(group)), block_n=block_n, num_warps=4, num_stages=2, one_loop=True)


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: what the kernel's vectors of a power of two can hold."""
    return max(16, _power_of_2(head_dim))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
