"""Addresses in the paged cache: where one layer's rows lie, and which rows a step's tokens are written to.

The cache is kv [N, L, 2, Hkv, S, D]. A *row* is one slot of one head, [D]; a *strip* is one head's K or V of one layer of one block,
[S, D], contiguous. Row and strip numbers are of layer 0: each layer has its own view of the cache that begins where that layer begins, so
the index tensors of a step serve all of its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Span(Protocol):
    """One sequence's part of a step: `num_tokens` rows of the flat batch from `start`, at positions from `context_len` on."""

    @property
    def start(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def context_len(self) -> int: ...
    @property
    def block_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class CacheShape:
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int

    @classmethod
    def of(cls, kv: Tensor) -> CacheShape:
        _, num_layers, _, num_kv_heads, block_size, head_dim = kv.shape
        return cls(num_layers, num_kv_heads, block_size, head_dim)

    @property
    def strips_per_block(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads

    def layer_strips(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Per layer, [strips, S * D]: strip i of layer 0 has number i in each layer's view."""
        strips = kv.view(-1, self.block_size * self.head_dim)
        return tuple(strips[layer * 2 * self.num_kv_heads :] for layer in range(self.num_layers))

    def layer_rows(self, kv: Tensor) -> tuple[Tensor, ...]:
        """Per layer, [rows, D]: row i of layer 0 has number i in each layer's view."""
        rows = kv.view(-1, self.head_dim)
        step = 2 * self.num_kv_heads * self.block_size
        return tuple(rows[layer * step :] for layer in range(self.num_layers))


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Where a step's K and V go. `unused` are the slots after the last token of each block that the step begins.

    They are zeroed: attention reads whole blocks and masks, and what masks by weight zero must not meet a stale NaN.
    """

    k_rows: Tensor  # [T, Hkv] int64
    v_rows: Tensor
    unused: Tensor | None  # [R] int64


def plan_writes(spans: Sequence[Span], shape: CacheShape, device: torch.device) -> WritePlan:
    size = shape.block_size
    first_rows: list[int] = []  # of head 0 of K, by token
    unused: list[int] = []
    for span in spans:
        end = span.context_len + span.num_tokens
        assert end <= len(span.block_ids) * size, f"{end} tokens do not fit {len(span.block_ids)} blocks"
        starts = [block_id * shape.strips_per_block * size for block_id in span.block_ids[span.context_len // size : -(-end // size)]]
        base = span.context_len - span.context_len % size
        first_rows += [starts[(position - base) // size] + position % size for position in range(span.context_len, end)]
        if end % size and end - end % size >= span.context_len:
            unused += range(starts[-1] + end % size, starts[-1] + size)
    heads = torch.arange(shape.num_kv_heads, device=device) * size
    k_rows = torch.tensor(first_rows, device=device).unsqueeze(1) + heads
    v_rows = k_rows + shape.num_kv_heads * size
    if not unused:
        return WritePlan(k_rows, v_rows, None)
    both = torch.arange(2 * shape.num_kv_heads, device=device) * size
    return WritePlan(k_rows, v_rows, (torch.tensor(unused, device=device).unsqueeze(1) + both).flatten())
