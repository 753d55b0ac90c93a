"""Logits to token ids: greedy choice, penalties, and draws that are the same bits on every device and in every batch.

A draw turns a row's logits into integer weights and takes one uniform word through their inverse CDF in vocabulary order:

    x_i = (logit_i - max) * log2(e) / temperature          fp32, two roundings, clamped at -41
    w_i = floor(2**x_i * 2**40)                            fp32 polynomial, `fixed_weights`; integer from here on
    token = the lowest id with w_0 + ... + w_id > floor(word * sum(w) / 2**64)

Everything before the weights is single IEEE operations on one element (no fused multiply-add, no library exp), everything after is integer
arithmetic, which is exact in any order. So a row's token cannot depend on its neighbours, on padding, on the number of threads or on how a
GPU kernel splits its sums, and such a kernel reproduces this file bit for bit (in Triton: `enable_fp_fusion=False`). Tokens less
likely than the first by more than 2**40 are never drawn.

What may be drawn shrinks in this order: min_p, then top_k, then top_p over what the two left. Tokens rank by logit, then by lower id; top_k
keeps exactly k, so top_k=1 is the greedy choice. No row is sorted whole: see `_drop_beyond`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED_BITS = 40  # of the weight of the most likely token; 2**23 tokens of it still sum below 2**63
DEAD = -(FIXED_BITS + 1.0)  # octaves below the first token, where the weight is 0
EXP2 = (1.0, 0.6931517124176025, 0.240159273147583, 0.05581867694854736, 0.008990994654595852, 0.001879318617284298)  # 2**f on [0, 1], 2e-7
BUCKETS_PER_OCTAVE = 64
SHORT_TOP_K = 1024  # up to here the k first logits are cheaper to take out than to count
CHUNK_ELEMENTS = 1 << 18  # rows worked on together: 1 MiB of fp32 stays in a core's cache
MIN_TEMPERATURE = 1e-5  # below it a draw is the greedy choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How to draw one row. `word` is uniform in [0, 2**64); top_k 0 keeps all; temperature is at least MIN_TEMPERATURE."""

    word: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def greedy(logits: Tensor) -> Tensor:
    """[R, V] to [R] int64: the highest logit, the lowest id on ties, a NaN's id where there is one (so a look at that logit finds it)."""
    if logits.is_cpu:
        return torch.from_numpy(logits.numpy().argmax(axis=1))  # twenty times torch's own
    return logits.argmax(dim=1)


def penalize_(logits: Tensor, ids: Tensor, counts: Tensor, repetition: float, frequency: float, presence: float) -> None:
    """Penalize in place the elements `ids` [n], each named once, of one row of logits [V] fp32.

    counts [n] fp32: how often the id is in the output. Positive logits are divided by `repetition` and others multiplied; then `frequency`
    times the count, and `presence` where the count is not 0, are subtracted.
    """
    values = logits[ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[ids] = values - counts * frequency - (counts > 0) * presence


def fixed_weights(octaves: Tensor) -> Tensor:
    """floor(2**octaves * 2**40) as int64, for fp32 octaves in [-41, 0]; the input is overwritten.

    2**n goes in by adding n to the exponent's bits; 2**f by Horner's rule, each step a rounded product and a rounded sum.
    """
    whole = octaves.floor()
    fraction = octaves.sub_(whole)
    value = fraction * (EXP2[5] * 2.0**FIXED_BITS)
    for coefficient in EXP2[4:0:-1]:
        value.add_(coefficient * 2.0**FIXED_BITS).mul_(fraction)
    value.add_(EXP2[0] * 2.0**FIXED_BITS)
    value.view(torch.int32).add_(whole.to(torch.int32).mul_(1 << 23))
    return value.to(torch.int64)


def log_normalizers(logits: Tensor, maxima: Tensor) -> list[float]:
    """ln(sum(exp(row))) of each row, from the same integer sums: as independent of the batch as the draws. Within 1e-6."""
    ones = torch.ones(len(logits), 1, device=logits.device)
    sums: list[int] = []
    for rows in _chunks(*logits.shape):
        sums += fixed_weights(_octaves(logits[rows], maxima[rows], ones[rows])).sum(1).tolist()
    return [highest + math.log(total) - FIXED_BITS * math.log(2.0) for highest, total in zip(maxima.tolist(), sums, strict=True)]


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest logits of each row and their ids, [R, min(k, V)] each: falling, the lower id first on ties."""
    k = min(k, logits.shape[1])
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    cut_in_a_tie = (values[:, k - 1] == values[:, k]).nonzero()[:, 0].tolist() if values.shape[1] > k else []
    values, ids = values[:, :k], ids[:, :k]
    for row in cut_in_a_tie:  # topk took any of the equals: take the lowest ids
        equals = (logits[row] >= values[row, -1]).nonzero()[:, 0]
        ids[row] = equals[logits[row, equals].argsort(descending=True, stable=True)[:k]]
    ids = ids.sort(dim=1).values
    values, order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def draw(logits: Tensor, maxima: Tensor, draws: Mapping[int, Draw]) -> dict[int, int]:
    """A token id for each row of logits [R, V] fp32 that `draws` names. maxima [R] are the rows' highest logits, finite in those rows."""
    vocab_size = logits.shape[1]
    short = [row for row, one in draws.items() if 0 < one.top_k <= min(SHORT_TOP_K, vocab_size)]
    dense = [row for row in draws if row not in set(short)]
    tokens: dict[int, int] = {}
    for members, method, width in ((short, _draw_short, SHORT_TOP_K), (dense, _draw_dense, vocab_size)):
        for chunk in _chunks(len(members), width):
            rows = members[chunk]
            runs_on = rows == list(range(rows[0], rows[-1] + 1))  # then a slice, which copies nothing
            index = slice(rows[0], rows[-1] + 1) if runs_on else torch.tensor(rows, device=logits.device)
            tokens |= zip(rows, method(logits[index], maxima[index], [draws[row] for row in rows]), strict=True)
    return tokens


def _draw_short(logits: Tensor, maxima: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Rows whose top_k is small: weigh only the k first, already in rank order."""
    values, ids = top(logits, max(one.top_k for one in draws))
    octaves = _octaves(values, maxima, _column([one.temperature for one in draws], values))
    weights = _weigh(octaves, draws)
    ranks = torch.arange(values.shape[1], device=values.device)
    weights.mul_(ranks < _column([one.top_k for one in draws], weights))
    if any(one.top_p < 1 for one in draws):
        before = weights.cumsum(1).sub_(weights)
        weights.mul_(before < _nucleus(weights, draws))
    ids, order = ids.sort(dim=1)
    return [int(ids[row, place]) for row, place in enumerate(_pick(weights.gather(1, order), draws))]


def _draw_dense(logits: Tensor, maxima: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Rows that may draw from the whole vocabulary."""
    octaves = _octaves(logits, maxima, _column([one.temperature for one in draws], logits))
    top_ks = [one.top_k for one in draws]
    filters_k = any(0 < k < logits.shape[1] for k in top_ks)
    filters_p = any(one.top_p < 1 for one in draws)
    buckets = octaves.mul(-BUCKETS_PER_OCTAVE).to(torch.int64) if filters_k or filters_p else None
    weights = _weigh(octaves, draws)
    if buckets is not None and filters_k:
        alive = weights.ne(0).to(torch.int64)
        _drop_beyond(weights, alive, _column([k or logits.shape[1] for k in top_ks], weights), logits, buckets)
    if buckets is not None and filters_p:
        _drop_beyond(weights, weights, _nucleus(weights, draws), logits, buckets)
    return _pick(weights, draws)


def _octaves(logits: Tensor, maxima: Tensor, temperatures: Tensor) -> Tensor:
    """How many halvings each element lies below its row's maximum, negative: fp32 in [-41, 0]."""
    return (logits - maxima[:, None]).mul_((math.log2(math.e) / temperatures.double()).float()).clamp_(min=DEAD)


def _weigh(octaves: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Weights after min_p, which keeps what is at least that fraction of the most likely token's probability."""
    if any(one.min_p > 0 for one in draws):
        floors = _column([math.log2(one.min_p) if one.min_p > 0 else DEAD for one in draws], octaves)
        octaves.masked_fill_(octaves < floors, DEAD)
    return fixed_weights(octaves)


def _nucleus(weights: Tensor, draws: Sequence[Draw]) -> Tensor:
    """[R, 1]: the weight that the first tokens must reach to make up top_p of the row."""
    totals: list[int] = weights.sum(1).tolist()
    targets = [
        total if one.top_p >= 1 else max(1, min(total, math.ceil(total * one.top_p))) for total, one in zip(totals, draws, strict=True)
    ]
    return _column(targets, weights)


def _drop_beyond(weights: Tensor, mass: Tensor, targets: Tensor, logits: Tensor, buckets: Tensor) -> None:
    """Zero the weights past the shortest prefix, in rank order, whose mass reaches the row's target. All [R, V] but targets, [R, 1].

    A histogram over buckets of equal width in the logit finds the bucket in which the target falls; only that bucket's elements, a few
    hundredths of the vocabulary, are sorted. Sums are of integers, so this is what a full sort would have kept.
    """
    histogram = torch.zeros(len(weights), int(-DEAD) * BUCKETS_PER_OCTAVE + 1, dtype=torch.int64, device=weights.device)
    histogram.scatter_add_(1, buckets, mass)
    reached = histogram.cumsum(1)
    last = torch.searchsorted(reached, targets).clamp_(max=histogram.shape[1] - 1)
    spent = (reached - histogram).gather(1, last)

    rows, ids = (buckets == last).nonzero(as_tuple=True)
    order = logits[rows, ids].argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by row, then logit, then id
    rows, ids = rows[order], ids[order]
    each = mass[rows, ids]
    running = each.cumsum(0) - each
    firsts = torch.searchsorted(rows, torch.arange(len(weights), device=weights.device))
    before = running - running[firsts[rows]] + spent[rows, 0]
    beyond = before >= targets[rows, 0]
    weights.mul_(buckets <= last)
    weights[rows[beyond], ids[beyond]] = 0


def _pick(weights: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The place in each row at which the running sum of the weights passes the row's word."""
    running = weights.cumsum(1)
    marks = [one.word * total >> 64 for one, total in zip(draws, running[:, -1].tolist(), strict=True)]
    return torch.searchsorted(running, _column(marks, weights), right=True)[:, 0].tolist()


def _column(values: Sequence[float] | Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // vocab_size)
    return (slice(start, start + step) for start in range(0, num_rows, step))
