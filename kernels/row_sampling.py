"""Sampling of a whole batch on its device: what `sample.py` defines, to the bit, without one wait of the host.

A row's parameters travel as columns of one buffer of words (`pack_picks`, then `Picks.of` over their copy on the device): greedy and drawn
rows mix, and a captured graph reads those of each step from the same addresses. The functions below are the reference, in plain torch;
they sort whole rows, which the kernels of `gpu/pick.py` do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymux.kernels.philox import MULTIPLIERS, ROUNDS, WEYL
from polymux.kernels.sample import DEAD, FIXED_BITS, Draw, fixed_weights

PICK_WORDS = 9  # of 32 bits a row
OCTAVES_PER_LOGIT = math.log2(math.e)
LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPick:
    """How one row's token is chosen: greedily without a `draw`, whose own word is not read: it is that of (`seed`, `index`)."""

    draw: Draw | None = None
    seed: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """The rows' parameters, [R] each, on the logits' device."""

    seeds: Tensor  # int64: the 64 bits as they are
    indices: Tensor  # int64: which token of its sequence each is
    top_ps: Tensor  # fp64; 1 keeps all
    scales: Tensor  # fp32: octaves a logit, log2(e) / temperature; 0 is greedy
    floors: Tensor  # fp32: how many octaves below the first token min_p cuts, negative
    top_ks: Tensor  # int32; 0 keeps all
    draws: bool  # whether any row is drawn, and
    filters: bool  # whether any has top_k or top_p: what no row needs is not launched

    @classmethod
    def of(cls, words: Tensor, *, draws: bool, filters: bool) -> Picks:
        """Views of words [PICK_WORDS * R] int32 on the device, 8-byte aligned: a copy of what `pack_picks` made."""
        rows = len(words) // PICK_WORDS
        wide, narrow = words[: 6 * rows].view(torch.int64).view(3, rows), words[6 * rows :].view(3, rows)
        floats = narrow[:2].view(torch.float32)
        return cls(
            seeds=wide[0],
            indices=wide[1],
            top_ps=wide[2].view(torch.float64),
            scales=floats[0],
            floors=floats[1],
            top_ks=narrow[2],
            draws=draws,
            filters=filters,
        )


def pack_picks(rows: Sequence[RowPick]) -> tuple[NDArray[np.int32], bool, bool]:
    """The words that `Picks.of` reads, and its flags."""
    draws = [row.draw for row in rows]
    wide = np.empty((3, len(rows)), np.int64)
    wide[0] = np.array([row.seed & (1 << 64) - 1 for row in rows], np.uint64).view(np.int64)
    wide[1] = [row.index for row in rows]
    wide[2] = np.array([1.0 if one is None else one.top_p for one in draws], np.float64).view(np.int64)
    temperatures = np.array([math.inf if one is None else one.temperature for one in draws], np.float32)
    narrow = np.empty((3, len(rows)), np.int32)
    narrow[0] = (OCTAVES_PER_LOGIT / temperatures.astype(np.float64)).astype(np.float32).view(np.int32)
    floors = [math.log2(one.min_p) if one is not None and one.min_p > 0 else DEAD for one in draws]
    narrow[1] = np.array(floors, np.float32).view(np.int32)
    narrow[2] = [0 if one is None else min(one.top_k, (1 << 31) - 1) for one in draws]
    filters = any(one is not None and (one.top_k > 0 or one.top_p < 1) for one in draws)
    return np.concatenate((wide.view(np.int32).ravel(), narrow.ravel())), any(one is not None for one in draws), filters


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What changes logits before a token is chosen, in this order, as entries [n]: no element is named twice in one list."""

    banned: tuple[Tensor, Tensor] | None = None  # rows and ids, int64: to -inf
    biased: tuple[Tensor, Tensor, Tensor] | None = None  # rows, ids, and fp32 to add
    penalized: tuple[Tensor, Tensor, Tensor] | None = None  # rows, ids, and fp32: how often the id is in the output
    penalties: Tensor | None = None  # [3, R] fp32: each row's repetition, frequency and presence penalty


def edit_(logits: Tensor, edits: Edits) -> None:
    """Apply edits to logits [R, V] fp32 in place, element by element as `sample.penalize_` and `SamplerState.edit_` do."""
    if edits.banned is not None:
        logits[edits.banned] = -math.inf
    if edits.biased is not None:
        rows, ids, values = edits.biased
        logits[rows, ids] = logits[rows, ids] + values
    if edits.penalized is not None:
        assert edits.penalties is not None
        rows, ids, counts = edits.penalized
        repetition, frequency, presence = edits.penalties[:, rows]
        values = logits[rows, ids]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[rows, ids] = values - counts * frequency - (counts > 0) * presence


def pick(logits: Tensor, picks: Picks) -> tuple[Tensor, Tensor]:
    """Token ids [R] int64 for logits [R, V] fp32, which stay; and [R] bool: whether the row's highest logit is finite.

    A row where it is not has no token: its id is that logit's, a NaN's first.
    """
    best = logits.argmax(dim=1)
    maxima = logits.gather(1, best[:, None])
    is_finite = maxima.isfinite()
    if not picks.draws:
        return best, is_finite[:, 0]
    octaves = (logits - maxima).mul_(picks.scales[:, None]).clamp_(min=DEAD)
    octaves.masked_fill_(octaves < picks.floors[:, None], DEAD)
    octaves.masked_fill_(~is_finite, 0.0)  # a weight must be some number
    weights = fixed_weights(octaves)
    if picks.filters:
        weights = _filter(logits, weights, picks)
    running = weights.cumsum(1)
    marks = _multiply_high(_words(picks), running[:, -1])
    drawn = torch.searchsorted(running, marks[:, None], right=True)[:, 0]
    return torch.where((picks.scales > 0) & is_finite[:, 0], drawn, best), is_finite[:, 0]


def weight_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit [R] fp32 and the sum of the fixed-point weights [R] int64 at temperature 1 of each row of logits [R, V]."""
    maxima = logits.amax(1)
    octaves = (logits - maxima[:, None]).mul_(OCTAVES_PER_LOGIT).clamp_(min=DEAD)
    return maxima, fixed_weights(octaves).sum(1)


def normalizers(maxima: Tensor, sums: Tensor) -> Tensor:
    """ln(sum(exp(row))) [R] fp64 from `weight_sums`: a token's log-probability is its logit less this. As `sample.log_normalizers`."""
    return maxima.double() + sums.double().log() - FIXED_BITS * math.log(2.0)


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `sample.top`, without a look at the result: equals are told apart by one integer of logit and id."""
    values = torch.where(logits == 0, 0.0, logits)  # one zero
    bits = values.view(torch.int32).long()
    ranks = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) * (1 << 32) - torch.arange(logits.shape[1], device=logits.device)
    ids = ranks.topk(min(k, logits.shape[1]), dim=1).indices
    return logits.gather(1, ids), ids


def _filter(logits: Tensor, weights: Tensor, picks: Picks) -> Tensor:
    """Weights after top_k, then top_p over what that left."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranked = weights.gather(1, order)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    ranked.masked_fill_((picks.top_ks[:, None] > 0) & (ranks >= picks.top_ks[:, None]), 0)
    totals = ranked.sum(1)
    targets = (totals * picks.top_ps).ceil().long().clamp_(min=1).minimum(totals)
    targets = torch.where(picks.top_ps < 1, targets, totals)
    before = ranked.cumsum(1) - ranked
    ranked.masked_fill_(before >= targets[:, None], 0)
    return torch.zeros_like(weights).scatter_(1, order, ranked)


def _words(picks: Picks) -> Tensor:
    """The words of `philox.draw_words` as int64 of the same bits."""
    even, odd = [picks.indices & LOW, torch.zeros_like(picks.indices)], [picks.indices >> 32 & LOW, torch.zeros_like(picks.indices)]
    keys = [picks.seeds & LOW, picks.seeds >> 32 & LOW]
    for _ in range(ROUNDS):
        products = [even[i] * int(MULTIPLIERS[i, 0]) for i in range(2)]  # modulo 2**64, like all products here
        even = [products[1 - i] >> 32 & LOW ^ odd[i] ^ keys[i] for i in range(2)]
        odd = [products[1 - i] & LOW for i in range(2)]
        keys = [keys[i] + WEYL[i] & LOW for i in range(2)]
    return even[0] << 32 | odd[0]


def _multiply_high(words: Tensor, totals: Tensor) -> Tensor:
    """words * totals >> 64: words [R] unsigned 64 bits, held in int64; totals [R] below 2**63."""
    low, high, total_low, total_high = words & LOW, words >> 32 & LOW, totals & LOW, totals >> 32
    middle = high * total_low + (low * total_low >> 32 & LOW)
    rest = low * total_high + (middle & LOW)
    return high * total_high + (middle >> 32 & LOW) + (rest >> 32 & LOW)
