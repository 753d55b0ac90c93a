"""What compiled code on one thread is made of: memory at an address as an array, bf16, and a fast exp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import carray

from polymux.kernels.llvm_vectors import EXP, bits_of_float, float_of_bits, pointer

F = TypeVar("F", bound=Callable[..., Any])

ZERO, ONE, _HALF, LOWEST = np.float32(0), np.float32(1), np.float32(0.5), np.float32("-inf")
_LOG2_E, _LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
_E5, _E4, _E3, _E2, _E1, _E0 = (np.float32(coefficient) for coefficient in EXP)
_LEAST, _MOST = np.float32(-87), np.float32(88)

OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "boundscheck": False}


def jit(function: F) -> F:
    return cast(F, numba.njit(nogil=True, **OPTIONS)(function))


@jit
def widen(half: Any) -> Any:
    """bf16 bits as fp32."""
    return float_of_bits(np.int32(np.int64(half) << 16))


@jit
def narrow(value: Any) -> Any:
    """fp32 as bf16 bits, to nearest even."""
    bits = bits_of_float(value)
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) if value == value else np.uint16(0x7FC0)


@jit
def exp(x: Any) -> Any:
    x = min(max(x, _LEAST), _MOST)
    power = np.floor(x * _LOG2_E + _HALF)
    x = x - power * _LN_2
    series = ((((_E5 * x + _E4) * x + _E3) * x + _E2) * x + _E1) * x + _E0
    return (series * x * x + x + ONE) * float_of_bits(np.int32((np.int32(power) + 127) << 23))


@jit
def halves(address: Any, size: Any) -> Any:
    return carray(pointer(address), (size,), np.uint16)


@jit
def floats(address: Any, size: Any) -> Any:
    return carray(pointer(address), (size,), np.float32)


@jit
def integers(address: Any, size: Any) -> Any:
    return carray(pointer(address), (size,), np.int64)
