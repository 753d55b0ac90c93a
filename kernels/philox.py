"""Philox-4x32-10 (Salmon et al., 2011): random words that are a pure function of a key and a counter.

No state means no order: the word for token 7 of a sequence is the same whatever else was drawn before it, beside it or instead of it.
Four 32-bit multiplications a round are cheap on a GPU too, and Triton has the same generator built in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

ROUNDS = 10
MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)


def philox(counters: U64, keys: U64) -> U64:
    """One block for each column: counters [4, R] and keys [2, R] of 32-bit words, held in 64 bits. Returns [4, R] of such words."""
    even, odd = counters[[0, 2]], counters[[1, 3]]
    step = np.array([[WEYL[0]], [WEYL[1]]], dtype=np.uint64)
    for _ in range(ROUNDS):
        products = even * MULTIPLIERS  # of two 32-bit words: no overflow
        even = (products >> SHIFT)[::-1] ^ odd ^ keys
        odd = (products & LOW)[::-1]
        keys = (keys + step) & LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def draw_words(seeds: Sequence[int], indices: Sequence[int], purpose: int = 0) -> list[int]:
    """A uniform 64-bit word for each (seed, index). Seeds count modulo 2**64, indices are below 2**64.

    `purpose` separates streams that share both: 0 draws the token itself.
    """
    mask = 0xFFFFFFFF
    counters = np.array([[i & mask for i in indices], [i >> 32 for i in indices], [purpose] * len(indices), [0] * len(indices)], np.uint64)
    keys = np.array([[s & mask for s in seeds], [s >> 32 & mask for s in seeds]], np.uint64)
    words = philox(counters, keys)
    return ((words[0] << SHIFT) | words[1]).tolist()  # type: ignore[no-any-return]
