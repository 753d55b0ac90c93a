"""One decoder layer over a few rows of single tokens, compiled: each thread of torch's own team runs `layer`, and they meet at barriers.

Activations are bf16 between the steps and sums fp32, as elsewhere. Norms are computed by every thread for itself, which is cheaper than
meeting; products are split by blocks of weight rows, attention by sequence and KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import carray, from_dtype, types

from polymux.kernels import packed_dot
from polymux.kernels.decode_records import CALL, GROUP_LINES, SLOTS
from polymux.kernels.packed_dot import DOT_ROWS, LANES, MAX_ROWS, bits_of_float, configure_tiles, float_of_bits, pointer, release_tiles

F = TypeVar("F", bound=Callable[..., Any])

_ZERO, _ONE, _HALF, _LOWEST = np.float32(0), np.float32(1), np.float32(0.5), np.float32("-inf")
_LOG2_E, _LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_E5, _E4, _E3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)  # Cephes' polynomial of expf
_E2, _E1, _E0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_LEAST, _MOST = np.float32(-87), np.float32(88)

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_barrier = types.ExternalFunction("GOMP_barrier", types.void())


_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "boundscheck": False}


def jit(function: F) -> F:
    return cast(F, numba.njit(nogil=True, **_OPTIONS)(function))


@jit
def _widen(half: Any) -> Any:
    """bf16 bits as fp32."""
    return float_of_bits(np.int32(np.int64(half) << 16))


@jit
def _narrow(value: Any) -> Any:
    """fp32 as bf16 bits, to nearest even."""
    bits = bits_of_float(value)
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) if value == value else np.uint16(0x7FC0)


@jit
def _exp(x: Any) -> Any:
    x = min(max(x, _LEAST), _MOST)
    power = np.floor(x * _LOG2_E + _HALF)
    x = x - power * _LN_2
    series = ((((_E5 * x + _E4) * x + _E3) * x + _E2) * x + _E1) * x + _E0
    return (series * x * x + x + _ONE) * float_of_bits(np.int32((np.int32(power) + 127) << 23))


@jit
def _halves(address: Any, size: Any) -> Any:
    return carray(pointer(address), (size,), np.uint16)


@jit
def _floats(address: Any, size: Any) -> Any:
    return carray(pointer(address), (size,), np.float32)


@jit
def _integers(address: Any, size: Any) -> Any:
    return carray(pointer(address), (size,), np.int64)


def _dots(blocks: int, lines: int) -> Callable[..., None]:
    """The sums of one group of row blocks, for any number of rows of x: the group comes from memory once, then from the core's cache."""
    one, two, three, four = (packed_dot.dot_group(rows, blocks, lines) for rows in range(1, DOT_ROWS + 1))

    @jit
    def dots(num_rows: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> None:
        pitch = 64 * lines
        while num_rows > 3:
            four(weight, stride, x, pairs, out)
            num_rows, x, out = num_rows - 4, x + 16 * pairs, out + 4 * pitch
        if num_rows == 3:
            three(weight, stride, x, pairs, out)
        elif num_rows == 2:
            two(weight, stride, x, pairs, out)
        elif num_rows == 1:
            one(weight, stride, x, pairs, out)

    return dots


_dots_4_2, _dots_2_2, _dots_1_2, _dots_2_4, _dots_1_4 = _dots(4, 2), _dots(2, 2), _dots(1, 2), _dots(2, 4), _dots(1, 4)
_tiles_2_2, _tiles_1_2, _tiles_1_4 = packed_dot.tile_group(2, 2), packed_dot.tile_group(1, 2), packed_dot.tile_group(1, 4)


@jit
def _has_tiles(step: Any) -> Any:
    return step.tiles != 0 and step.rows > DOT_ROWS


@jit
def _most_blocks(m: Any, step: Any) -> Any:
    """Of a group: neither registers hold more sums, from DOT_ROWS on, nor tiles."""
    return (GROUP_LINES if step.rows < DOT_ROWS else GROUP_LINES // 2) // m.lines


@jit
def _group(m: Any, weight: Any, stride: Any, blocks: Any, step: Any, x: Any, out: Any) -> None:
    """Sums of x and `blocks` blocks of the shape of `m`'s, at the address `weight` and each `stride` bytes after the one before."""
    if _has_tiles(step):
        if m.lines == 4:
            _tiles_1_4(weight, stride, x, m.pairs, out)
        elif blocks == 2:
            _tiles_2_2(weight, stride, x, m.pairs, out)
        else:
            _tiles_1_2(weight, stride, x, m.pairs, out)
    elif m.lines == 4:
        if blocks == 2:
            _dots_2_4(step.rows, weight, stride, x, m.pairs, out)
        else:
            _dots_1_4(step.rows, weight, stride, x, m.pairs, out)
    elif blocks == 4:
        _dots_4_2(step.rows, weight, stride, x, m.pairs, out)
    elif blocks == 2:
        _dots_2_2(step.rows, weight, stride, x, m.pairs, out)
    else:
        _dots_1_2(step.rows, weight, stride, x, m.pairs, out)


@jit
def _begin(m: Any, step: Any, member: Any, team: Any) -> Any:
    """This thread's blocks of weight rows."""
    if _has_tiles(step):
        configure_tiles(step.tiles)
    blocks = -(-m.rows // (m.lines * LANES))
    return blocks * member // team, blocks * (member + 1) // team


@jit
def _end(step: Any) -> None:
    if _has_tiles(step):
        release_tiles()


@jit
def _add_bias(m: Any, start: Any, sums: Any, count: Any) -> None:
    if m.bias:
        bias = _halves(m.bias + 2 * start, count)
        for i in range(count):
            sums[i] += _widen(bias[i])


@jit
def _product(m: Any, step: Any, x: Any, scratch: Any, member: Any, team: Any, out: Any, kind: Any) -> None:
    """x by a weight. kind 0: fp32 to `out`; 1: added to `out` in bf16; 2: fp32 of what bf16 holds."""
    block, end = _begin(m, step, member, team)
    size, blocks, nbytes = m.lines * LANES, _most_blocks(m, step), m.lines * 64 * m.pairs
    while block < end:
        apart = (end - block) // blocks  # each of a group's streams goes on where it was in the group before
        for first in range(block, block + apart):
            _group(m, m.weight + first * nbytes, apart * nbytes, blocks, step, x, scratch)
            for i in range(blocks):
                start = (first + i * apart) * size
                count = min(size, m.rows - start)
                for row in range(step.rows):
                    sums = _floats(scratch + 4 * (i * MAX_ROWS + row) * size, count)
                    _add_bias(m, start, sums, count)
                    if kind == 1:
                        into = _halves(out + 2 * (row * m.rows + start), count)
                        for j in range(count):
                            into[j] = _narrow(sums[j] + _widen(into[j]))
                    else:
                        found = _floats(out + 4 * (row * m.rows + start), count)
                        for j in range(count):
                            found[j] = _widen(_narrow(sums[j])) if kind == 2 else sums[j]
        block += apart * blocks
        blocks //= 2
    _end(step)


@jit
def _gated(gate: Any, up: Any, step: Any, x: Any, scratch: Any, member: Any, team: Any, pitch: Any) -> None:
    """silu(gate(x)) * up(x) to `step.hidden`, rows `pitch` apart."""
    first, end = _begin(gate, step, member, team)
    size, nbytes = gate.lines * LANES, gate.lines * 64 * gate.pairs
    other = scratch + 4 * MAX_ROWS * size
    for block in range(first, end):
        weight = gate.weight + block * nbytes
        if _has_tiles(step) and gate.lines == 4:
            _group(gate, weight, 0, 1, step, x, scratch)
            _group(up, up.weight + block * nbytes, 0, 1, step, x, other)
        else:
            _group(gate, weight, up.weight - gate.weight, 2, step, x, scratch)
        start = block * size
        count = min(size, gate.rows - start)
        for row in range(step.rows):
            gates, ups = _floats(scratch + 4 * row * size, count), _floats(other + 4 * row * size, count)
            _add_bias(gate, start, gates, count)
            _add_bias(up, start, ups, count)
            out = _halves(step.hidden + 2 * (row * pitch + start), count)
            for j in range(count):
                out[j] = _narrow(gates[j] * ups[j] / (_ONE + _exp(-gates[j])))
    _end(step)


@jit
def _norm(step: Any, weight: Any, pitch: Any, member: Any) -> Any:
    """The RMSNorm of `step.x` in this thread's own memory, rows `pitch` apart."""
    normed = step.normed + 2 * MAX_ROWS * pitch * member
    scale = _halves(weight, step.size)
    for row in range(step.rows):
        x, out = _halves(step.x + 2 * row * step.size, step.size), _halves(normed + 2 * row * pitch, step.size)
        total = _ZERO
        for i in range(step.size):
            total += _widen(x[i]) * _widen(x[i])
        inverse = _ONE / np.sqrt(total / np.float32(step.size) + step.eps)
        for i in range(step.size):
            out[i] = _narrow(_widen(_narrow(_widen(x[i]) * inverse)) * _widen(scale[i]))
    return normed


@jit
def _turn(step: Any, row: Any, head: Any, norms: Any, scale: Any) -> Any:
    """One head of q or k, in place: its norm where there is one, its rotation, and a factor."""
    size = step.head_dim
    half = size // 2
    heads = step.num_heads + 2 * step.num_kv_heads
    x = _floats(step.heads + 4 * (row * heads + head) * size, size)
    if norms:
        weight = _halves(norms + 2 * head * size, size)
        total = _ZERO
        for i in range(size):
            total += x[i] * x[i]
        inverse = _ONE / np.sqrt(total / np.float32(size) + step.eps)
        for i in range(size):
            x[i] = x[i] * inverse * _widen(weight[i])
    cos, sin = _halves(step.cos + 2 * row * size, size), _halves(step.sin + 2 * row * half, half)
    for i in range(half):
        first, second, c, s = x[i], x[half + i], _widen(cos[i]) * scale, _widen(sin[i]) * scale
        x[i] = first * c - second * s
        x[half + i] = second * c + first * s
    return x


@jit
def _write(step: Any, start: Any, slot: Any, values: Any) -> None:
    """One head of a token into its slot of the strip at `start`; a token that begins a block clears what comes after it."""
    size = step.head_dim
    rest = (step.slots - slot) * size if slot == 0 else size
    strip = _halves(start + 2 * slot * size, rest)
    for i in range(size):
        strip[i] = _narrow(values[i])
    for i in range(size, rest):
        strip[i] = 0


_slot_dots = packed_dot.slot_dots()
_slot_sums_4, _slot_sums_2, _slot_sums_1 = (packed_dot.slot_sums(heads, SLOTS) for heads in (4, 2, 1))


@jit
def _attend(layer: Any, step: Any, row: Any, head: Any, scratch: Any) -> None:
    """The query heads of one KV head of one sequence, its new K and V being written first; one pass over the slots, SLOTS at a time."""
    size, group = step.head_dim, step.num_heads // step.num_kv_heads
    length = _integers(step.lengths, step.rows)[row]
    table = _integers(step.tables + 8 * row * step.table_size, step.table_size)
    strip_bytes = 2 * step.slots * size
    keys, values = layer.k + head * strip_bytes, layer.v + head * strip_bytes
    newest = table[length // step.slots] * step.block_bytes
    heads = step.num_heads + 2 * step.num_kv_heads
    v = _floats(step.heads + 4 * (row * heads + heads - step.num_kv_heads + head) * size, size)
    _write(step, keys + newest, length % step.slots, _turn(step, row, step.num_heads + head, layer.head_norms, _ONE))
    _write(step, values + newest, length % step.slots, v)
    sums, out = scratch, _floats(scratch, group * size)
    scratch += 4 * group * size
    scores, queries = _floats(scratch, group * SLOTS), scratch + 4 * group * SLOTS
    highest, totals = _floats(queries + 2 * group * size, group), _floats(queries + 2 * group * size + 4 * group, group)
    for g in range(group):
        turned = _turn(step, row, head * group + g, layer.head_norms, step.scale)
        query = _halves(queries + 2 * g * size, size)
        for i in range(size):
            query[i] = _narrow(turned[i])
    out[:] = _ZERO
    highest[:] = _LOWEST
    totals[:] = _ZERO
    first = max(0, length + 1 - layer.window) if layer.window else 0
    for base in range(first // LANES * LANES, length + 1, SLOTS):
        start, stop = max(first - base, 0), min(length + 1 - base, SLOTS)
        for j in range(0, stop, LANES):
            slot = base + j
            strip = keys + table[slot // step.slots] * step.block_bytes + 2 * (slot % step.slots) * size
            for g in range(group):
                _slot_dots(strip, 2 * size, queries + 2 * g * size, size // 2, scratch + 4 * (g * SLOTS + j))
        for g in range(group):
            _weigh(scores[g * SLOTS + start : g * SLOTS + stop], highest, totals, g, out[g * size : (g + 1) * size])
        _add_values(step, values, table, base, start, stop, scratch, sums)
    attended = _halves(step.attended + 2 * (row * 2 * layer.output.pairs + head * group * size), group * size)
    for line in range(0, group * size, 2 * LANES):
        inverse = _ONE / totals[line // size]
        for i in range(LANES):
            attended[line + 2 * i] = _narrow(out[line + i] * inverse)
            attended[line + 2 * i + 1] = _narrow(out[line + LANES + i] * inverse)


@jit
def _add_values(step: Any, values: Any, table: Any, base: Any, start: Any, stop: Any, weights: Any, out: Any) -> None:
    """V of slots [base + start, base + stop) by their weights; every 32 columns of `out` have the even ones before the odd ones."""
    size, group = step.head_dim, step.num_heads // step.num_kv_heads
    while start < stop:
        slot = base + start
        count = min(stop - start, step.slots - slot % step.slots)
        strip = values + table[slot // step.slots] * step.block_bytes + 2 * (slot % step.slots) * size
        for column in range(0, size, 2 * LANES):
            head = 0
            while head < group:
                at, into = weights + 4 * (head * SLOTS + start), out + 4 * (head * size + column)
                if group - head > 3:
                    _slot_sums_4(strip + 2 * column, 2 * size, at, count, into)
                    head += 4
                elif group - head > 1:
                    _slot_sums_2(strip + 2 * column, 2 * size, at, count, into)
                    head += 2
                else:
                    _slot_sums_1(strip + 2 * column, 2 * size, at, count, into)
                    head += 1
        start += count


@jit
def _weigh(scores: Any, highest: Any, totals: Any, g: Any, out: Any) -> None:
    """Scores become weights against the highest so far; what was summed against a lower one shrinks."""
    top = highest[g]
    for i in range(scores.size):
        top = max(top, scores[i])
    if top > highest[g]:
        shrink = _exp(highest[g] - top)
        totals[g] *= shrink
        for i in range(out.size):
            out[i] *= shrink
        highest[g] = top
    total = _ZERO
    for i in range(scores.size):
        weight = _exp(scores[i] - top)
        scores[i] = weight
        total += weight
    totals[g] += total


def layer(address: Any) -> None:
    call = carray(address, 1)[0]
    layer, step = call.layer, call.step
    member, team = np.int64(_thread_num()), np.int64(_num_threads())
    scratch = step.scratch + step.scratch_bytes * member
    normed = _norm(step, layer.input_norm, 2 * layer.qkv.pairs, member)
    _product(layer.qkv, step, normed, scratch, member, team, step.heads, 0)
    _barrier()
    items = step.rows * step.num_kv_heads
    for item in range(items * member // team, items * (member + 1) // team):
        _attend(layer, step, item // step.num_kv_heads, item % step.num_kv_heads, scratch)
    _barrier()
    _product(layer.output, step, step.attended, scratch, member, team, step.x, 1)
    _barrier()
    normed = _norm(step, layer.post_norm, 2 * layer.gate.pairs, member)
    _gated(layer.gate, layer.up, step, normed, scratch, member, team, 2 * layer.down.pairs)
    _barrier()
    _product(layer.down, step, step.hidden, scratch, member, team, step.x, 1)


def predict(address: Any) -> None:
    """Logits by `layer.qkv`, which is the head, after `layer.input_norm`, which is the last norm."""
    call = carray(address, 1)[0]
    member, team = np.int64(_thread_num()), np.int64(_num_threads())
    normed = _norm(call.step, call.layer.input_norm, 2 * call.layer.qkv.pairs, member)
    _product(call.layer.qkv, call.step, normed, call.step.scratch + call.step.scratch_bytes * member, member, team, call.step.logits, 2)


def compile_both(cache_folder: str | None) -> tuple[Any, Any]:
    """`layer` and `predict` as C functions of one address of a CALL. Takes seconds, unless an earlier process left them in the folder."""
    options = {"nopython": True, "cache": cache_folder is not None, **_OPTIONS}
    signature = types.void(types.CPointer(from_dtype(CALL)))
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, cache_folder or ""
    try:
        return numba.cfunc(signature, **options)(layer), numba.cfunc(signature, **options)(predict)
    finally:
        numba.config.CACHE_DIR = before
