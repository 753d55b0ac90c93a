"""Rows with top_k or top_p: the exact cut in a row's ranking, without sorting it, and the token.

    _bound    what no token that is kept can lie below
    _collect  the ids and logits of those that do not, in any order: a few hundred as a rule
    _narrow   the rank of the last that is kept, by bisection of logits and then of ids; the token, by bisection of ids

A row with more candidates than there is room for is bisected over its whole vocabulary, in more time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymux.kernels.gpu.draw_math import DEAD, FIXED_BITS, best_of, is_finite, key_of, mark_of, weights
from polymux.kernels.row_sampling import Picks

TILE = 2048  # candidates looked at together
CANDIDATES = 16384  # of a row that there is room for
LOWEST_KEY = tl.constexpr(-(1 << 31))
MARGIN = tl.constexpr(0.01)  # octaves: more than rounding can be off


def narrow(
    row: tuple[Tensor, int, int],
    chunk_best: tuple[Tensor, Tensor, int],
    peaks: Tensor,
    sums: Tensor,
    picks: Picks,
    tokens: Tensor,
    chunk: int,
) -> None:
    """Fill in the tokens of the filtered rows.

    row: logits, their row stride and the vocabulary's size; chunk_best: each chunk's highest logit, its id, and how many chunks there are;
    peaks [R, G]: the highest logit of each of G groups; sums [R, C]: each chunk's sum of weights.
    """
    num_rows, device, padded = len(tokens), tokens.device, triton.next_power_of_2(chunk_best[2])
    keys = torch.empty(num_rows, dtype=torch.int32, device=device)
    octaves = torch.empty(num_rows, dtype=torch.float32, device=device)
    counts = torch.empty(num_rows, dtype=torch.int32, device=device)
    ids = torch.empty(num_rows, CANDIDATES, dtype=torch.int32, device=device)
    values = torch.empty(num_rows, CANDIDATES, dtype=torch.float32, device=device)
    num_groups = peaks.shape[1]
    filters = (picks.scales, picks.top_ks, picks.top_ps)
    bounds = (keys, octaves, counts)
    _bound[(num_rows,)](
        row[2], *chunk_best, peaks, num_groups, sums, *filters, *bounds,
        GROUPS=triton.next_power_of_2(num_groups), CHUNKS=padded, num_warps=8,
    )  # fmt: skip
    _collect[(num_rows, chunk_best[2])](
        *row, *chunk_best, *filters, picks.floors, *bounds, ids, values,
        CANDIDATES=CANDIDATES, CHUNK=chunk, CHUNKS=padded, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    _narrow[(num_rows,)](
        *row, *chunk_best, sums, *filters, picks.floors, *bounds, ids, values, picks.seeds, picks.indices, tokens,
        CANDIDATES=CANDIDATES, TILE=TILE, CHUNKS=padded, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _bound(
    size,
    values,
    ids,
    num_chunks,
    peaks,
    num_groups,
    sums,
    scales,
    top_ks,
    top_ps,
    keys,
    octaves,
    counts,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A key and an octave below which no token can be kept; and no candidates yet."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(counts + row, 0)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    if tl.load(scales + row) == 0.0:
        return
    low = tl.full((), LOWEST_KEY, tl.int64)
    octave = tl.full((), DEAD, tl.float32)
    if top_k > 0:
        # k groups hold a logit as high as the k-th highest of the groups' peaks: so do k tokens.
        group = tl.arange(0, GROUPS)
        mask = group < num_groups
        peak = key_of(tl.load(peaks + row * num_groups + group, mask=mask, other=float("-inf"))).to(tl.int64)
        maximum, _ = best_of(values, ids, row, num_chunks, CHUNKS)
        high = key_of(maximum).to(tl.int64)
        while low < high:
            middle = low + (high - low + 1) // 2
            if tl.sum(((peak >= middle) & mask).to(tl.int32), axis=0) >= top_k:
                low = middle
            else:
                high = middle - 1
    elif top_p < 1.0:
        # The vocabulary's size times a weight that all of it together may be lacking cannot reach into what is kept.
        chunk = tl.arange(0, CHUNKS)
        total = tl.sum(tl.load(sums + row * num_chunks + chunk, mask=chunk < num_chunks, other=0), axis=0)
        slack = total.to(tl.float32) * (1.0 - top_p).to(tl.float32) * 0.999 - 2.0
        each = tl.maximum(slack, 1.0) / size
        octave = tl.minimum(tl.maximum(tl.log2(each) - FIXED_BITS - MARGIN, DEAD), 0.0)
    tl.store(keys + row, low.to(tl.int32))
    tl.store(octaves + row, octave)


@triton.jit
def _collect(
    logits,
    row_stride,
    size,
    values,
    ids,
    num_chunks,
    scales,
    top_ks,
    top_ps,
    floors,
    keys,
    octaves,
    counts,
    candidate_ids,
    candidate_values,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    if (scale == 0.0) | ((tl.load(top_ks + row) == 0) & (tl.load(top_ps + row) >= 1.0)):
        return
    maximum, _ = best_of(values, ids, row, num_chunks, CHUNKS)
    if not is_finite(maximum):
        return
    place = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf"))
    octave = (x - maximum) * scale
    lowest = tl.maximum(tl.load(octaves + row), tl.load(floors + row))
    is_candidate = (octave >= lowest) & (octave > DEAD) & (key_of(x) >= tl.load(keys + row))
    flags = is_candidate.to(tl.int32)
    count = tl.sum(flags, axis=0)
    if count > 0:
        target = tl.atomic_add(counts + row, count) + tl.cumsum(flags, axis=0) - 1
        has_room = is_candidate & (target < CANDIDATES)
        tl.store(candidate_ids + row * CANDIDATES + target, place, mask=has_room)
        tl.store(candidate_values + row * CANDIDATES + target, x, mask=has_room)


@triton.jit
def _mass(
    row_values, row_ids, num_values, num_ids, maximum, scale, floor, cut_key, cut_id, last_id, COUNTS: tl.constexpr, TILE: tl.constexpr
):
    """The weight of the tokens that rank no lower than (cut_key, cut_id) and whose id is at most `last_id`; or how many have any."""
    total = tl.full((), 0, tl.int64)
    for start in range(0, num_values, TILE):
        place = start + tl.arange(0, TILE)
        mask = place < num_values
        x = tl.load(row_values + place, mask=mask, other=float("-inf"))
        has_id = place < num_ids
        token = tl.where(has_id, tl.load(row_ids + place, mask=has_id, other=0), place)
        key = key_of(x).to(tl.int64)
        is_in = ((key > cut_key) | ((key == cut_key) & (token <= cut_id))) & (token <= last_id) & mask
        mass = weights(x, maximum, scale, floor)
        if COUNTS:
            mass = (mass > 0).to(tl.int64)
        total += tl.sum(tl.where(is_in, mass, 0), axis=0)
    return total


@triton.jit
def _cut(row_values, row_ids, num_values, num_ids, size, maximum, scale, floor, low_key, target, COUNTS: tl.constexpr, TILE: tl.constexpr):
    """The rank at which the running mass reaches the target: its key and its id."""
    low = low_key
    high = key_of(maximum).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        mass = _mass(row_values, row_ids, num_values, num_ids, maximum, scale, floor, middle, size, size, COUNTS, TILE)
        if mass >= target:
            low = middle
        else:
            high = middle - 1
    first = tl.full((), 0, tl.int64)
    last = first + size - 1
    while first < last:
        middle = (first + last) // 2
        mass = _mass(row_values, row_ids, num_values, num_ids, maximum, scale, floor, low, middle, size, COUNTS, TILE)
        if mass >= target:
            last = middle
        else:
            first = middle + 1
    return low, first


@triton.jit(do_not_specialize=["size"])  # as a constant 1 it breaks a pass of Triton 3.6
def _narrow(
    logits,
    row_stride,
    size,
    values,
    ids,
    num_chunks,
    sums,
    scales,
    top_ks,
    top_ps,
    floors,
    keys,
    octaves,
    counts,
    candidate_ids,
    candidate_values,
    seeds,
    indices,
    tokens,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    if (scale == 0.0) | ((top_k == 0) & (top_p >= 1.0)):
        return
    maximum, _ = best_of(values, ids, row, num_chunks, CHUNKS)
    if not is_finite(maximum):
        return
    floor = tl.load(floors + row)
    num_values = tl.load(counts + row)
    num_ids = tl.where(num_values <= CANDIDATES, num_values, 0)
    row_ids = candidate_ids + row * CANDIDATES
    row_values = candidate_values + row * CANDIDATES
    if num_ids == 0:
        row_values = logits + row * row_stride
    num_values = tl.where(num_ids == 0, size, num_ids)
    cut_key = tl.maximum(key_of(maximum + (tl.load(octaves + row) - 1.0) / scale), tl.load(keys + row)).to(tl.int64)
    cut_id = tl.full((), 0, tl.int64) + size
    chunk = tl.arange(0, CHUNKS)
    total = tl.sum(tl.load(sums + row * num_chunks + chunk, mask=chunk < num_chunks, other=0), axis=0)
    if top_k > 0:
        alive = _mass(row_values, row_ids, num_values, num_ids, maximum, scale, floor, cut_key, cut_id, size, True, TILE)
        target = tl.minimum(top_k.to(tl.int64), alive)
        cut_key, cut_id = _cut(row_values, row_ids, num_values, num_ids, size, maximum, scale, floor, cut_key, target, True, TILE)
        total = _mass(row_values, row_ids, num_values, num_ids, maximum, scale, floor, cut_key, cut_id, size, False, TILE)
    if top_p < 1.0:
        target = tl.ceil(total.to(tl.float64) * top_p).to(tl.int64)
        target = tl.maximum(tl.minimum(target, total), 1)
        cut_key, cut_id = _cut(row_values, row_ids, num_values, num_ids, size, maximum, scale, floor, cut_key, target, False, TILE)
        total = _mass(row_values, row_ids, num_values, num_ids, maximum, scale, floor, cut_key, cut_id, size, False, TILE)
    mark = mark_of(tl.load(seeds + row), tl.load(indices + row), total)
    first = tl.full((), 0, tl.int64)
    last = first + size - 1
    while first < last:
        middle = (first + last) // 2
        if _mass(row_values, row_ids, num_values, num_ids, maximum, scale, floor, cut_key, cut_id, middle, False, TILE) > mark:
            last = middle
        else:
            first = middle + 1
    tl.store(tokens + row, first)
