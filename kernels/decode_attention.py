"""Attention of single tokens over the paged cache, compiled: the query heads of one KV head side by side, so that K and V are read once.

An *item* is one KV head of one sequence. While a chunk of its slots is computed, the next chunk is on its way from memory, which may be
the first one of the thread's next item.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polymux.kernels import packed_dot, packed_sums
from polymux.kernels.decode_math import LOWEST, ONE, ZERO, floats, halves, integers, jit, narrow, widen
from polymux.kernels.decode_records import SLOTS
from polymux.kernels.llvm_vectors import LANES, LINE_BYTES, prefetch

_slot_tiles, _slot_dots, _slot_weights = packed_dot.slot_tiles(), packed_dot.slot_dots(), packed_sums.slot_weights()
_slot_sums_8, _slot_sums_4, _slot_sums_2, _slot_sums_1 = (packed_sums.slot_sums(heads) for heads in (8, 4, 2, 1))


@jit
def _turn(step: Any, row: Any, head: Any, norms: Any, scale: Any) -> Any:
    """One head of q or k, in place: its norm where there is one, its rotation, and a factor."""
    size = step.head_dim
    half = size // 2
    heads = step.num_heads + 2 * step.num_kv_heads
    x = floats(step.heads + 4 * (row * heads + head) * size, size)
    if norms:
        weight = halves(norms + 2 * head * size, size)
        total = ZERO
        for i in range(size):
            total += x[i] * x[i]
        inverse = ONE / np.sqrt(total / np.float32(size) + step.eps)
        for i in range(size):
            x[i] = x[i] * inverse * widen(weight[i])
    cos, sin = halves(step.cos + 2 * row * size, size), halves(step.sin + 2 * row * half, half)
    for i in range(half):
        first, second, c, s = x[i], x[half + i], widen(cos[i]) * scale, widen(sin[i]) * scale
        x[i] = first * c - second * s
        x[half + i] = second * c + first * s
    return x


@jit
def _write(step: Any, start: Any, slot: Any, values: Any) -> None:
    """One head of a token into its slot of the strip at `start`; a token that begins a block clears what comes after it."""
    size = step.head_dim
    rest = (step.slots - slot) * size if slot == 0 else size
    strip = halves(start + 2 * slot * size, rest)
    for i in range(size):
        strip[i] = narrow(values[i])
    for i in range(size, rest):
        strip[i] = 0


@jit
def _strip(step: Any, row: Any, slot: Any) -> Any:
    """Where a sequence's slot lies, in bytes from the first block."""
    table = integers(step.tables + 8 * row * step.table_size, step.table_size)
    return table[slot // step.slots] * step.block_bytes + 2 * (slot % step.slots) * step.head_dim


@jit
def _seen(layer: Any, step: Any, row: Any) -> Any:
    """The first slot that a sequence's new token sees, and the one after its last."""
    length = integers(step.lengths, step.rows)[row]
    return (max(0, length + 1 - layer.window) if layer.window else 0), length + 1


@jit
def _fetch(step: Any, start: Any, row: Any, slot: Any, stop: Any) -> None:
    """Begin to read LANES slots, if they come before `stop`."""
    if slot < stop:
        strip = start + _strip(step, row, slot)
        for line in range(0, 2 * LANES * step.head_dim, LINE_BYTES):
            prefetch(strip + line)


@jit
def attend(layer: Any, step: Any, item: Any, after: Any, scratch: Any) -> None:
    """One item; `after` is what this thread computes next, or `item` itself."""
    size, group = step.head_dim, step.num_heads // step.num_kv_heads
    row, head = item // step.num_kv_heads, item % step.num_kv_heads
    heads = step.num_heads + 2 * step.num_kv_heads
    keys, values = layer.k + 2 * head * step.slots * size, layer.v + 2 * head * step.slots * size
    newest = _seen(layer, step, row)[1] - 1
    block, slot = _strip(step, row, newest // step.slots * step.slots), newest % step.slots
    _write(step, keys + block, slot, _turn(step, row, step.num_heads + head, layer.head_norms, ONE))
    _write(step, values + block, slot, floats(step.heads + 4 * (row * heads + heads - step.num_kv_heads + head) * size, size))
    for part in range(0, group, LANES):
        _attend_heads(layer, step, row, head, part, after if part + LANES >= group else item, scratch)


@jit
def _attend_heads(layer: Any, step: Any, row: Any, head: Any, part: Any, after: Any, scratch: Any) -> None:
    """At most LANES query heads of an item, from `part` on: one pass over the slots, SLOTS at a time."""
    size, group = step.head_dim, step.num_heads // step.num_kv_heads
    count, strip_bytes = min(group - part, LANES), 2 * step.slots * size
    scores, state, sums = scratch, scratch + 4 * SLOTS * LANES, scratch + 4 * (SLOTS + 4) * LANES
    queries, packed = sums + 4 * LANES * size, sums + 6 * LANES * size
    _place_queries(layer, step, row, head * group + part, count, queries, packed)
    floats(scores, SLOTS * LANES)[:] = ZERO  # lanes without a head stay finite
    highest, totals, shrinking = floats(state, LANES), floats(state + LINE_BYTES, LANES), floats(state + 2 * LINE_BYTES, LANES)
    highest[:], totals[:] = LOWEST, ZERO
    out = floats(sums, LANES * size)
    out[:] = ZERO
    first, end = _seen(layer, step, row)
    start = first // LANES * LANES
    for base in range(start, end, SLOTS):
        next_row, next_head, next_base, next_end = row, head, base + SLOTS, end
        if next_base >= end:
            next_row, next_head = after // step.num_kv_heads, after % step.num_kv_heads
            next_base, next_end = _seen(layer, step, next_row)
            next_base = next_base // LANES * LANES
        stop = min(end, base + SLOTS)
        for slot in range(base, stop, LANES):
            strip = layer.k + head * strip_bytes + _strip(step, row, slot)
            _score(step, strip, count, queries, packed, scores + LINE_BYTES * (slot - base), state + 3 * LINE_BYTES)
            _fetch(step, layer.k + next_head * strip_bytes, next_row, next_base + slot - base, next_end)
        seen = max(first, base)
        _slot_weights(scores + LINE_BYTES * (seen - base), stop - seen, state, 0, 0)
        if base > start:
            for g in range(count):
                for i in range(size):
                    out[g * size + i] *= shrinking[g]
        while seen < stop:
            until = min(stop, (seen // LANES + 1) * LANES)
            strip = layer.v + head * strip_bytes + _strip(step, row, seen)
            _add_values(step, strip, count, scores + LINE_BYTES * (seen - base), until - seen, sums)
            _fetch(step, layer.v + next_head * strip_bytes, next_row, next_base + seen // LANES * LANES - base, next_end)
            seen = until
    _leave(layer, step, row, head * group + part, count, out, totals)


@jit
def _place_queries(layer: Any, step: Any, row: Any, first: Any, count: Any, queries: Any, packed: Any) -> None:
    """Turned and in bf16: one after the other, and for tiles the same pair of columns of all of them side by side."""
    size = step.head_dim
    pairs = size // 2
    all_packed = floats(packed, pairs * LANES)
    all_packed[:] = ZERO
    for g in range(count):
        turned = _turn(step, row, first + g, layer.head_norms, step.scale)
        query = halves(queries + 2 * g * size, size)
        for i in range(size):
            query[i] = narrow(turned[i])
        as_pairs = floats(queries + 2 * g * size, pairs)
        for i in range(pairs):
            all_packed[i * LANES + g] = as_pairs[i]


@jit
def _score(step: Any, strip: Any, count: Any, queries: Any, packed: Any, scores: Any, dots: Any) -> None:
    """LANES slots by the queries, a line of heads for each slot."""
    size = step.head_dim
    if step.wide_tiles != 0:
        _slot_tiles(strip, 2 * size, packed, size // 2, scores)
        return
    by_slot, found = floats(scores, LANES * LANES), floats(dots, LANES)
    for g in range(count):
        _slot_dots(strip, 2 * size, queries + 2 * g * size, size // 2, dots)
        for i in range(LANES):
            by_slot[i * LANES + g] = found[i]


@jit
def _add_values(step: Any, strip: Any, count: Any, weights: Any, num_slots: Any, sums: Any) -> None:
    """V of some slots by their weights; every 32 columns of the sums have the even ones before the odd ones."""
    size = step.head_dim
    for column in range(0, size, 2 * LANES):
        g = 0
        while g < count:
            at, into = weights + 4 * g, sums + 4 * (g * size + column)
            if count - g > 4:  # lanes without a head are summed too, and read by nobody
                _slot_sums_8(strip + 2 * column, 2 * size, at, num_slots, into)
                g += 8
            elif count - g > 2:
                _slot_sums_4(strip + 2 * column, 2 * size, at, num_slots, into)
                g += 4
            elif count - g == 2:
                _slot_sums_2(strip + 2 * column, 2 * size, at, num_slots, into)
                g += 2
            else:
                _slot_sums_1(strip + 2 * column, 2 * size, at, num_slots, into)
                g += 1


@jit
def _leave(layer: Any, step: Any, row: Any, first: Any, count: Any, out: Any, totals: Any) -> None:
    """Sums over totals, in bf16, where the next product reads them."""
    size = step.head_dim
    attended = halves(step.attended + 2 * (row * 2 * layer.output.pairs + first * size), count * size)
    for line in range(0, count * size, 2 * LANES):
        inverse = ONE / totals[line // size]
        for i in range(LANES):
            attended[line + 2 * i] = narrow(out[line + i] * inverse)
            attended[line + 2 * i + 1] = narrow(out[line + LANES + i] * inverse)
