"""How Triton's attention (`attend.py`) prepares a step: items of work for short sequences and for long ones, a launch each.

Addresses, shapes and grids of a padded step of short sequences depend on its rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from polymux.kernels.gpu.config import MIN_SPLIT_KEYS, Chip, Tiles, padded_dim
from polymux.kernels.gpu.plan import AttendPlan, AttendSpec, Batch, Workspace, padded_words, put
from polymux.kernels.gpu.staging import ALIGNMENT, Staging, Words
from polymux.kernels.gpu.work import ITEM_WORDS, Queries, Split, TileConfig, cut, num_parts, padding_items


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The items of one kernel launch; the grid is [Hkv, W]."""

    items: Tensor  # [W, ITEM_WORDS] int32
    config: TileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledPlan(AttendPlan):
    block_ids: Tensor  # [N] int32: the block tables one after another; items say where each begins. Its length varies, its address does not
    decode: Launch | None  # sequences of few tokens
    prefill: Launch | None  # chunks
    workspace: Workspace


class TiledAttention:
    def __init__(self, spec: AttendSpec, *, chip: Chip | None = None, tiles: Tiles | None = None) -> None:
        """`chip` and `tiles` in place of the device's and of those that suit it."""
        chip = chip or Chip.of(spec.device)
        self._shape, self._workspace, self._num_sms = spec.shape, spec.workspace, chip.num_sms
        self._group = spec.num_heads // spec.shape.num_kv_heads
        self._tiles = tiles or Tiles.choose(
            spec.shape.head_dim, spec.dtype.itemsize, self._group, chip, batch_invariant=spec.batch_invariant
        )
        self._extra = -(-self._tiles.num_blocks // spec.shape.num_kv_heads)

    def num_words(self, num_rows: int) -> int:
        tiles_per_row = -(-self._group // min(self._tiles.decode.block_m, self._tiles.prefill.block_m))
        return (num_rows * tiles_per_row + self._extra + self._num_sms) * ITEM_WORDS + 2 * ALIGNMENT

    def stage(self, batch: Batch, window: int | None, num_rows: int | None, staging: Staging) -> Callable[[Tensor], AttendPlan]:
        decode, prefill = self._launches(batch.queries, window, num_rows or batch.num_tokens, staging)
        return lambda block_ids: TiledPlan(
            spans=batch.spans, window=window, block_ids=block_ids, decode=decode, prefill=prefill, workspace=self._workspace
        )

    def _launches(self, queries: Queries, window: int | None, num_rows: int, staging: Staging) -> tuple[Launch | None, Launch | None]:
        """The launches for short and for long sequences. Padding rows go with the short ones."""
        is_short = queries.tokens * self._group <= self._tiles.decode.block_m
        short, long = queries.where(is_short), queries.where(~is_short)
        num_tokens = int(queries.tokens.sum())
        decode = np.concatenate(
            (self._cut(short, window, self._tiles.decode, self._extra), padding_items(num_tokens, num_rows - num_tokens))
        )
        if not len(long.tokens):
            decode = padded_words(decode, num_rows + self._extra)
        prefill = self._cut(long, window, self._tiles.prefill, self._prefill_extra(long))
        return _launch(staging, decode, self._tiles.decode), _launch(staging, prefill, self._tiles.prefill)

    def _prefill_extra(self, queries: Queries) -> int:
        """Parts for the chunks' tiles: as many of each as fill the chip once, where tiles alone leave half of it idle or more."""
        num_tiles = int((-(-queries.tokens * self._group // self._tiles.prefill.block_m)).sum())
        parts = self._num_sms // max(num_tiles * self._shape.num_kv_heads, 1)
        return num_tiles * parts if parts > 1 and self._extra else 0

    def _cut(self, queries: Queries, window: int | None, config: TileConfig, extra: int) -> Words:
        """Items whose partial results fit the workspace."""
        part_words = self._shape.num_kv_heads * config.block_m * (padded_dim(self._shape.head_dim) + 2)
        room, min_keys = self._workspace.partials.shape[0] // part_words, MIN_SPLIT_KEYS
        while True:
            items = cut(queries, self._group, window, config, Split(min_keys=min_keys, extra=extra))
            if num_parts(items) <= room:
                return items
            min_keys *= 2


def _launch(staging: Staging, items: Words, config: TileConfig) -> Launch | None:
    if not len(items):
        return None
    return Launch(items=put(staging, items.reshape(-1)).view(-1, ITEM_WORDS), config=config)
