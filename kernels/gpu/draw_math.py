"""What the sampler's kernels share: the arithmetic of `sample.py` on one element, and a row's best logit from those of its chunks.

Each step of `weights` is one rounded operation: what calls it is launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polymux.kernels import sample

FIXED_BITS = tl.constexpr(sample.FIXED_BITS)
DEAD = tl.constexpr(sample.DEAD)
C0, C1, C2, C3, C4, C5 = (tl.constexpr(coefficient * 2.0**sample.FIXED_BITS) for coefficient in sample.EXP2)
NO_ID = tl.constexpr((1 << 31) - 1)


@triton.jit
def key_of(x):
    """An int32 that is ordered as the fp32 x is, both zeros being one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def weights(x, maximum, scale, floor):
    """`sample.fixed_weights` of the octaves that x lies below the maximum, 0 below the floor."""
    octaves = tl.maximum((x - maximum) * scale, DEAD)
    octaves = tl.where(octaves < floor, DEAD, octaves)
    whole = tl.floor(octaves)
    fraction = octaves - whole
    value = fraction * C5
    value = (value + C4) * fraction
    value = (value + C3) * fraction
    value = (value + C2) * fraction
    value = (value + C1) * fraction
    value = value + C0
    bits = value.to(tl.int32, bitcast=True) + whole.to(tl.int32) * (1 << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def best_of(values, ids, row, num_chunks, CHUNKS: tl.constexpr):
    """A row's highest logit and its lowest id, a NaN's where there is one, from those of its chunks."""
    chunk = tl.arange(0, CHUNKS)
    mask = chunk < num_chunks
    value = tl.load(values + row * num_chunks + chunk, mask=mask, other=float("-inf"))
    place = tl.load(ids + row * num_chunks + chunk, mask=mask, other=NO_ID)
    nan_place = tl.min(tl.where(value != value, place, NO_ID), axis=0)
    highest = tl.max(tl.where(value != value, float("-inf"), value), axis=0)
    best_place = tl.min(tl.where((value == highest) & mask, place, NO_ID), axis=0)
    has_nan = nan_place != NO_ID
    return tl.where(has_nan, float("nan"), highest), tl.where(has_nan, nan_place, best_place)


@triton.jit
def is_finite(x):
    return (x == x) & (x != float("inf")) & (x != float("-inf"))


@triton.jit
def mark_of(seed, index, total):
    """word * total >> 64 for the word of (seed, index), as `philox.draw_words`."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low ^ low
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    word = (first.to(tl.uint64) << 32) | second.to(tl.uint64)
    return tl.umulhi(word, total.to(tl.uint64)).to(tl.int64)
