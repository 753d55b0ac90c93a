"""A step as device tensors: where its tokens stand, where their K and V go, and what the attention of each distinct window reads.

Plans of as many padded rows have the same addresses, shapes and grids, whatever the contexts: a CUDA graph captured with one serves all.
How attention is computed is known to an `Attention` alone: each implementation has one, which prepares its part of every step on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from polymux.kernels.gpu.staging import ALIGNMENT, Staging, Words
from polymux.kernels.gpu.work import Queries
from polymux.kernels.paged import CacheShape, Span


class Workspace:
    """Scratch memory of attention, one a stream: partial results, and how many parts of a tile are done, zero between launches."""

    def __init__(self, device: torch.device, num_bytes: int = 32 << 20) -> None:
        self.partials = torch.empty(num_bytes // 4, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(num_bytes // 4 // 256, dtype=torch.int32, device=device)
        self._for_library = torch.empty(0, dtype=torch.uint8, device=device)

    def for_library(self, num_bytes: int) -> Tensor:
        """What a library scratches in, uint8 [num_bytes], taken when first asked for. It never moves: all ask for as much."""
        if not len(self._for_library):
            self._for_library = torch.empty(num_bytes, dtype=torch.uint8, device=self._for_library.device)
        assert len(self._for_library) == num_bytes
        return self._for_library


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendSpec:
    """One model's attention on one device: what an implementation must know of it before it prepares a step."""

    shape: CacheShape
    num_heads: int
    dtype: torch.dtype
    scale: float
    windows: tuple[int | None, ...]  # the distinct ones of its layers
    max_blocks: int  # that the tables of a padded step name, all of them together
    device: torch.device
    workspace: Workspace
    batch_invariant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendPlan:
    """A step's attention in the layers of one window; for an implementation that prepares nothing, all there is."""

    spans: tuple[Span, ...]
    window: int | None


class Attention(Protocol):
    """How one implementation prepares the steps of one model. Its `attend` is given what this made, once a layer."""

    def num_words(self, num_rows: int) -> int:
        """Words of staging that `stage` takes at most, for one window of a step of so many rows."""

    def stage(self, batch: Batch, window: int | None, num_rows: int | None, staging: Staging) -> Callable[[Tensor], AttendPlan]:
        """Take from the staging what this window's launches read. `num_rows`: padded to as many, and to be replayed for other contexts.

        What is returned is called once all that was taken is on its way to the device, with the block tables that it finds there.
        """


class PlainAttention:
    """Of plain torch, which reads the spans."""

    def __init__(self, spec: AttendSpec) -> None:
        del spec

    def num_words(self, num_rows: int) -> int:
        return 0

    def stage(self, batch: Batch, window: int | None, num_rows: int | None, staging: Staging) -> Callable[[Tensor], AttendPlan]:
        plan = AttendPlan(spans=batch.spans, window=window)
        return lambda block_ids: plan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All index tensors of a step, on the device. Rows at and past `num_tokens` are padding: nothing may be written for them."""

    spans: tuple[Span, ...]
    num_rows: int  # T, padding included
    max_position: int
    num_tokens: Tensor  # [1] int32
    positions: Tensor  # [T] int32; 0 for padding
    slots: Tensor  # [T] int32: block_id * block_size + slot, where a token's K and V go; 0 for padding
    attention: Mapping[int | None, AttendPlan]  # by window


class StepPlanner:
    """Builds the plans of one model's steps. The tensors of a plan live in the staging buffer and are overwritten by the next step's."""

    def __init__(self, shape: CacheShape, attention: Attention) -> None:
        self.shape = shape
        self._attention = attention

    def num_words(self, num_rows: int, num_blocks: int, num_windows: int = 1) -> int:
        """Words of staging that any step of so many rows over so many blocks of context takes."""
        return 1 + 2 * num_rows + num_blocks + 1 + 4 * ALIGNMENT + num_windows * self._attention.num_words(num_rows)

    def plan(self, spans: Sequence[Span], windows: Iterable[int | None], staging: Staging, num_rows: int | None = None) -> StepPlan:
        """`spans` in any order, their rows disjoint and from 0 on; `num_rows` pads them. After `staging.begin`; the last to take: it sends.

        Addresses and grids depend on `num_rows` and the windows alone where it is given and each span is one token.
        """
        batch = Batch.of(spans, self.shape.block_size)
        num_padded = batch.num_tokens if num_rows is None else num_rows
        assert batch.num_tokens <= num_padded, f"{batch.num_tokens} tokens in {num_padded} rows"
        count = put(staging, np.array([batch.num_tokens], np.int32))
        positions = put(staging, padded_words(batch.positions, num_padded))
        slots = put(staging, padded_words(batch.slots, num_padded))
        staged = {window: self._attention.stage(batch, window, num_rows, staging) for window in dict.fromkeys(windows)}
        block_ids = put(staging, batch.block_ids)
        staging.send()
        return StepPlan(
            spans=batch.spans,
            num_rows=num_padded,
            max_position=int(batch.positions.max(initial=0)),
            num_tokens=count,
            positions=positions,
            slots=slots,
            attention={window: finish(block_ids) for window, finish in staged.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The spans of a step as arrays, in the order of their rows."""

    spans: tuple[Span, ...]
    queries: Queries
    block_ids: Words  # the block tables one after another, each as long as its sequence; `queries.tables` says where each begins
    positions: Words
    slots: Words

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @classmethod
    def of(cls, spans: Iterable[Span], block_size: int) -> Batch:
        spans = tuple(sorted(spans, key=lambda span: span.start))
        columns = np.array([(s.start, s.context_len, s.num_tokens) for s in spans], np.int64).reshape(-1, 3)
        starts, contexts, tokens = columns.T
        num_blocks = -(-(contexts + tokens) // block_size)
        tables = np.cumsum(num_blocks) - num_blocks
        total = int(num_blocks.sum())
        ids = chain.from_iterable(span.block_ids[:n] for span, n in zip(spans, num_blocks.tolist(), strict=True))
        block_ids = np.zeros(max(total, 1), np.int32)  # never empty: an empty tensor has no address for a graph to keep
        block_ids[:total] = np.fromiter(ids, np.int32, total)  # raises ValueError where a table is shorter than its sequence
        assert (starts == np.cumsum(tokens) - tokens).all(), "the spans' rows leave gaps or overlap"
        owner = np.repeat(np.arange(len(spans)), tokens)
        positions = np.arange(len(owner)) - starts[owner] + contexts[owner]
        slots = block_ids[tables[owner] + positions // block_size] * block_size + positions % block_size
        queries = Queries(starts=starts, contexts=contexts, tokens=tokens, tables=tables)
        return cls(spans=spans, queries=queries, block_ids=block_ids, positions=positions.astype(np.int32), slots=slots.astype(np.int32))


def put(staging: Staging, words: Words) -> Tensor:
    """The words' place on the device."""
    source, target = staging.take(len(words))
    source[:] = words
    return target


def padded_words(words: Words, length: int) -> Words:
    """`words` with zeros after them, along the first dimension."""
    return np.concatenate((words, np.zeros((length - len(words), *words.shape[1:]), np.int32)))
