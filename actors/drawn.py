"""The tokens of a step that may still be computing: chosen where the logits are, and read later, by a host that waits for nothing before.

They are those of `sampler.sample_each`, to the bit. The next step can take them from the device (`ids`) before the host has read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymux.actors.device import Device, Download
from polymux.actors.sampler import NONE_LEFT, NOT_FINITE, SampledToken, SamplerState
from polymux.kernels.choice import implementation
from polymux.kernels.row_sampling import Edits, Picks, RowPick, pack_picks, top
from polymux.kernels.sample import FIXED_BITS
from polymux.transport.errors import NonFiniteLogits

Token = SampledToken | NonFiniteLogits


@dataclass(frozen=True, slots=True)
class Ask:
    """One row's token: that of a sequence, of which `num_ahead` more tokens are made than its state knows."""

    state: SamplerState
    num_ahead: int = 0

    @property
    def edits_logits(self) -> bool:
        return self.state.edits_logits_at(self.num_ahead)

    @property
    def num_logprobs(self) -> int | None:
        return self.state.params.logprobs

    @property
    def pick(self) -> RowPick:
        state = self.state
        return RowPick(draw=None if state.is_greedy else state.draw(0), seed=state.params.seed, index=state.num_output + self.num_ahead)


class Drawn(Protocol):
    """What a step's rows draw."""

    @property
    def ids(self) -> Tensor | None:
        """[R] int64 on the device, in its queue's order; None where the host knows them already."""

    def tokens(self) -> list[Token]:
        """Waits for the device. A row without finite logits gets its error in the place of a token."""


class Known:
    """Tokens that need no waiting for."""

    ids: Tensor | None = None

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = list(tokens)

    def tokens(self) -> list[Token]:
        return self._tokens


class Later:
    """Tokens that are on their way to the host: [2, R] int64, ids and whether their row had finite logits; then, of the rows in `reported`,
    the chosen logits, the maxima and sums of `row_sampling.weight_sums`, and the highest logits with their ids."""

    def __init__(self, ids: Tensor, asks: Sequence[Ask], download: Download, reported: tuple[int, ...] = ()) -> None:
        self.ids: Tensor | None = ids
        self._asks = [(ask.edits_logits, ask.num_logprobs) for ask in asks]  # as they are now
        self._download = download
        self._reported = reported  # rows

    def tokens(self) -> list[Token]:
        results, *values = self._download.wait()
        (ids, finite), found = results.tolist(), list[Token]()
        for row, (edits, _) in enumerate(self._asks):
            if finite[row]:
                found.append(SampledToken(token_id=ids[row]))
            else:
                error = NonFiniteLogits(NONE_LEFT if edits else NOT_FINITE)
                error.rows = (row,)
                found.append(error)
        if self._reported:
            self._report(found, ids, values)
        return found

    def _report(self, found: list[Token], ids: Sequence[int], values: Sequence[Tensor]) -> None:
        chosen, maxima, sums, top_values, top_ids = (value.tolist() for value in values)
        for place, row in enumerate(self._reported):
            num_tops = self._asks[row][1]
            if isinstance(found[row], SampledToken) and num_tops is not None:
                normalizer = maxima[place] + math.log(sums[place]) - FIXED_BITS * math.log(2.0)
                pairs = zip(top_ids[place][:num_tops], top_values[place][:num_tops], strict=True)
                tops = tuple((token_id, value - normalizer) for token_id, value in pairs)
                found[row] = SampledToken(token_id=ids[row], logprob=chosen[place] - normalizer, top=tops)


def draw_later(logits: Tensor, asks: Sequence[Ask], device: Device) -> Later:
    """The next token of each row of logits [R, V] fp32, which stay. Waits for nothing."""
    words, draws, filters = pack_picks([ask.pick for ask in asks])
    picks = Picks.of(device.upload(words), draws=draws, filters=filters)
    edited = logits
    if (edits := edits_of(asks, device)) is not None:
        edited = logits.clone()
        implementation("edit_", logits.device)(edited, edits)
    ids, is_finite = implementation("pick", logits.device)(edited, picks)
    return report_later(logits, ids, torch.stack((ids, is_finite.long())), asks, device)


def report_later(logits: Tensor, ids: Tensor, results: Tensor, asks: Sequence[Ask], device: Device) -> Later:
    """Read the results of a draw, `ids` [R] among them, and the logprobs that were asked for: of `logits` before any edits."""
    rows = tuple(row for row, ask in enumerate(asks) if ask.num_logprobs is not None)
    if not rows:
        return Later(ids, asks, device.download(results))
    if len(rows) < len(asks):
        index = device.upload(np.array(rows))
        logits, chosen_ids = logits[index], ids[index]
    else:
        logits, chosen_ids = logits[: len(asks)], ids
    maxima, sums = implementation("weight_sums", logits.device)(logits)
    values, top_ids = top(logits, max(1, *(ask.num_logprobs or 0 for ask in asks)))
    chosen = logits.gather(1, chosen_ids[:, None])[:, 0]
    return Later(ids, asks, device.download(results, chosen, maxima, sums, values, top_ids), rows)


def edits_of(asks: Sequence[Ask], device: Device) -> Edits | None:
    """What the rows' parameters change before a token is chosen; None when nothing."""
    banned = [(row, token_id) for row, ask in enumerate(asks) for token_id in ask.state.banned_ids(ask.num_ahead)]
    biased = [(row, token_id, bias) for row, ask in enumerate(asks) for token_id, bias in ask.state.biases.items()]
    counts = [(row, ask.state.counts.view()) for row, ask in enumerate(asks) if ask.state.counts is not None]
    if not banned and not biased and not counts:
        return None
    rows, ids = _indices(banned)
    biased_rows, biased_ids = _indices([pair[:2] for pair in biased])
    biases = np.array([bias for *_, bias in biased], np.float32)
    counted_rows = np.concatenate([np.full(len(ids), row) for row, (ids, _) in counts] or [np.zeros(0, np.int64)])
    counted_ids = np.concatenate([ids for _, (ids, _) in counts] or [np.zeros(0, np.int64)])
    values = np.concatenate([values for _, (_, values) in counts] or [np.zeros(0, np.float32)])
    params = [ask.state.params for ask in asks]
    penalties = np.array(
        [[p.repetition_penalty for p in params], [p.frequency_penalty for p in params], [p.presence_penalty for p in params]], np.float32
    )
    return Edits(
        banned=(device.upload(rows), device.upload(ids)) if banned else None,
        biased=(device.upload(biased_rows), device.upload(biased_ids), device.upload(biases)) if biased else None,
        penalized=(device.upload(counted_rows), device.upload(counted_ids), device.upload(values)) if counts else None,
        penalties=device.upload(penalties) if counts else None,
    )


def _indices(pairs: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()
