"""Who attends to what in one step, as index tensors that are built once and serve every layer.

Rows of single tokens (decode) are taken together in groups of similar length; the rows of one sequence's chunk (prefill) stay together.
Both read the cache through *tiles*: a bounded number of strips gathered into one buffer that stays in the core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from polymux.kernels.paged import CacheShape, Span

TILE_BYTES = 2 << 20  # K and V of one tile: about one core's second-level cache
INVARIANT_SLOTS = 512  # the flash kernel's own split of the keys: tiles on this grid sum in one order, whatever the length
MAX_WASTE = 0.25  # of a group's slots may be padding, as far as more than MIN_WASTE_BLOCKS
MIN_WASTE_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """Slots of `num_tables` sequences side by side, of which `[first, last)` are looked at."""

    strips: Tensor  # [2 * num_tables * Hkv * blocks] int64, all K before all V
    num_tables: int
    first: int
    last: int
    mask: Tensor | None = None  # fp32, 0 or -inf, broadcastable to [rows or tables, heads, queries, last - first]
    dead: Tensor | None = None  # queries that see nothing of this tile, broadcastable to its log-sum-exp


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Single-token queries: row i sees table i of each tile, or all rows see the only table."""

    rows: slice
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: they see each other causally, and the tiles of what came before."""

    rows: slice
    own_mask: Tensor | None  # None: causal
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    spans: tuple[Span, ...]
    window: int | None
    groups: tuple[RowGroup, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Planner:
    """Builds the plans of one step; one per distinct window."""

    shape: CacheShape
    item_bytes: int
    device: torch.device
    batch_invariant: bool

    def plan(self, spans: Sequence[Span], window: int | None) -> AttentionPlan:
        """`spans` in row order; single-token ones are best sorted by length."""
        if self.batch_invariant:
            return AttentionPlan(tuple(spans), window, tuple(self._invariant_groups(spans, window)), ())
        single = [span for span in spans if span.num_tokens == 1]
        chunks = tuple(self._chunk(span, window) for span in spans if span.num_tokens > 1)
        return AttentionPlan(tuple(spans), window, tuple(self._group(part, window) for part in self._parts(single, window)), chunks)

    @property
    def _tile_blocks(self) -> int:
        block = 2 * self.shape.num_kv_heads * self.shape.block_size * self.shape.head_dim * self.item_bytes
        return max(TILE_BYTES // block, 1)

    def _parts(self, spans: Sequence[Span], window: int | None) -> list[list[Span]]:
        """Cut consecutive rows into groups that fit a tile and hold little padding."""
        parts: list[list[Span]] = []
        widest = blocks = 0
        for span in spans:
            first, end = _visible(span, window)
            size = -(-end // self.shape.block_size) - first // self.shape.block_size
            adjacent = bool(parts) and parts[-1][-1].start + 1 == span.start
            padded = max(widest, size) * (len(parts[-1]) + 1) if parts else 0
            wasted = padded - blocks - size
            if adjacent and padded <= self._tile_blocks and wasted <= max(MIN_WASTE_BLOCKS, MAX_WASTE * padded):
                parts[-1].append(span)
                widest, blocks = max(widest, size), blocks + size
            else:
                parts.append([span])
                widest = blocks = size
        return parts

    def _group(self, spans: list[Span], window: int | None) -> RowGroup:
        rows = slice(spans[0].start, spans[0].start + len(spans))
        if len(spans) == 1:
            return RowGroup(rows, self._tiles(spans[0].block_ids, *_visible(spans[0], window)))
        size = self.shape.block_size
        ranges = [_visible(span, window) for span in spans]
        tables = [span.block_ids[first // size : -(-end // size)] for span, (first, end) in zip(spans, ranges, strict=True)]
        offsets = [(first % size, first % size + end - first) for first, end in ranges]
        first, last = min(first for first, _ in offsets), max(last for _, last in offsets)
        mask = None if len(set(offsets)) == 1 else self._range_mask(offsets, first, last)
        return RowGroup(rows, (Tile(self._strips(tables), len(spans), first, last, mask),))

    def _chunk(self, span: Span, window: int | None) -> Chunk:
        rows = slice(span.start, span.start + span.num_tokens)
        first = 0 if window is None else max(0, span.context_len - window + 1)
        tiles = self._tiles(span.block_ids, first, span.context_len) if first < span.context_len else ()
        if window is None or span.context_len + span.num_tokens <= window:
            return Chunk(rows, None, tiles)
        query = torch.arange(span.num_tokens, device=self.device).unsqueeze(1)
        own_mask = _mask((query < query.t()) | (query - window >= query.t()))
        tile_first, masked = first, []
        for tile in tiles:
            key = torch.arange(tile_first, tile_first + tile.last - tile.first, device=self.device) - span.context_len
            hidden = query - window >= key
            masked.append(Tile(tile.strips, 1, tile.first, tile.last, _mask(hidden), hidden.all(1)))
            tile_first += tile.last - tile.first
        return Chunk(rows, own_mask, tuple(masked))

    def _tiles(self, block_ids: Sequence[int], first: int, end: int) -> tuple[Tile, ...]:
        """Slots [first, end) of one sequence, a bounded number at a time."""
        size, tiles = self.shape.block_size, []
        for block in range(first // size, -(-end // size), self._tile_blocks):
            ids = block_ids[block : min(block + self._tile_blocks, -(-end // size))]
            begin, stop = max(first - block * size, 0), min(end - block * size, len(ids) * size)
            tiles.append(Tile(self._strips([ids]), 1, begin, stop))
        return tuple(tiles)

    def _invariant_groups(self, spans: Sequence[Span], window: int | None) -> list[RowGroup]:
        """Each token a row of its own over whole splits of the keys, on one grid: its sums and their order are its own affair."""
        groups: list[RowGroup] = []
        for (num_tokens, _), run in groupby(spans, lambda span: (span.num_tokens, _num_slots(span, window))):
            alike = list(run)
            groups += [self._invariant_group(part, window) for part in ([alike] if num_tokens == 1 else [[span] for span in alike])]
        return groups

    def _invariant_group(self, spans: list[Span], window: int | None) -> RowGroup:
        """Single tokens with as many splits each, or one sequence's chunk."""
        size, tables, ranges = self.shape.block_size, [], []
        num_slots = _num_slots(spans[0], window)
        for span in spans:
            begin = _splits(span, window)[0]
            ids = list(span.block_ids[begin // size : -(-(span.context_len + span.num_tokens) // size)])
            tables.append(ids + ids[:1] * (num_slots // size - len(ids)))
            for position in range(span.context_len, span.context_len + span.num_tokens):
                first = 0 if window is None else max(0, position - window + 1)
                ranges.append((first - begin, position + 1 - begin))
        mask = self._range_mask(ranges, 0, num_slots)
        return RowGroup(slice(spans[0].start, spans[0].start + len(ranges)), (Tile(self._strips(tables), len(tables), 0, num_slots, mask),))

    def _strips(self, tables: Sequence[Sequence[int]]) -> Tensor:
        """Strip numbers of whole block tables, padded to the longest with each one's first block."""
        longest, heads = max(map(len, tables)), self.shape.num_kv_heads
        padded = [[*table, *[table[0]] * (longest - len(table))] for table in tables]
        blocks = torch.tensor(padded, device=self.device).view(1, len(tables), 1, longest) * self.shape.strips_per_block
        return (blocks + torch.arange(2 * heads, device=self.device).view(2, 1, heads, 1)).flatten()

    def _range_mask(self, ranges: Sequence[tuple[int, int]], first: int, last: int) -> Tensor:
        """Row i sees slots [ranges[i][0], ranges[i][1]): fp32 [rows, 1, 1, last - first]."""
        bounds = torch.tensor(ranges, device=self.device).view(-1, 2, 1)
        slots = torch.arange(first, last, device=self.device)
        return _mask((slots < bounds[:, 0]) | (slots >= bounds[:, 1])).view(len(ranges), 1, 1, last - first)


def _visible(span: Span, window: int | None) -> tuple[int, int]:
    """The positions [first, end) that the span's first token sees."""
    end = span.context_len + 1
    return (0 if window is None else max(0, end - window)), end


def _splits(span: Span, window: int | None) -> tuple[int, int]:
    """The slots [begin, end) that hold all that the span sees, begin and end on the grid."""
    begin = _visible(span, window)[0] // INVARIANT_SLOTS * INVARIANT_SLOTS
    return begin, -(-(span.context_len + span.num_tokens) // INVARIANT_SLOTS) * INVARIANT_SLOTS


def _num_slots(span: Span, window: int | None) -> int:
    begin, end = _splits(span, window)
    return end - begin


def _mask(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
