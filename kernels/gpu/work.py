"""The attention of a step cut into items of work: a tile of query rows over a range of keys, one thread block each.

The query heads of a KV head are packed with the tokens: row r of a sequence is token r // G, head r % G of the group. So a decode token is
G rows of one tile, a chunk of T tokens is T * G rows, and whatever the ratio, no row is wasted but in a sequence's last tile. Many keys
are cut into parts, whose results the last of them to finish combines. Everything here is pure and runs on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polymux.kernels.gpu.staging import Words

# The columns of an item.
START = 0  # first row of the sequence's tokens in the flat batch
CONTEXT = 1  # position of that token
TOKENS = 2  # how many there are
ROW = 3  # first packed row of the tile
TABLE = 4  # where the sequence's block ids begin
BEGIN = 5  # first key
END = 6  # one past the last key
FIRST_PART = 7  # number of the tile's first part among all parts of the launch
PART = 8
PARTS = 9  # how many parts the tile's keys were cut into; 0 is no work at all
ITEM_WORDS = 10

Column = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """How one launch computes: what the kernel is compiled for."""

    block_m: int  # packed rows of a tile
    block_n: int  # keys of one iteration
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """The sequences of a launch, a column each: see the item's columns of the same names."""

    starts: Column
    contexts: Column
    tokens: Column
    tables: Column

    def where(self, chosen: NDArray[np.bool_]) -> Queries:
        return Queries(starts=self.starts[chosen], contexts=self.contexts[chosen], tokens=self.tokens[chosen], tables=self.tables[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How far the keys may be cut: into parts of `min_keys` or more, as few as make about `extra` items more than there are tiles."""

    min_keys: int
    extra: int  # 0 cuts nothing


def cut(queries: Queries, group: int, window: int | None, config: TileConfig, split: Split) -> Words:
    """Items [W, ITEM_WORDS], the longest first, at most `split.extra` more than tiles."""
    rows = queries.tokens * group
    num_tiles = -(-rows // config.block_m)
    owner = np.repeat(np.arange(len(rows)), num_tiles)
    row = _count_up(num_tiles) * config.block_m
    contexts = queries.contexts[owner]
    end = contexts + (np.minimum(row + config.block_m, rows[owner]) - 1) // group + 1
    begin = np.zeros_like(end)
    if window is not None:
        begin = np.maximum(contexts + row // group - window + 1, 0) // config.block_n * config.block_n
    size = _part_sizes(end - begin, config.block_n, split)
    parts = -(-(end - begin) // size)
    tile = np.repeat(np.arange(len(parts)), parts)
    part = _count_up(parts)
    items = np.empty((len(tile), ITEM_WORDS), np.int32)
    items[:, START], items[:, CONTEXT] = queries.starts[owner][tile], contexts[tile]
    items[:, TOKENS], items[:, ROW] = queries.tokens[owner][tile], row[tile]
    items[:, TABLE] = queries.tables[owner][tile]
    items[:, BEGIN] = begin[tile] + part * size[tile]
    items[:, END] = np.minimum(items[:, BEGIN] + size[tile], end[tile])
    held = np.where(parts > 1, parts, 0)
    items[:, FIRST_PART] = (np.cumsum(held) - held)[tile]
    items[:, PART], items[:, PARTS] = part, parts[tile]
    return items[np.argsort(items[:, BEGIN] - items[:, END], kind="stable")]


def num_parts(items: Words) -> int:
    """How many partial results the items leave for combining."""
    return int(np.count_nonzero(items[:, PARTS] > 1))


def padding_items(first_row: int, num_rows: int) -> Words:
    """Items of single tokens that see nothing: their rows of the output become zero."""
    items = np.zeros((num_rows, ITEM_WORDS), np.int32)
    items[:, START] = np.arange(first_row, first_row + num_rows)
    items[:, TOKENS] = items[:, PARTS] = 1
    return items


def _part_sizes(lengths: Column, block_n: int, split: Split) -> Column:
    """Keys of a part, by tile: of even parts, no longer than what spreads all keys over `extra` parts."""
    if not split.extra:
        return np.maximum(lengths, 1)
    longest = max(split.min_keys, -(-int(lengths.sum()) // split.extra))
    even = -(-lengths // np.maximum(-(-lengths // longest), 1))
    return np.maximum(-(-even // block_n), 1) * block_n


def _count_up(counts: Column) -> Column:
    """0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
