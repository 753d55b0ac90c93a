"""Tile sizes of attention, by head size, element size, GQA ratio and chip: fixed when a planner is built, so that no step ever tunes.

What a choice compiles to (registers, spills, shared memory) is tested without a GPU; which is fastest, a sweep by the benchmark shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polymux.kernels.gpu.work import TileConfig

BLOCKS_PER_SM = 4  # that the splits of a launch aim at; three of decode run at a time
MIN_SPLIT_KEYS = 256  # shorter parts cost more to combine than they save
ITERATION_BYTES = 32 << 10  # K and V of one decode iteration; two of them are in flight
RESERVED_BYTES = 1 << 10  # of a multiprocessor's shared memory, for each thread block


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """What of a device matters for tile sizes."""

    num_sms: int
    shared_bytes: int  # what one thread block may have

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        """A device that is no GPU, where kernels are interpreted, passes for a small Hopper."""
        if device.type != "cuda":
            return cls(num_sms=8, shared_bytes=227 << 10)
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = properties.shared_memory_per_multiprocessor - RESERVED_BYTES
        return cls(num_sms=properties.multi_processor_count, shared_bytes=shared_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a model's attention is computed on one chip."""

    decode: TileConfig
    prefill: TileConfig
    num_blocks: int  # thread blocks that splits aim at; 0 splits nothing

    @classmethod
    def choose(cls, head_dim: int, item_bytes: int, group: int, chip: Chip, *, batch_invariant: bool) -> Tiles:
        if batch_invariant:
            one = invariant_config(head_dim, item_bytes, group)
            return cls(decode=one, prefill=one, num_blocks=0)
        return cls(
            decode=decode_config(head_dim, item_bytes, group),
            prefill=prefill_config(head_dim, item_bytes, chip),
            num_blocks=BLOCKS_PER_SM * chip.num_sms,
        )


def decode_config(head_dim: int, item_bytes: int, group: int) -> TileConfig:
    """Few rows, many keys: bound by the bytes in flight. A tile holds the group once.

    Triton spends two of the stages on each iteration in flight, for a block id must be there before the block can be asked for.
    """
    block_n = ITERATION_BYTES // (2 * padded_dim(head_dim) * item_bytes)
    return TileConfig(block_m=max(16, _power_of_2(group)), block_n=min(max(block_n, 16), 128), num_warps=4, num_stages=5)


def prefill_config(head_dim: int, item_bytes: int, chip: Chip) -> TileConfig:
    """Many rows: bound by the matrix units. Two warpgroups of 64 rows each; Q, and K and V of two iterations, in shared memory."""
    if item_bytes > 2:
        return TileConfig(block_m=32, block_n=32 if head_dim <= 128 else 16, num_warps=4, num_stages=2)
    width, block_n = 2 * padded_dim(head_dim), 128 if head_dim <= 128 else 64
    while (128 + 4 * block_n) * width > chip.shared_bytes and block_n > 16:
        block_n //= 2
    block_m = 128 if (128 + 4 * block_n) * width <= chip.shared_bytes else 64
    return TileConfig(block_m=block_m, block_n=block_n, num_warps=block_m // 16, num_stages=2)


def invariant_config(head_dim: int, item_bytes: int, group: int) -> TileConfig:
    """One shape of tile for both phases, so that a row's sums and their order never depend on what else is computed."""
    block_n = 32 if head_dim > 128 or item_bytes > 2 else 64
    return TileConfig(block_m=max(64, _power_of_2(group)), block_n=block_n, num_warps=4, num_stages=2)


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: kernels' vectors have a power of two of elements."""
    return max(16, _power_of_2(head_dim))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
