"""One decoder layer over a few rows of single tokens, compiled: each thread of torch's own team runs `layer`, and they meet at barriers.

Activations are bf16 between the steps and sums fp32, as elsewhere. Norms are computed by every thread for itself, which is cheaper than
meeting; products are split by blocks of weight rows, attention by sequence and KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import carray, from_dtype, types

from polymux.kernels import packed_dot
from polymux.kernels.decode_attention import attend
from polymux.kernels.decode_math import ONE, OPTIONS, ZERO, exp, floats, halves, jit, narrow, widen
from polymux.kernels.decode_records import CALL, GROUP_LINES
from polymux.kernels.packed_dot import DOT_ROWS, LANES, MAX_ROWS, configure_tiles, release_tiles

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
        bias = halves(m.bias + 2 * start, count)
        for i in range(count):
            sums[i] += widen(bias[i])


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
                    sums = floats(scratch + 4 * (i * MAX_ROWS + row) * size, count)
                    _add_bias(m, start, sums, count)
                    if kind == 1:
                        into = halves(out + 2 * (row * m.rows + start), count)
                        for j in range(count):
                            into[j] = narrow(sums[j] + widen(into[j]))
                    else:
                        found = floats(out + 4 * (row * m.rows + start), count)
                        for j in range(count):
                            found[j] = widen(narrow(sums[j])) if kind == 2 else sums[j]
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
            gates, ups = floats(scratch + 4 * row * size, count), floats(other + 4 * row * size, count)
            _add_bias(gate, start, gates, count)
            _add_bias(up, start, ups, count)
            out = halves(step.hidden + 2 * (row * pitch + start), count)
            for j in range(count):
                out[j] = narrow(gates[j] * ups[j] / (ONE + exp(-gates[j])))
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


def layer(address: Any) -> None:
    call = carray(address, 1)[0]
    layer, step = call.layer, call.step
    member, team = np.int64(_thread_num()), np.int64(_num_threads())
    scratch = step.scratch + step.scratch_bytes * member
    normed = _norm(step, layer.input_norm, 2 * layer.qkv.pairs, member)
    _product(layer.qkv, step, normed, scratch, member, team, step.heads, 0)
    _barrier()
    _attend_all(layer, step, scratch, member, team)
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
    options = {"nopython": True, "cache": cache_folder is not None, **OPTIONS}
    signature = types.void(types.CPointer(from_dtype(CALL)))
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, cache_folder or ""
    try:
        return numba.cfunc(signature, **options)(layer), numba.cfunc(signature, **options)(predict)
    finally:
        numba.config.CACHE_DIR = before
