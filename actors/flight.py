"""A decode step that was handed to the device: its tokens are read one step later, so that the host's work and the device's overlap.

    host      form N+1, hand it over      read N, answer clients      form N+2 ...
    device    ...... step N ......│ step N+1 (feeds itself with N's tokens) │ ......

What ends with a token of step N was computed once more in step N+1, in a slot of its own: nobody reads that token, and its blocks go back
when the step has ended.
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch

from polymux.actors.drawn import Drawn
from polymux.actors.engine import Engine
from polymux.actors.model_runner import Carried, ForwardBatch, SequenceSlice
from polymux.actors.sequence import Sequence
from polymux.transport.units import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    model: ModelName
    batch: tuple[Sequence, ...]  # in row order
    drawn: Drawn
    kv_tokens: int
    started_s: float
    stalled_s: float
    is_typical: bool

    @classmethod
    def of(cls, model: ModelName, batch: Series[Sequence], drawn: Drawn, started_s: float, engine: Engine) -> Flight:
        """The step that the engine was handed last; from now on each sequence is one token ahead of what is known of it."""
        kv_tokens = sum(s.num_launched for s in batch)
        for sequence in batch:
            sequence.num_ahead += 1
        return cls(
            model=model,
            batch=tuple(batch),
            drawn=drawn,
            kv_tokens=kv_tokens,
            started_s=started_s,
            stalled_s=engine.stalled_s,
            is_typical=not engine.is_streaming,
        )


def batch_of(sequences: Series[Sequence], before: Flight | None) -> ForwardBatch:
    """The step in which each feeds its last token, which may be one that the step `before` is still choosing."""
    slices = tuple(
        SequenceSlice(start=row, num_tokens=1, context_len=s.num_launched, block_ids=s.block_ids) for row, s in enumerate(sequences)
    )
    token_ids = torch.tensor([s.last_token_id for s in sequences])
    if before is None or before.drawn.ids is None:
        return ForwardBatch(token_ids=token_ids, slices=slices, logits_rows=None)
    places = {id(sequence): row for row, sequence in enumerate(before.batch)}
    rows = tuple(places[id(s)] if s.num_ahead else None for s in sequences)
    return ForwardBatch(token_ids=token_ids, slices=slices, logits_rows=None, carried=Carried(ids=before.drawn.ids, rows=rows))
