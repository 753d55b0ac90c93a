"""What numba's own loops cannot say: pieces of LLVM's vector code, and functions made of them that compiled code calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
LINE_BYTES = 64
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)  # Cephes' expf

I8, I32, I64, F32, VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
BYTES = I8.as_pointer()
FLOATS = ir.VectorType(F32, LANES)
INTS = ir.VectorType(I32, LANES)

features = binding.get_host_cpu_features()


class BFloat(ir.Type):  # type: ignore[misc]
    """llvmlite has no name for it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


BFLOATS = ir.VectorType(BFloat(), 2 * LANES)
_HALF_BFLOATS, _HALF_INTS = ir.VectorType(BFloat(), LANES), ir.VectorType(ir.IntType(16), LANES)


def call(builder: Any, name: str, result: Any, *operands: Any) -> Any:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def prefetch_line(builder: Any, address: Any, locality: int = 2) -> None:
    call(builder, "llvm.prefetch.p0", VOID, address, I32(0), I32(locality), I32(1))


def broadcast(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(INTS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, I32(0)), undefined, ir.Constant(INTS, [0] * LANES))


def constant(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def load_floats(builder: Any, address: Any) -> Any:
    loaded = builder.load(builder.bitcast(address, FLOATS.as_pointer()))
    loaded.align = 4
    return loaded


def store_floats(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.bitcast(address, FLOATS.as_pointer())).align = 4


def load_halves(builder: Any, address: Any) -> Any:
    """LANES numbers of bf16, as fp32."""
    loaded = builder.load(builder.bitcast(address, _HALF_INTS.as_pointer()))
    loaded.align = 2
    return builder.bitcast(builder.shl(builder.zext(loaded, INTS), ir.Constant(INTS, [16] * LANES)), FLOATS)


def store_halves(builder: Any, value: Any, address: Any) -> None:
    """fp32 as bf16, to nearest even."""
    builder.store(builder.fptrunc(value, _HALF_BFLOATS), builder.bitcast(address, _HALF_BFLOATS.as_pointer())).align = 2


def rounded(builder: Any, value: Any) -> Any:
    """fp32 of what bf16 holds."""
    return builder.fpext(builder.fptrunc(value, _HALF_BFLOATS), FLOATS)


class Loop:
    """`for k in range(0, count, step)`: the builder stands in its body until `close`."""

    def __init__(self, builder: Any, count: Any, step: int) -> None:
        self._builder, self._count, self._step = builder, count, step
        self._before = builder.block
        self._body = builder.append_basic_block("body")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.k = builder.phi(I64)
        self.k.add_incoming(I64(0), self._before)

    def totals(self, count: int) -> list[Any]:
        return self.carry([constant(0.0)] * count)

    def carry(self, values: list[Any]) -> list[Any]:
        """What goes from one time round to the next, by what it begins with."""
        carried = [self._builder.phi(FLOATS) for _ in values]
        for phi, value in zip(carried, values, strict=True):
            phi.add_incoming(value, self._before)
        return carried

    def close(self, totals: list[Any], sums: list[Any]) -> None:
        builder, after = self._builder, self._builder.append_basic_block("after")
        following = builder.add(self.k, I64(self._step))
        builder.cbranch(builder.icmp_signed("<", following, self._count), self._body, after)
        self.k.add_incoming(following, self._body)
        for total, value in zip(totals, sums, strict=True):
            total.add_incoming(value, self._body)
        builder.position_at_end(after)


def exp(builder: Any, x: Any) -> Any:
    """By Cephes' polynomial; below -87 and above 88 as of these."""

    def fma(a: Any, b: Any, c: Any) -> Any:
        return call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)

    for limit, side in ((constant(-87.0), ">"), (constant(88.0), "<")):
        x = builder.select(builder.fcmp_unordered(side, x, limit), x, limit)
    power = call(builder, "llvm.floor.v16f32", FLOATS, fma(x, constant(1.4426950408889634), constant(0.5)))
    x = fma(power, constant(-0.6931471805599453), x)
    series = constant(EXP[0])
    for coefficient in EXP[1:]:
        series = fma(series, x, constant(coefficient))
    value = builder.fadd(fma(builder.fmul(series, x), x, x), constant(1.0))
    exponent = builder.add(builder.fptosi(power, INTS), ir.Constant(INTS, [127] * LANES))
    return builder.fmul(value, builder.bitcast(builder.shl(exponent, ir.Constant(INTS, [23] * LANES)), FLOATS))


def five_integers(name: str, generate: Callable[..., None]) -> Callable[..., None]:
    """Five integers to nothing, by what `generate(builder, *integers)` writes; not inlined, so that it is compiled once."""
    signature = types.void(*[types.int64] * 5)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VOID, [I64] * 5), name)
        if not function.blocks:
            function.linkage = "internal"
            function.attributes.add("noinline")
            inner = ir.IRBuilder(function.append_basic_block("entry"))
            generate(inner, *function.args)
            inner.ret_void()
        builder.call(function, arguments)
        return context.get_dummy_value()

    def typed(context: Any, weight: Any, stride: Any, x: Any, pairs: Any, out: Any) -> Any:
        return signature, emit

    made: Callable[..., None] = intrinsic(typed)
    return made


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(context: Any, address: Any) -> Any:
    """To the core's first cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch_line(builder, builder.inttoptr(arguments[0], BYTES), 3)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pointer(context: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], BYTES)

    return types.voidptr(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of_bits(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.int32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of_float(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate
