"""The inner loops over packed bf16 weights, written in LLVM's vectors: what numba's own loops cannot say.

A packed weight lies as [row blocks, column pairs, rows of a block, 2]: 64 bytes are a pair of columns of 16 weight rows, and such a lane
group meets one 4-byte pair of x. A *group* is a few row blocks, each read as a stream of its own, which is what keeps memory busy; its
sums come out as fp32 [blocks, MAX_ROWS, rows of a block], of which only the given rows of x are filled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from polymux.kernels.llvm_vectors import (
    BFLOATS,
    BYTES,
    FLOATS,
    I8,
    I32,
    I64,
    INTS,
    LANES,
    LINE_BYTES,
    VOID,
    Loop,
    broadcast,
    call,
    features,
    five_integers,
    prefetch_line,
)

MAX_ROWS = 16  # of x
DOT_ROWS = 4  # of x at once, without tiles
TILE_PAIRS = 16  # column pairs that a tile holds
TILES_OF_SUMS = 4  # then come three of weights and one of x
DOTS_AHEAD_BYTES = 2048  # in each stream; measured, as what follows
TILES_AHEAD_BYTES = 3072
TILES_NEAR_BYTES = 256  # to the core's first cache: a tile's load waits for its lines one by one

HAS_DOT = bool(features.get("avx512bf16"))
HAS_TILES = bool(features.get("amx-bf16") and features.get("amx-tile"))  # without, what follows of tiles compiles to nothing


def _multiply_pairs(builder: Any, total: Any, weights: Any, x: Any) -> Any:
    """total + low(weights) * low(x) + high(weights) * high(x), lane by lane."""
    if HAS_DOT:
        pairs = (builder.bitcast(value, BFLOATS) for value in (weights, x))
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, *pairs)
    shift, mask = ir.Constant(INTS, [16] * LANES), ir.Constant(INTS, [0xFFFF0000] * LANES)
    low = [builder.bitcast(builder.shl(value, shift), FLOATS) for value in (weights, x)]
    high = [builder.bitcast(builder.and_(value, mask), FLOATS) for value in (weights, x)]
    return call(builder, "llvm.fma.v16f32", FLOATS, *high, call(builder, "llvm.fma.v16f32", FLOATS, *low, total))


def _streams(builder: Any, weight: Any, stride: Any, num_blocks: int) -> list[Any]:
    start = builder.inttoptr(weight, BYTES)
    return [builder.gep(start, [builder.mul(stride, I64(i))]) for i in range(num_blocks)]


def dot_group(num_rows: int, num_blocks: int, lines: int) -> Callable[..., None]:
    """(weight, stride, x, pairs, out): `num_rows` rows of x by `num_blocks` blocks of `lines` * 16 weight rows, `stride` bytes apart."""

    def generate(builder: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> None:
        streams = _streams(builder, weight, stride, num_blocks)
        x = builder.inttoptr(x, I32.as_pointer())
        loop = Loop(builder, pairs, 1)
        totals = loop.totals(num_blocks * num_rows * lines)
        places = [builder.add(builder.mul(pairs, I64(row)), loop.k) for row in range(num_rows)]
        rows = [broadcast(builder, builder.load(builder.gep(x, [place]))) for place in places]
        sums = list(totals)
        for block, stream in enumerate(streams):
            base = builder.gep(stream, [builder.mul(loop.k, I64(lines * LINE_BYTES))])
            for line in range(lines):
                prefetch_line(builder, builder.gep(base, [I64(line * LINE_BYTES + DOTS_AHEAD_BYTES)]))
                weights = builder.load(builder.bitcast(builder.gep(base, [I64(line * LINE_BYTES)]), INTS.as_pointer()))
                weights.align = LINE_BYTES
                for row in range(num_rows):
                    i = (block * num_rows + row) * lines + line
                    sums[i] = _multiply_pairs(builder, sums[i], weights, rows[row])
        loop.close(totals, sums)
        out = builder.inttoptr(out, BYTES)
        for i, value in enumerate(sums):
            block, row, line = i // lines // num_rows, i // lines % num_rows, i % lines
            place = builder.gep(out, [I64(((block * MAX_ROWS + row) * lines + line) * LINE_BYTES)])
            builder.store(value, builder.bitcast(place, FLOATS.as_pointer())).align = 4

    return five_integers(f"dot_{num_rows}_{num_blocks}_{lines}", generate)


def tile_group(num_blocks: int, lines: int) -> Callable[..., None]:
    """As `dot_group`, in AMX tiles: as many rows of x as `configure_tiles` said. `pairs` is a multiple of TILE_PAIRS."""
    assert num_blocks * lines <= TILES_OF_SUMS

    def generate(builder: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> None:
        if not HAS_TILES:
            return
        streams = _streams(builder, weight, stride, num_blocks)
        x, pitch = builder.inttoptr(x, BYTES), builder.mul(pairs, I64(4))
        for tile in range(num_blocks * lines):
            call(builder, "llvm.x86.tilezero", VOID, I8(tile))
        loop = Loop(builder, pairs, TILE_PAIRS)
        call(builder, "llvm.x86.tileloadd64", VOID, I8(7), builder.gep(x, [builder.mul(loop.k, I64(4))]), pitch)
        bases = [builder.gep(stream, [builder.mul(loop.k, I64(lines * LINE_BYTES))]) for stream in streams]
        for tile in range(num_blocks * lines):
            for place in range(tile * TILE_PAIRS, (tile + 1) * TILE_PAIRS):  # in turns, as the streams are what memory is quick at
                line = builder.gep(bases[place % num_blocks], [I64(place // num_blocks * LINE_BYTES)])
                prefetch_line(builder, builder.gep(line, [I64(TILES_AHEAD_BYTES)]))
                prefetch_line(builder, builder.gep(line, [I64(TILES_NEAR_BYTES)]), 3)
            weights = I8(TILES_OF_SUMS + tile % 3)
            start = builder.gep(bases[tile // lines], [I64(tile % lines * LINE_BYTES)])
            call(builder, "llvm.x86.tileloadd64", VOID, weights, start, I64(lines * LINE_BYTES))
            call(builder, "llvm.x86.tdpbf16ps", VOID, I8(tile), I8(7), weights)
        loop.close([], [])
        out = builder.inttoptr(out, BYTES)
        for tile in range(num_blocks * lines):
            place = builder.gep(out, [I64((tile // lines * MAX_ROWS * lines + tile % lines) * LINE_BYTES)])
            call(builder, "llvm.x86.tilestored64", VOID, I8(tile), place, I64(lines * LINE_BYTES))

    return five_integers(f"tiles_{num_blocks}_{lines}", generate)


def slot_dots() -> Callable[..., None]:
    """(keys, stride, q, pairs, out): one row q by LANES rows of bf16, `stride` bytes apart; `pairs` is a multiple of LANES."""

    def generate(builder: Any, keys: Any, stride: Any, q: Any, pairs: Any, out: Any) -> None:
        slots, q = _streams(builder, keys, stride, LANES), builder.inttoptr(q, BYTES)
        loop = Loop(builder, pairs, LANES)
        totals = loop.totals(LANES)
        place = builder.mul(loop.k, I64(4))

        def line(start: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(start, [place]), INTS.as_pointer()))
            loaded.align = 4
            return loaded

        x = line(q)
        sums = [_multiply_pairs(builder, total, line(slot), x) for total, slot in zip(totals, slots, strict=True)]
        loop.close(totals, sums)
        width = LANES
        while width > 1:  # each vector is added to itself by halves, two vectors going into one
            starts = [i * width + j for i in range(2 * LANES // width) for j in range(width // 2)]
            lower, upper = (ir.Constant(INTS, [start + shift for start in starts]) for shift in (0, width // 2))
            pairs_of_sums = list(zip(sums[::2], sums[1::2], strict=True))
            sums = [builder.fadd(builder.shuffle_vector(a, b, lower), builder.shuffle_vector(a, b, upper)) for a, b in pairs_of_sums]
            width //= 2
        builder.store(sums[0], builder.bitcast(builder.inttoptr(out, BYTES), FLOATS.as_pointer())).align = 4

    return five_integers("slot_dots", generate)


def slot_tiles() -> Callable[..., None]:
    """(keys, stride, q, pairs, out): LANES rows of bf16, `stride` bytes apart, by LANES packed queries; a line of sums for each row.

    The tiles are whole ones. `pairs` is a multiple of TILE_PAIRS.
    """

    def generate(builder: Any, keys: Any, stride: Any, q: Any, pairs: Any, out: Any) -> None:
        if not HAS_TILES:
            return
        keys, q, out = (builder.inttoptr(start, BYTES) for start in (keys, q, out))
        call(builder, "llvm.x86.tilezero", VOID, I8(0))
        loop = Loop(builder, pairs, TILE_PAIRS)
        call(builder, "llvm.x86.tileloadd64", VOID, I8(4), builder.gep(keys, [builder.mul(loop.k, I64(4))]), stride)
        call(builder, "llvm.x86.tileloadd64", VOID, I8(5), builder.gep(q, [builder.mul(loop.k, I64(LINE_BYTES))]), I64(LINE_BYTES))
        call(builder, "llvm.x86.tdpbf16ps", VOID, I8(0), I8(4), I8(5))
        loop.close([], [])
        call(builder, "llvm.x86.tilestored64", VOID, I8(0), out, I64(LINE_BYTES))

    return five_integers("slot_tiles", generate)


@intrinsic  # type: ignore[untyped-decorator]
def configure_tiles(context: Any, configuration: Any) -> Any:
    """Of this thread, by the 64 bytes at an address: see `tile_configuration`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if HAS_TILES:
            call(builder, "llvm.x86.ldtilecfg", VOID, builder.inttoptr(arguments[0], BYTES))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def release_tiles(context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if HAS_TILES:
            call(builder, "llvm.x86.tilerelease", VOID)
        return context.get_dummy_value()

    return types.void(), generate


def tile_configuration(num_rows: int) -> bytes:
    """Sums and x have `num_rows` rows, weights TILE_PAIRS; all are 64 bytes wide."""
    rows = [num_rows] * TILES_OF_SUMS + [TILE_PAIRS] * 3 + [num_rows]
    return bytes([1]) + bytes(15) + LINE_BYTES.to_bytes(2, "little") * len(rows) + bytes(16) + bytes(rows) + bytes(8)
