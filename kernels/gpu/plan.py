"""A step as device tensors: where its tokens stand, where their K and V go, and the attention of each distinct window as items of work.

Plans of as many padded rows have the same addresses, shapes and grids, whatever the contexts: a CUDA graph captured with one serves all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from polymux.kernels.gpu.config import MIN_SPLIT_KEYS, Chip, Tiles, padded_dim
from polymux.kernels.gpu.staging import ALIGNMENT, Staging, Words
from polymux.kernels.gpu.work import ITEM_WORDS, Queries, Split, TileConfig, cut, num_parts, padding_items
from polymux.kernels.paged import CacheShape, Span


class Workspace:
    """Scratch memory of attention, one a stream: partial results, and how many parts of a tile are done, zero between launches."""

    def __init__(self, device: torch.device, num_bytes: int = 32 << 20) -> None:
        self.partials = torch.empty(num_bytes // 4, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(num_bytes // 4 // 256, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The items of one kernel launch; the grid is [Hkv, W]."""

    items: Tensor  # [W, ITEM_WORDS] int32
    config: TileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendPlan:
    """A step's attention in the layers of one window."""

    spans: tuple[Span, ...]
    window: int | None
    block_ids: Tensor  # [N] int32: the block tables one after another; items say where each begins. Its length varies, its address does not
    decode: Launch | None  # sequences of few tokens
    prefill: Launch | None  # chunks
    workspace: Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All index tensors of a step, on the device. Rows at and past `num_tokens` are padding: nothing may be written for them."""

    spans: tuple[Span, ...]
    num_rows: int  # T, padding included
    max_position: int
    num_tokens: Tensor  # [1] int32
    positions: Tensor  # [T] int32; 0 for padding
    slots: Tensor  # [T] int32: block_id * block_size + slot, where a token's K and V go; 0 for padding
    attention: Mapping[int | None, AttendPlan]  # by window


class StepPlanner:
    """Builds the plans of one model's steps. The tensors of a plan live in the staging buffer and are overwritten by the next step's."""

    def __init__(
        self,
        shape: CacheShape,
        num_heads: int,
        item_bytes: int,
        workspace: Workspace,
        *,
        chip: Chip,
        batch_invariant: bool = False,
        tiles: Tiles | None = None,
    ) -> None:
        self.shape = shape
        self._workspace = workspace
        self._num_sms = chip.num_sms
        self._group = num_heads // shape.num_kv_heads
        self._tiles = tiles or Tiles.choose(shape.head_dim, item_bytes, self._group, chip, batch_invariant=batch_invariant)
        self._extra = -(-self._tiles.num_blocks // shape.num_kv_heads)

    def num_words(self, num_rows: int, num_blocks: int, num_windows: int = 1) -> int:
        """Words of staging that any step of so many rows over so many blocks of context takes."""
        tiles_per_row = -(-self._group // min(self._tiles.decode.block_m, self._tiles.prefill.block_m))
        items = num_rows * tiles_per_row + self._extra + self._num_sms
        num_pieces = 4 + 2 * num_windows
        return 1 + 2 * num_rows + num_windows * items * ITEM_WORDS + num_blocks + 1 + num_pieces * ALIGNMENT

    def plan(self, spans: Sequence[Span], windows: Iterable[int | None], staging: Staging, num_rows: int | None = None) -> StepPlan:
        """`spans` in any order, their rows disjoint and from 0 on; `num_rows` pads them. Between `staging.begin` and `staging.send`.

        Addresses and grids depend on `num_rows` and the windows alone where it is given and no span is longer than a decode tile.
        """
        batch = _Batch.of(spans, self.shape.block_size)
        num_tokens = len(batch.positions)
        num_rows = num_tokens if num_rows is None else num_rows
        assert num_tokens <= num_rows, f"{num_tokens} tokens in {num_rows} rows"
        count = _put(staging, np.array([num_tokens], np.int32))
        positions = _put(staging, _padded(batch.positions, num_rows))
        slots = _put(staging, _padded(batch.slots, num_rows))
        pairs = {window: self._launches(batch.queries, window, num_rows, staging) for window in dict.fromkeys(windows)}
        block_ids = _put(staging, batch.block_ids)
        attention = {
            window: AttendPlan(
                spans=tuple(spans), window=window, block_ids=block_ids, decode=decode, prefill=prefill, workspace=self._workspace
            )
            for window, (decode, prefill) in pairs.items()
        }
        return StepPlan(
            spans=tuple(spans),
            num_rows=num_rows,
            max_position=int(batch.positions.max(initial=0)),
            num_tokens=count,
            positions=positions,
            slots=slots,
            attention=attention,
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
            decode = _padded(decode, num_rows + self._extra)
        prefill = self._cut(long, window, self._tiles.prefill, self._prefill_extra(long))
        return _launch(staging, decode, self._tiles.decode), _launch(staging, prefill, self._tiles.prefill)

    def _prefill_extra(self, queries: Queries) -> int:
        """Parts for the chunks' tiles: as many of each as fill the chip once, where tiles alone leave half of it idle or more."""
        num_tiles = int((-(-queries.tokens * self._group // self._tiles.prefill.block_m)).sum())
        parts = self._num_sms // max(num_tiles * self.shape.num_kv_heads, 1)
        return num_tiles * parts if parts > 1 and self._extra else 0

    def _cut(self, queries: Queries, window: int | None, config: TileConfig, extra: int) -> Words:
        """Items whose partial results fit the workspace."""
        part_words = self.shape.num_kv_heads * config.block_m * (padded_dim(self.shape.head_dim) + 2)
        room, min_keys = self._workspace.partials.shape[0] // part_words, MIN_SPLIT_KEYS
        while True:
            items = cut(queries, self._group, window, config, Split(min_keys=min_keys, extra=extra))
            if num_parts(items) <= room:
                return items
            min_keys *= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The spans of a step as arrays."""

    queries: Queries
    block_ids: Words
    positions: Words
    slots: Words

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int) -> _Batch:
        columns = np.array([(s.start, s.context_len, s.num_tokens) for s in spans], np.int64).reshape(-1, 3)
        starts, contexts, tokens = columns.T
        num_blocks = -(-(contexts + tokens) // block_size)
        tables = np.cumsum(num_blocks) - num_blocks
        total = int(num_blocks.sum())
        ids = chain.from_iterable(span.block_ids[:n] for span, n in zip(spans, num_blocks.tolist(), strict=True))
        block_ids = np.zeros(max(total, 1), np.int32)  # never empty: an empty tensor has no address for a graph to keep
        block_ids[:total] = np.fromiter(ids, np.int32, total)  # raises ValueError where a table is shorter than its sequence
        order = np.argsort(starts, kind="stable")
        assert (starts[order] == np.cumsum(tokens[order]) - tokens[order]).all(), "the spans' rows leave gaps or overlap"
        owner = np.repeat(order, tokens[order])
        positions = np.arange(len(owner)) - starts[owner] + contexts[owner]
        slots = block_ids[tables[owner] + positions // block_size] * block_size + positions % block_size
        queries = Queries(starts=starts, contexts=contexts, tokens=tokens, tables=tables)
        return cls(queries=queries, block_ids=block_ids, positions=positions.astype(np.int32), slots=slots.astype(np.int32))


def _launch(staging: Staging, items: Words, config: TileConfig) -> Launch | None:
    if not len(items):
        return None
    return Launch(items=_put(staging, items.reshape(-1)).view(-1, ITEM_WORDS), config=config)


def _put(staging: Staging, words: Words) -> Tensor:
    source, target = staging.take(len(words))
    source[:] = words
    return target


def _padded(words: Words, length: int) -> Words:
    """`words` with zeros after them, along the first dimension."""
    return np.concatenate((words, np.zeros((length - len(words), *words.shape[1:]), np.int32)))
