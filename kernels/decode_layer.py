"""Decoder layers over a few rows of single tokens, compiled: each thread of torch's own team runs `run`, and they meet at barriers.

Activations are bf16 between the steps and sums fp32, as elsewhere. Norms are computed by every thread for itself, which is cheaper than
meeting; products are split by blocks of weight rows, attention by sequence and KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import carray, from_dtype, types

from polymux.kernels import packed_dot, packed_sums
from polymux.kernels.decode_attention import attend
from polymux.kernels.decode_math import ONE, OPTIONS, ZERO, exp, floats, halves, jit, narrow, widen
from polymux.kernels.decode_records import GROUP_LINES, LAYER, RUN
from polymux.kernels.llvm_vectors import LANES, pointer
from polymux.kernels.packed_dot import DOT_ROWS, MAX_ROWS, configure_tiles, release_tiles
from polymux.kernels.packed_sums import Ending

_thread_num = types.ExternalFunction("omp_get_thread_num", types.int32())
_num_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_barrier = types.ExternalFunction("GOMP_barrier", types.void())


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
_PLAIN, _ADDED, _ROUNDED = range(3)  # compiled code knows numbers only
_plain_2, _plain_4 = packed_sums.end_rows(Ending.PLAIN, 2), packed_sums.end_rows(Ending.PLAIN, 4)
_rounded_2, _rounded_4 = packed_sums.end_rows(Ending.ROUNDED, 2), packed_sums.end_rows(Ending.ROUNDED, 4)
_added_2, _added_4 = packed_sums.end_rows(Ending.ADDED, 2), packed_sums.end_rows(Ending.ADDED, 4)
_gated_2, _gated_4 = packed_sums.end_gated_rows(2), packed_sums.end_gated_rows(4)


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
def _end_block(kind: Any, lines: Any, sums: Any, rows: Any, out: Any, pitch: Any, start: Any, bias: Any) -> None:
    """A whole block's sums to columns from `start` of an `out` of `pitch` columns."""
    if kind == _ADDED:
        if lines == 4:
            _added_4(sums, rows, out + 2 * start, 2 * pitch, bias)
        else:
            _added_2(sums, rows, out + 2 * start, 2 * pitch, bias)
    elif kind == _ROUNDED:
        if lines == 4:
            _rounded_4(sums, rows, out + 4 * start, 4 * pitch, bias)
        else:
            _rounded_2(sums, rows, out + 4 * start, 4 * pitch, bias)
    elif lines == 4:
        _plain_4(sums, rows, out + 4 * start, 4 * pitch, bias)
    else:
        _plain_2(sums, rows, out + 4 * start, 4 * pitch, bias)


@jit
def _end_part(kind: Any, sums: Any, size: Any, rows: Any, out: Any, pitch: Any, start: Any, bias: Any) -> None:
    """As `_end_block`, of a block whose last rows are padding."""
    count = pitch - start
    for row in range(rows):
        found = floats(sums + 4 * row * size, count)
        _add_bias(bias, found, count)
        if kind == _ADDED:
            into = halves(out + 2 * (row * pitch + start), count)
            for j in range(count):
                into[j] = narrow(found[j] + widen(into[j]))
        else:
            values = floats(out + 4 * (row * pitch + start), count)
            for j in range(count):
                values[j] = widen(narrow(found[j])) if kind == _ROUNDED else found[j]


@jit
def _add_bias(bias: Any, sums: Any, count: Any) -> None:
    if bias:
        values = halves(bias, count)
        for i in range(count):
            sums[i] += widen(values[i])


@jit
def _product(m: Any, step: Any, x: Any, scratch: Any, member: Any, team: Any, out: Any, kind: Any) -> None:
    """x by a weight to `out`, where the sums end as `kind` says: see `Ending`."""
    block, end = _begin(m, step, member, team)
    size, blocks, nbytes = m.lines * LANES, _most_blocks(m, step), m.lines * 64 * m.pairs
    while block < end:
        apart = (end - block) // blocks  # each of a group's streams goes on where it was in the group before
        for first in range(block, block + apart):
            _group(m, m.weight + first * nbytes, apart * nbytes, blocks, step, x, scratch)
            for i in range(blocks):
                start = (first + i * apart) * size
                sums, bias = scratch + 4 * i * MAX_ROWS * size, m.bias + 2 * start if m.bias else 0
                if start + size <= m.rows:
                    _end_block(kind, m.lines, sums, step.rows, out, m.rows, start, bias)
                else:
                    _end_part(kind, sums, size, step.rows, out, m.rows, start, bias)
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
        whole, count = start + size <= gate.rows, min(size, gate.rows - start)
        if gate.bias or up.bias or not whole:
            for row in range(step.rows):
                gates, ups = floats(scratch + 4 * row * size, count), floats(other + 4 * row * size, count)
                _add_bias(gate.bias + 2 * start if gate.bias else 0, gates, count)
                _add_bias(up.bias + 2 * start if up.bias else 0, ups, count)
                if not whole:
                    out = halves(step.hidden + 2 * (row * pitch + start), count)
                    for j in range(count):
                        out[j] = narrow(gates[j] * ups[j] / (ONE + exp(-gates[j])))
        if whole and gate.lines == 4:
            _gated_4(scratch, other, step.rows, step.hidden + 2 * start, 2 * pitch)
        elif whole:
            _gated_2(scratch, other, step.rows, step.hidden + 2 * start, 2 * pitch)
    _end(step)


@jit
def _norm(step: Any, weight: Any, pitch: Any, member: Any) -> Any:
    """The RMSNorm of `step.x` in this thread's own memory, rows `pitch` apart."""
    normed = step.normed + 2 * MAX_ROWS * pitch * member
    scale = halves(weight, step.size)
    for row in range(step.rows):
        x, out = halves(step.x + 2 * row * step.size, step.size), halves(normed + 2 * row * pitch, step.size)
        total = ZERO
        for i in range(step.size):
            total += widen(x[i]) * widen(x[i])
        inverse = ONE / np.sqrt(total / np.float32(step.size) + step.eps)
        for i in range(step.size):
            out[i] = narrow(widen(narrow(widen(x[i]) * inverse)) * widen(scale[i]))
    return normed


@jit
def _attend_all(layer: Any, step: Any, scratch: Any, member: Any, team: Any) -> None:
    """This thread's sequences and KV heads."""
    items = step.rows * step.num_kv_heads
    last = items * (member + 1) // team - 1
    if step.wide_tiles != 0:
        configure_tiles(step.wide_tiles)
    for item in range(items * member // team, last + 1):
        attend(layer, step, item, min(item + 1, last), scratch)
    if step.wide_tiles != 0:
        release_tiles()


@jit
def _layer(layer: Any, step: Any, scratch: Any, member: Any, team: Any) -> None:
    normed = _norm(step, layer.input_norm, 2 * layer.qkv.pairs, member)
    _product(layer.qkv, step, normed, scratch, member, team, step.heads, _PLAIN)
    _barrier()
    _attend_all(layer, step, scratch, member, team)
    _barrier()
    _product(layer.output, step, step.attended, scratch, member, team, step.x, _ADDED)
    _barrier()
    normed = _norm(step, layer.post_norm, 2 * layer.gate.pairs, member)
    _gated(layer.gate, layer.up, step, normed, scratch, member, team, 2 * layer.down.pairs)
    _barrier()
    _product(layer.down, step, step.hidden, scratch, member, team, step.x, _ADDED)


def run(address: Any) -> None:
    call = carray(address, 1)[0]
    step = call.step
    layers = carray(pointer(call.layers), (call.last + 1,), LAYER)
    member, team = np.int64(_thread_num()), np.int64(_num_threads())
    scratch = step.scratch + step.scratch_bytes * member
    for i in range(call.first, call.end):
        if i > call.first:
            _barrier()
        if i < call.last:
            _layer(layers[i], step, scratch, member, team)
        else:
            normed = _norm(step, layers[i].input_norm, 2 * layers[i].qkv.pairs, member)
            _product(layers[i].qkv, step, normed, scratch, member, team, step.logits, _ROUNDED)


def compile_run(cache_folder: str | None) -> Any:
    """`run` as a C function of one address of a RUN. Takes seconds, unless an earlier process left it in the folder."""
    options = {"nopython": True, "cache": cache_folder is not None, **OPTIONS}
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, cache_folder or ""
    try:
        return numba.cfunc(types.void(types.CPointer(from_dtype(RUN))), **options)(run)
    finally:
        numba.config.CACHE_DIR = before
