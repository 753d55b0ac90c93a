"""Batches of rows to sample, for hypothesis, and what the CPU's sampler makes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels.philox import draw_words
from polymux.kernels.row_sampling import Edits, Picks, RowPick, pack_picks
from polymux.kernels.sample import Draw, draw, greedy, penalize_

DRAWS = st.builds(
    Draw,
    word=st.just(0),
    temperature=st.one_of(st.floats(0.02, 5), st.just(1e-5)),
    top_k=st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([1000, 2000, 1 << 40])),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1), st.sampled_from([0.9, 0.5])),
    min_p=st.one_of(st.just(0.0), st.floats(1e-4, 1)),
)
ROWS = st.one_of(
    st.just(RowPick()),
    st.builds(RowPick, draw=DRAWS, seed=st.integers(0, 2**64 - 1), index=st.one_of(st.integers(0, 9), st.integers(0, 2**63 - 1))),
)
DAMAGE = st.sampled_from([None, None, None, math.nan, math.inf, -math.inf])  # a whole row of -inf, or one element of the others


@st.composite
def batches(draw_from: st.DrawFn, sizes: st.SearchStrategy[int]) -> tuple[Tensor, list[RowPick]]:
    """Logits [R, V] fp32, some of them equal, -0, -inf or NaN, with their rows' parameters."""
    rows = draw_from(st.lists(ROWS, min_size=1, max_size=4))
    size, generator = draw_from(sizes), torch.Generator().manual_seed(draw_from(st.integers(0, 1 << 30)))
    logits = torch.randn(len(rows), size, generator=generator) * draw_from(st.sampled_from([0.01, 2.0, 8.0]))
    step = draw_from(st.sampled_from([0.0, 0.0, 0.5, 4.0]))
    if step:
        logits = (logits / step).round() * step  # minus zeros too
    if draw_from(st.booleans()):
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = -math.inf
    for row in range(len(rows)):
        damage = draw_from(DAMAGE)
        if damage is not None:
            logits[row, slice(None) if damage == -math.inf else draw_from(st.integers(0, size - 1))] = damage
    return logits, rows


def packed(rows: list[RowPick], device: torch.device) -> Picks:
    words, draws, filters = pack_picks(rows)
    return Picks.of(torch.tensor(words.tolist(), dtype=torch.int32, device=device), draws=draws, filters=filters)


def expected(logits: Tensor, rows: list[RowPick]) -> tuple[list[int], list[bool]]:
    """The CPU sampler's ids, and which rows have one."""
    best = greedy(logits)
    maxima = logits.gather(1, best[:, None])[:, 0]
    is_finite = maxima.isfinite().tolist()
    words = draw_words([row.seed for row in rows], [row.index for row in rows])
    draws = {i: replace(row.draw, word=words[i]) for i, row in enumerate(rows) if row.draw is not None and is_finite[i]}
    ids = best.tolist()
    for row, token_id in (draw(logits, maxima, draws) if draws else {}).items():
        ids[row] = token_id
    return ids, is_finite


@st.composite
def edited_batches(draw_from: st.DrawFn) -> tuple[Tensor, Edits, Tensor]:
    """Logits, edits of them, and what `penalize_` and the sampler's own order make of both."""
    generator = torch.Generator().manual_seed(draw_from(st.integers(0, 1 << 30)))
    num_rows, size = draw_from(st.integers(1, 4)), draw_from(st.integers(1, 60))
    logits = torch.randn(num_rows, size, generator=generator)
    lists = [(torch.rand(num_rows, size, generator=generator) < draw_from(st.sampled_from([0.0, 0.2, 0.7]))).nonzero() for _ in range(3)]
    (bans, biases, seen), result = (places.unbind(1) for places in lists), logits.clone()
    values = torch.randn(len(biases[0]), generator=generator)
    counts = torch.randint(0, 4, (len(seen[0]),), generator=generator).float()
    penalties = torch.rand(3, num_rows, generator=generator) * torch.tensor([[2.0], [1.0], [1.0]]) + torch.tensor([[0.1], [-0.5], [-0.5]])
    result[bans] = -math.inf
    result[biases] += values
    for row in range(num_rows):
        mine = seen[0] == row
        penalize_(result[row], seen[1][mine], counts[mine], *penalties[:, row].tolist())
    return logits, Edits(banned=bans, biased=(*biases, values), penalized=(*seen, counts), penalties=penalties), result
