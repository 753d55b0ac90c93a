"""What follows the products of a few rows, in whole vectors: the weights and sums of attention, and where a product's sums go."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum, auto
from typing import Any

from llvmlite import ir

from polymux.kernels.llvm_vectors import (
    BYTES,
    FLOATS,
    I32,
    I64,
    INTS,
    LANES,
    LINE_BYTES,
    Loop,
    broadcast,
    call,
    constant,
    exp,
    five_integers,
    load_floats,
    load_halves,
    rounded,
    store_floats,
    store_halves,
)


class Ending(StrEnum):
    """What becomes of a product's sums."""

    PLAIN = auto()  # fp32
    ROUNDED = auto()  # fp32 of what bf16 holds
    ADDED = auto()  # to what lies there, in bf16


def end_rows(ending: Ending, lines: int) -> Callable[..., None]:
    """(sums, rows, out, pitch, bias): rows of `lines` * 16 sums, and a bias of bf16 (its address, or 0), to rows `pitch` bytes apart."""

    def generate(builder: Any, sums: Any, rows: Any, out: Any, pitch: Any, bias: Any) -> None:
        sums, out = builder.inttoptr(sums, BYTES), builder.inttoptr(out, BYTES)
        zeros = builder.ptrtoint(_zeros(builder), I64)
        bias = builder.inttoptr(builder.select(builder.icmp_signed("==", bias, I64(0)), zeros, bias), BYTES)
        biases = [load_halves(builder, builder.gep(bias, [I64(2 * LANES * line)])) for line in range(lines)]
        loop = Loop(builder, rows, 1)
        row = builder.gep(out, [builder.mul(loop.k, pitch)])
        for line, offset in enumerate(biases):
            place = builder.add(builder.mul(loop.k, I64(lines * LINE_BYTES)), I64(line * LINE_BYTES))
            value = builder.fadd(load_floats(builder, builder.gep(sums, [place])), offset)
            if ending is Ending.ADDED:
                into = builder.gep(row, [I64(2 * LANES * line)])
                store_halves(builder, builder.fadd(value, load_halves(builder, into)), into)
            else:
                value = rounded(builder, value) if ending is Ending.ROUNDED else value
                store_floats(builder, value, builder.gep(row, [I64(LINE_BYTES * line)]))
        loop.close([], [])

    return five_integers(f"end_rows_{ending}_{lines}", generate)


def _zeros(builder: Any) -> Any:
    """LANES * 4 of bf16: no bias, for the longest block."""
    name, kind = "no_bias", ir.ArrayType(I64, LANES)
    if name not in builder.module.globals:
        made = ir.GlobalVariable(builder.module, kind, name)
        made.linkage, made.global_constant, made.initializer = "internal", True, ir.Constant(kind, None)
    return builder.module.globals[name]


def end_gated_rows(lines: int) -> Callable[..., None]:
    """(gates, ups, rows, out, pitch): silu(gate) * up of `rows` rows of `lines` * 16 sums, as bf16 to rows `pitch` bytes apart."""

    def generate(builder: Any, gates: Any, ups: Any, rows: Any, out: Any, pitch: Any) -> None:
        gates, ups, out = (builder.inttoptr(start, BYTES) for start in (gates, ups, out))
        loop = Loop(builder, rows, 1)
        row = builder.gep(out, [builder.mul(loop.k, pitch)])
        for line in range(lines):
            place = builder.add(builder.mul(loop.k, I64(lines * LINE_BYTES)), I64(line * LINE_BYTES))
            gate, up = (load_floats(builder, builder.gep(start, [place])) for start in (gates, ups))
            divisor = builder.fadd(constant(1.0), exp(builder, builder.fneg(gate)))
            store_halves(builder, builder.fdiv(builder.fmul(gate, up), divisor), builder.gep(row, [I64(2 * LANES * line)]))
        loop.close([], [])

    return five_integers(f"end_gated_rows_{lines}", generate)


def slot_weights() -> Callable[..., None]:
    """(scores, count, state, 0, 0): `count` lines of scores, a lane for each head, become weights against the highest so far.

    The state is three lines: the highest, the sum of the weights, and what sums against the highest before are to be multiplied by.
    """

    def generate(builder: Any, scores: Any, count: Any, state: Any, *_: Any) -> None:
        scores, state = builder.inttoptr(scores, BYTES), builder.inttoptr(state, BYTES)

        def line(start: Any, number: Any) -> Any:
            return builder.bitcast(builder.gep(start, [builder.mul(number, I64(LINE_BYTES))]), FLOATS.as_pointer())

        def load(place: Any) -> Any:
            loaded = builder.load(place)
            loaded.align = 4
            return loaded

        before = load(line(state, I64(0)))
        loop = Loop(builder, count, 1)
        (highest,) = loop.carry([before])
        row = load(line(scores, loop.k))
        top = builder.select(builder.fcmp_ordered(">", row, highest), row, highest)
        loop.close([highest], [top])
        shrinking = exp(builder, builder.fsub(before, top))
        total = builder.fmul(load(line(state, I64(1))), shrinking)
        loop = Loop(builder, count, 1)
        (sum_before,) = loop.carry([total])
        place = line(scores, loop.k)
        weights = exp(builder, builder.fsub(load(place), top))
        builder.store(weights, place).align = 4
        total = builder.fadd(sum_before, weights)
        loop.close([sum_before], [total])
        for number, value in enumerate((top, total, shrinking)):
            builder.store(value, line(state, I64(number))).align = 4

    return five_integers("slot_weights", generate)


def slot_sums(num_heads: int) -> Callable[..., None]:
    """(values, stride, weights, count, out): adds 32 columns of `count` rows of bf16, each row by its weight, to `out` of each head.

    The even columns come before the odd ones. Rows are `stride` bytes apart, heads of `out` twice that; weights are a line for each row.
    """

    def generate(builder: Any, values: Any, stride: Any, weights: Any, count: Any, out: Any) -> None:
        values, weights, out = (builder.inttoptr(start, BYTES) for start in (values, weights, out))
        loop = Loop(builder, count, 1)
        totals = loop.totals(2 * num_heads)
        row = builder.load(builder.bitcast(builder.gep(values, [builder.mul(loop.k, stride)]), INTS.as_pointer()))
        row.align = 4
        even = builder.bitcast(builder.shl(row, ir.Constant(INTS, [16] * LANES)), FLOATS)
        odd = builder.bitcast(builder.and_(row, ir.Constant(INTS, [0xFFFF0000] * LANES)), FLOATS)
        sums: list[Any] = []
        for head in range(num_heads):
            place = builder.add(builder.mul(loop.k, I64(LINE_BYTES)), I64(4 * head))
            weight = builder.load(builder.bitcast(builder.gep(weights, [place]), I32.as_pointer()))
            factor = builder.bitcast(broadcast(builder, weight), FLOATS)
            sums += [call(builder, "llvm.fma.v16f32", FLOATS, half, factor, totals[len(sums) + i]) for i, half in enumerate((even, odd))]
        loop.close(totals, sums)
        for i, value in enumerate(sums):
            start = builder.add(builder.mul(stride, I64(2 * (i // 2))), I64(i % 2 * LINE_BYTES))
            place = builder.bitcast(builder.gep(out, [start]), FLOATS.as_pointer())
            before = builder.load(place)
            before.align = 4
            builder.store(builder.fadd(before, value), place).align = 4

    return five_integers(f"slot_sums_{num_heads}", generate)
