"""The sampler's kernels: a batch's next tokens in a few launches that read the logits two or three times and sort nothing.

Rows are cut into chunks, so that one row keeps many multiprocessors busy. Each launch leaves a few numbers a chunk for the next:

    _scan    every chunk's highest logit and its id; where some row is filtered, also that of each group of 64
    _sum     every chunk's sum of integer weights, of rows that are drawn
    narrow   the tokens of rows with top_k or top_p: see there
    _finish  those of all others: the best, or where the running sum passes the row's mark

Sums of integers are the same in any order, so the token is too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymux.kernels.gpu.draw_math import DEAD, NO_ID, best_of, is_finite, mark_of, weights
from polymux.kernels.gpu.narrow import narrow
from polymux.kernels.row_sampling import OCTAVES_PER_LOGIT, Picks

CHUNK = 4096
GROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scratch:
    """What the launches leave each other; C chunks a row."""

    values: Tensor  # [R, C] fp32: a chunk's highest logit, NaN where there is one
    ids: Tensor  # [R, C] int32: where that is
    peaks: Tensor  # [R, C * CHUNK / GROUP] fp32: each group's highest logit
    sums: Tensor  # [R, C] int64

    @classmethod
    def of(cls, logits: Tensor, num_chunks: int, *, has_groups: bool) -> _Scratch:
        num_rows, device = logits.shape[0], logits.device
        return cls(
            values=torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device),
            ids=torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device),
            peaks=torch.empty(num_rows, num_chunks * CHUNK // GROUP if has_groups else 0, dtype=torch.float32, device=device),
            sums=torch.empty(num_rows, num_chunks, dtype=torch.int64, device=device),
        )


def pick(logits: Tensor, picks: Picks) -> tuple[Tensor, Tensor]:
    """As `row_sampling.pick`."""
    num_rows, size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    is_finite = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if not num_rows:
        return tokens, is_finite
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    chunks = triton.cdiv(size, CHUNK)
    scratch = _Scratch.of(logits, chunks, has_groups=picks.filters)
    row = (logits, logits.stride(0), size)
    chunk_best = (scratch.values, scratch.ids, chunks)
    padded = triton.next_power_of_2(chunks)
    _scan[(num_rows, chunks)](*row, *chunk_best, scratch.peaks, HAS_GROUPS=picks.filters, CHUNK=CHUNK, GROUP=GROUP, num_warps=8)
    if picks.draws:
        _sum[(num_rows, chunks)](
            *row, *chunk_best, scratch.sums, picks.scales, picks.floors, 0.0,
            HAS_PICKS=True, CHUNK=CHUNK, CHUNKS=padded, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    if picks.filters:
        narrow(row, chunk_best, scratch.peaks, scratch.sums, picks, tokens, CHUNK)
    _finish[(num_rows,)](
        *row, *chunk_best, scratch.sums, picks.scales, picks.floors, picks.top_ks, picks.top_ps, picks.seeds, picks.indices,
        tokens, is_finite, CHUNK=CHUNK, CHUNKS=padded, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens, is_finite


def weight_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `row_sampling.weight_sums`."""
    num_rows, size = logits.shape
    assert logits.stride(1) == 1 and logits.dtype == torch.float32
    if not num_rows:
        return logits.new_empty(0), torch.empty(0, dtype=torch.int64, device=logits.device)
    chunks = triton.cdiv(size, CHUNK)
    scratch = _Scratch.of(logits, chunks, has_groups=False)
    row, chunk_best = (logits, logits.stride(0), size), (scratch.values, scratch.ids, chunks)
    _scan[(num_rows, chunks)](*row, *chunk_best, scratch.peaks, HAS_GROUPS=False, CHUNK=CHUNK, GROUP=GROUP, num_warps=8)
    _sum[(num_rows, chunks)](
        *row, *chunk_best, scratch.sums, logits, logits, OCTAVES_PER_LOGIT,
        HAS_PICKS=False, CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(chunks), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return scratch.values.amax(1), scratch.sums.sum(1)


@triton.jit
def _scan(logits, row_stride, size, values, ids, num_chunks, peaks, HAS_GROUPS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf"))
    is_nan = x != x
    nan_place = tl.min(tl.where(is_nan, place, NO_ID), axis=0)
    plain = tl.where(is_nan, float("-inf"), x)
    highest = tl.max(plain, axis=0)
    best_place = tl.min(tl.where(plain == highest, place, NO_ID), axis=0)
    has_nan = nan_place != NO_ID
    tl.store(values + row * num_chunks + chunk, tl.where(has_nan, float("nan"), highest))
    tl.store(ids + row * num_chunks + chunk, tl.where(has_nan, nan_place, best_place))
    if HAS_GROUPS:
        groups = CHUNK // GROUP
        peak = tl.max(tl.reshape(plain, (CHUNK // GROUP, GROUP)), axis=1)
        tl.store(peaks + (row * num_chunks + chunk) * groups + tl.arange(0, CHUNK // GROUP), peak)


@triton.jit
def _sum(
    logits,
    row_stride,
    size,
    values,
    ids,
    num_chunks,
    sums,
    scales,
    floors,
    only_scale,
    HAS_PICKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    scale = only_scale
    floor = DEAD
    if HAS_PICKS:
        scale = tl.load(scales + row)
        floor = tl.load(floors + row)
        if scale == 0.0:
            return
    maximum, _ = best_of(values, ids, row, num_chunks, CHUNKS)
    if not is_finite(maximum):
        tl.store(sums + row * num_chunks + chunk, 0)
        return
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf"))
    tl.store(sums + row * num_chunks + chunk, tl.sum(weights(x, maximum, scale, floor), axis=0))


@triton.jit
def _finish(
    logits,
    row_stride,
    size,
    values,
    ids,
    num_chunks,
    sums,
    scales,
    floors,
    top_ks,
    top_ps,
    seeds,
    indices,
    tokens,
    has_tokens,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    maximum, best = best_of(values, ids, row, num_chunks, CHUNKS)
    has_token = is_finite(maximum)
    tl.store(has_tokens + row, has_token)
    scale = tl.load(scales + row)
    if (scale == 0.0) | ~has_token:
        tl.store(tokens + row, best.to(tl.int64))
        return
    if (tl.load(top_ks + row) > 0) | (tl.load(top_ps + row) < 1.0):
        return
    chunk = tl.arange(0, CHUNKS)
    each = tl.load(sums + row * num_chunks + chunk, mask=chunk < num_chunks, other=0)
    mark = mark_of(tl.load(seeds + row), tl.load(indices + row), tl.sum(each, axis=0))
    is_before = tl.cumsum(each, axis=0) <= mark
    spent = tl.sum(tl.where(is_before, each, 0), axis=0)
    first = tl.sum(is_before.to(tl.int32), axis=0) * CHUNK
    place = first + tl.arange(0, CHUNK)
    x = tl.load(logits + row * row_stride + place, mask=place < size, other=float("-inf"))
    running = tl.cumsum(weights(x, maximum, scale, tl.load(floors + row)), axis=0) + spent
    tl.store(tokens + row, (first + tl.sum((running <= mark).to(tl.int32), axis=0)).to(tl.int64))
