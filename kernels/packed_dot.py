"""The inner loops over packed bf16 weights, written in LLVM's vectors: what numba's own loops cannot say.

A packed weight lies as [row blocks, column pairs, rows of a block, 2]: 64 bytes are a pair of columns of 16 weight rows, and such a lane
group meets one 4-byte pair of x. A *group* is a few row blocks, each read as a stream of its own, which is what keeps memory busy; its
sums come out as fp32 [blocks, MAX_ROWS, rows of a block], of which only the given rows of x are filled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
LINE_BYTES = 64
MAX_ROWS = 16  # of x
DOT_ROWS = 4  # of x at once, without tiles
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)  # Cephes' expf
TILE_PAIRS = 16  # column pairs that a tile holds
TILES_OF_SUMS = 4  # then come three of weights and one of x
DOTS_AHEAD_BYTES = 2048  # in each stream; measured, as what follows
TILES_AHEAD_BYTES = 3072
TILES_NEAR_BYTES = 256  # to the core's first cache: a tile's load waits for its lines one by one

_I8, _I32, _I64, _F32, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
_BYTES = _I8.as_pointer()
_FLOATS = ir.VectorType(_F32, LANES)
_INTS = ir.VectorType(_I32, LANES)

_features = binding.get_host_cpu_features()
HAS_DOT = bool(_features.get("avx512bf16"))
HAS_TILES = bool(_features.get("amx-bf16") and _features.get("amx-tile"))  # without, what follows of tiles compiles to nothing


class _BFloat(ir.Type):  # type: ignore[misc]
    """llvmlite has no name for it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


def _call(builder: Any, name: str, result: Any, *operands: Any) -> Any:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _prefetch(builder: Any, address: Any, locality: int = 2) -> None:
    _call(builder, "llvm.prefetch.p0", _VOID, address, _I32(0), _I32(locality), _I32(1))


def _multiply_pairs(builder: Any, total: Any, weights: Any, x: Any) -> Any:
    """total + low(weights) * low(x) + high(weights) * high(x), lane by lane."""
    if HAS_DOT:
        pairs = (builder.bitcast(value, _BFLOATS) for value in (weights, x))
        return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, *pairs)
    shift, mask = ir.Constant(_INTS, [16] * LANES), ir.Constant(_INTS, [0xFFFF0000] * LANES)
    low = [builder.bitcast(builder.shl(value, shift), _FLOATS) for value in (weights, x)]
    high = [builder.bitcast(builder.and_(value, mask), _FLOATS) for value in (weights, x)]
    return _call(builder, "llvm.fma.v16f32", _FLOATS, *high, _call(builder, "llvm.fma.v16f32", _FLOATS, *low, total))


def _broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_INTS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _I32(0)), undefined, ir.Constant(_INTS, [0] * LANES))


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


class _PairLoop:
    """`for k in range(0, pairs, step)`: the builder stands in its body until `close`."""

    def __init__(self, builder: Any, pairs: Any, step: int) -> None:
        self._builder, self._pairs, self._step = builder, pairs, step
        self._before = builder.block
        self._body = builder.append_basic_block("pairs")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.k = builder.phi(_I64)
        self.k.add_incoming(_I64(0), self._before)

    def totals(self, count: int) -> list[Any]:
        return self.carry([_constant(0.0)] * count)

    def carry(self, values: list[Any]) -> list[Any]:
        """What goes from one time round to the next, by what it begins with."""
        carried = [self._builder.phi(_FLOATS) for _ in values]
        for phi, value in zip(carried, values, strict=True):
            phi.add_incoming(value, self._before)
        return carried

    def close(self, totals: list[Any], sums: list[Any]) -> None:
        builder, after = self._builder, self._builder.append_basic_block("after")
        following = builder.add(self.k, _I64(self._step))
        builder.cbranch(builder.icmp_signed("<", following, self._pairs), self._body, after)
        self.k.add_incoming(following, self._body)
        for total, value in zip(totals, sums, strict=True):
            total.add_incoming(value, self._body)
        builder.position_at_end(after)


def _streams(builder: Any, weight: Any, stride: Any, num_blocks: int) -> list[Any]:
    start = builder.inttoptr(weight, _BYTES)
    return [builder.gep(start, [builder.mul(stride, _I64(i))]) for i in range(num_blocks)]


def dot_group(num_rows: int, num_blocks: int, lines: int) -> Callable[..., None]:
    """(weight, stride, x, pairs, out): `num_rows` rows of x by `num_blocks` blocks of `lines` * 16 weight rows, `stride` bytes apart."""

    def generate(builder: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> None:
        streams = _streams(builder, weight, stride, num_blocks)
        x = builder.inttoptr(x, _I32.as_pointer())
        loop = _PairLoop(builder, pairs, 1)
        totals = loop.totals(num_blocks * num_rows * lines)
        places = [builder.add(builder.mul(pairs, _I64(row)), loop.k) for row in range(num_rows)]
        rows = [_broadcast(builder, builder.load(builder.gep(x, [place]))) for place in places]
        sums = list(totals)
        for block, stream in enumerate(streams):
            base = builder.gep(stream, [builder.mul(loop.k, _I64(lines * LINE_BYTES))])
            for line in range(lines):
                _prefetch(builder, builder.gep(base, [_I64(line * LINE_BYTES + DOTS_AHEAD_BYTES)]))
                weights = builder.load(builder.bitcast(builder.gep(base, [_I64(line * LINE_BYTES)]), _INTS.as_pointer()))
                weights.align = LINE_BYTES
                for row in range(num_rows):
                    i = (block * num_rows + row) * lines + line
                    sums[i] = _multiply_pairs(builder, sums[i], weights, rows[row])
        loop.close(totals, sums)
        out = builder.inttoptr(out, _BYTES)
        for i, value in enumerate(sums):
            block, row, line = i // lines // num_rows, i // lines % num_rows, i % lines
            place = builder.gep(out, [_I64(((block * MAX_ROWS + row) * lines + line) * LINE_BYTES)])
            builder.store(value, builder.bitcast(place, _FLOATS.as_pointer())).align = 4

    return _function(f"dot_{num_rows}_{num_blocks}_{lines}", generate)


def tile_group(num_blocks: int, lines: int) -> Callable[..., None]:
    """As `dot_group`, in AMX tiles: as many rows of x as `configure_tiles` said. `pairs` is a multiple of TILE_PAIRS."""
    assert num_blocks * lines <= TILES_OF_SUMS

    def generate(builder: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> None:
        if not HAS_TILES:
            return
        streams = _streams(builder, weight, stride, num_blocks)
        x, pitch = builder.inttoptr(x, _BYTES), builder.mul(pairs, _I64(4))
        for tile in range(num_blocks * lines):
            _call(builder, "llvm.x86.tilezero", _VOID, _I8(tile))
        loop = _PairLoop(builder, pairs, TILE_PAIRS)
        _call(builder, "llvm.x86.tileloadd64", _VOID, _I8(7), builder.gep(x, [builder.mul(loop.k, _I64(4))]), pitch)
        bases = [builder.gep(stream, [builder.mul(loop.k, _I64(lines * LINE_BYTES))]) for stream in streams]
        for tile in range(num_blocks * lines):
            for place in range(tile * TILE_PAIRS, (tile + 1) * TILE_PAIRS):  # in turns, as the streams are what memory is quick at
                line = builder.gep(bases[place % num_blocks], [_I64(place // num_blocks * LINE_BYTES)])
                _prefetch(builder, builder.gep(line, [_I64(TILES_AHEAD_BYTES)]))
                _prefetch(builder, builder.gep(line, [_I64(TILES_NEAR_BYTES)]), 3)
            weights = _I8(TILES_OF_SUMS + tile % 3)
            start = builder.gep(bases[tile // lines], [_I64(tile % lines * LINE_BYTES)])
            _call(builder, "llvm.x86.tileloadd64", _VOID, weights, start, _I64(lines * LINE_BYTES))
            _call(builder, "llvm.x86.tdpbf16ps", _VOID, _I8(tile), _I8(7), weights)
        loop.close([], [])
        out = builder.inttoptr(out, _BYTES)
        for tile in range(num_blocks * lines):
            place = builder.gep(out, [_I64((tile // lines * MAX_ROWS * lines + tile % lines) * LINE_BYTES)])
            _call(builder, "llvm.x86.tilestored64", _VOID, _I8(tile), place, _I64(lines * LINE_BYTES))

    return _function(f"tiles_{num_blocks}_{lines}", generate)


def slot_dots() -> Callable[..., None]:
    """(keys, stride, q, pairs, out): one row q by LANES rows of bf16, `stride` bytes apart; `pairs` is a multiple of LANES."""

    def generate(builder: Any, keys: Any, stride: Any, q: Any, pairs: Any, out: Any) -> None:
        slots, q = _streams(builder, keys, stride, LANES), builder.inttoptr(q, _BYTES)
        loop = _PairLoop(builder, pairs, LANES)
        totals = loop.totals(LANES)
        place = builder.mul(loop.k, _I64(4))

        def line(start: Any) -> Any:
            loaded = builder.load(builder.bitcast(builder.gep(start, [place]), _INTS.as_pointer()))
            loaded.align = 4
            return loaded

        x = line(q)
        sums = [_multiply_pairs(builder, total, line(slot), x) for total, slot in zip(totals, slots, strict=True)]
        loop.close(totals, sums)
        width = LANES
        while width > 1:  # each vector is added to itself by halves, two vectors going into one
            starts = [i * width + j for i in range(2 * LANES // width) for j in range(width // 2)]
            lower, upper = (ir.Constant(_INTS, [start + shift for start in starts]) for shift in (0, width // 2))
            pairs_of_sums = list(zip(sums[::2], sums[1::2], strict=True))
            sums = [builder.fadd(builder.shuffle_vector(a, b, lower), builder.shuffle_vector(a, b, upper)) for a, b in pairs_of_sums]
            width //= 2
        builder.store(sums[0], builder.bitcast(builder.inttoptr(out, _BYTES), _FLOATS.as_pointer())).align = 4

    return _function("slot_dots", generate)


def slot_tiles() -> Callable[..., None]:
    """(keys, stride, q, pairs, out): LANES rows of bf16, `stride` bytes apart, by LANES packed queries; a line of sums for each row.

    The tiles are whole ones. `pairs` is a multiple of TILE_PAIRS.
    """

    def generate(builder: Any, keys: Any, stride: Any, q: Any, pairs: Any, out: Any) -> None:
        if not HAS_TILES:
            return
        keys, q, out = (builder.inttoptr(start, _BYTES) for start in (keys, q, out))
        _call(builder, "llvm.x86.tilezero", _VOID, _I8(0))
        loop = _PairLoop(builder, pairs, TILE_PAIRS)
        _call(builder, "llvm.x86.tileloadd64", _VOID, _I8(4), builder.gep(keys, [builder.mul(loop.k, _I64(4))]), stride)
        _call(builder, "llvm.x86.tileloadd64", _VOID, _I8(5), builder.gep(q, [builder.mul(loop.k, _I64(LINE_BYTES))]), _I64(LINE_BYTES))
        _call(builder, "llvm.x86.tdpbf16ps", _VOID, _I8(0), _I8(4), _I8(5))
        loop.close([], [])
        _call(builder, "llvm.x86.tilestored64", _VOID, _I8(0), out, _I64(LINE_BYTES))

    return _function("slot_tiles", generate)


def _exp(builder: Any, x: Any) -> Any:
    """Of numbers that are not above 0, by Cephes' polynomial."""

    def fma(a: Any, b: Any, c: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", _FLOATS, a, b, c)

    least = _constant(-87.0)
    x = builder.select(builder.fcmp_ordered(">", x, least), x, least)
    power = _call(builder, "llvm.floor.v16f32", _FLOATS, fma(x, _constant(1.4426950408889634), _constant(0.5)))
    x = fma(power, _constant(-0.6931471805599453), x)
    series = _constant(EXP[0])
    for coefficient in EXP[1:]:
        series = fma(series, x, _constant(coefficient))
    value = builder.fadd(fma(builder.fmul(series, x), x, x), _constant(1.0))
    exponent = builder.add(builder.fptosi(power, _INTS), ir.Constant(_INTS, [127] * LANES))
    return builder.fmul(value, builder.bitcast(builder.shl(exponent, ir.Constant(_INTS, [23] * LANES)), _FLOATS))


def slot_weights() -> Callable[..., None]:
    """(scores, count, state, 0, 0): `count` lines of scores, a lane for each head, become weights against the highest so far.

    The state is three lines: the highest, the sum of the weights, and what sums against the highest before are to be multiplied by.
    """

    def generate(builder: Any, scores: Any, count: Any, state: Any, *_: Any) -> None:
        scores, state = builder.inttoptr(scores, _BYTES), builder.inttoptr(state, _BYTES)

        def line(start: Any, number: Any) -> Any:
            return builder.bitcast(builder.gep(start, [builder.mul(number, _I64(LINE_BYTES))]), _FLOATS.as_pointer())

        def load(place: Any) -> Any:
            loaded = builder.load(place)
            loaded.align = 4
            return loaded

        before = load(line(state, _I64(0)))
        loop = _PairLoop(builder, count, 1)
        (highest,) = loop.carry([before])
        row = load(line(scores, loop.k))
        top = builder.select(builder.fcmp_ordered(">", row, highest), row, highest)
        loop.close([highest], [top])
        shrinking = _exp(builder, builder.fsub(before, top))
        total = builder.fmul(load(line(state, _I64(1))), shrinking)
        loop = _PairLoop(builder, count, 1)
        (sum_before,) = loop.carry([total])
        place = line(scores, loop.k)
        weights = _exp(builder, builder.fsub(load(place), top))
        builder.store(weights, place).align = 4
        total = builder.fadd(sum_before, weights)
        loop.close([sum_before], [total])
        for number, value in enumerate((top, total, shrinking)):
            builder.store(value, line(state, _I64(number))).align = 4

    return _function("slot_weights", generate)


def slot_sums(num_heads: int) -> Callable[..., None]:
    """(values, stride, weights, count, out): adds 32 columns of `count` rows of bf16, each row by its weight, to `out` of each head.

    The even columns come before the odd ones. Rows are `stride` bytes apart, heads of `out` twice that; weights are a line for each row.
    """

    def generate(builder: Any, values: Any, stride: Any, weights: Any, count: Any, out: Any) -> None:
        values, weights, out = (builder.inttoptr(start, _BYTES) for start in (values, weights, out))
        loop = _PairLoop(builder, count, 1)
        totals = loop.totals(2 * num_heads)
        row = builder.load(builder.bitcast(builder.gep(values, [builder.mul(loop.k, stride)]), _INTS.as_pointer()))
        row.align = 4
        even = builder.bitcast(builder.shl(row, ir.Constant(_INTS, [16] * LANES)), _FLOATS)
        odd = builder.bitcast(builder.and_(row, ir.Constant(_INTS, [0xFFFF0000] * LANES)), _FLOATS)
        sums: list[Any] = []
        for head in range(num_heads):
            place = builder.add(builder.mul(loop.k, _I64(LINE_BYTES)), _I64(4 * head))
            weight = builder.load(builder.bitcast(builder.gep(weights, [place]), _I32.as_pointer()))
            factor = builder.bitcast(_broadcast(builder, weight), _FLOATS)
            sums += [_call(builder, "llvm.fma.v16f32", _FLOATS, half, factor, totals[len(sums) + i]) for i, half in enumerate((even, odd))]
        loop.close(totals, sums)
        for i, value in enumerate(sums):
            start = builder.add(builder.mul(stride, _I64(2 * (i // 2))), _I64(i % 2 * LINE_BYTES))
            place = builder.bitcast(builder.gep(out, [start]), _FLOATS.as_pointer())
            before = builder.load(place)
            before.align = 4
            builder.store(builder.fadd(before, value), place).align = 4

    return _function(f"slot_sums_{num_heads}", generate)


def _function(name: str, generate: Callable[..., None]) -> Callable[..., None]:
    """Five integers to nothing, by what `generate(builder, *integers)` writes; not inlined, so that it is compiled once."""
    signature = types.void(*[types.int64] * 5)

    def call(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VOID, [_I64] * 5), name)
        if not function.blocks:
            function.linkage = "internal"
            function.attributes.add("noinline")
            inner = ir.IRBuilder(function.append_basic_block("entry"))
            generate(inner, *function.args)
            inner.ret_void()
        builder.call(function, arguments)
        return context.get_dummy_value()

    def typed(context: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> Any:
        return signature, call

    made: Callable[..., None] = intrinsic(typed)
    return made


@intrinsic  # type: ignore[untyped-decorator]
def configure_tiles(context: Any, configuration: Any) -> Any:
    """Of this thread, by the 64 bytes at an address: see `tile_configuration`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if HAS_TILES:
            _call(builder, "llvm.x86.ldtilecfg", _VOID, builder.inttoptr(arguments[0], _BYTES))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def release_tiles(context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if HAS_TILES:
            _call(builder, "llvm.x86.tilerelease", _VOID)
        return context.get_dummy_value()

    return types.void(), generate


def tile_configuration(num_rows: int) -> bytes:
    """Sums and x have `num_rows` rows, weights TILE_PAIRS; all are 64 bytes wide."""
    rows = [num_rows] * TILES_OF_SUMS + [TILE_PAIRS] * 3 + [num_rows]
    return bytes([1]) + bytes(15) + LINE_BYTES.to_bytes(2, "little") * len(rows) + bytes(16) + bytes(rows) + bytes(8)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(context: Any, address: Any) -> Any:
    """To the core's first cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, builder.inttoptr(arguments[0], _BYTES), 3)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pointer(context: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _BYTES)

    return types.voidptr(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate
