"""The decoder of one rank: the same pass over its share of heads, inner rows and vocabulary, joined with the other ranks' by collectives.

Column-parallel products (q, k, v, gate, up) need no others: each rank makes its own part of the output. After the row-parallel ones (the
attention's output, down) the ranks' products are added up, of which rank 0's carries the bias. The embedding is looked up by the rank
that has the row, and the head's logits are gathered to rank 0, where sampling is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.models.decoder import Decoder, LayerWeights, ModelWeights, OnLayer, PlannedStep, State, Step
from polymux.actors.parallel.collectives import Collectives
from polymux.actors.parallel.shards import rank_config, whole_rows
from polymux.kernels import ops
from polymux.kernels.few_rows import FewRows


class RankDecoder(Decoder):
    """`config` is the whole model's; what the base class runs is this rank's share of it."""

    def __init__(
        self, config: ArchConfig, dtype: torch.dtype, device: torch.device, collectives: Collectives, *, batch_invariant: bool
    ) -> None:
        super().__init__(rank_config(config, collectives.num_ranks), dtype, device, batch_invariant=batch_invariant)
        self._collectives = collectives
        self.vocab_size = config.vocab_size
        self._first_row = collectives.rank * self.config.vocab_size  # of the vocabulary, here
        self._on_layer: OnLayer = None
        self._written: int | None = None  # the layer whose K and V are written here, and perhaps not yet on the other ranks

    def forward(
        self,
        weights: ModelWeights,
        cache: ops.PagedCache,
        step: Step | PlannedStep,
        on_layer: OnLayer,
        before_layer: OnLayer = None,
    ) -> Tensor:
        """As the base class's; logits on rank 0 only. `on_layer(i)` comes once layer i's K and V are in the cache of every rank."""
        self._on_layer, self._written = on_layer, None
        try:
            return super().forward(weights, cache, step, self._note_written, before_layer)
        finally:
            self._on_layer = None

    def few_rows(self, weights: ModelWeights, cache: ops.PagedCache) -> FewRows | None:
        """None: a compiled layer has no place for the sums."""
        return None

    def _note_written(self, layer: int) -> None:
        self._written = layer

    def _embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        """Each row from the one rank that has it, zeros from the others."""
        rows = token_ids - self._first_row
        is_here = (rows >= 0) & (rows < self.config.vocab_size)
        x = super()._embed(table, torch.where(is_here, rows, 0))
        return self._collectives.all_reduce(x.contiguous().masked_fill_(~is_here[:, None], 0))

    def agreed(self, token_ids: Tensor) -> Tensor:
        return self._collectives.broadcast(token_ids)

    def _norm(self, weight: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        """A sum is of the ranks' products alone, and so rounded at its own size; each rank adds it to its residual as it takes the norm."""
        x, *deltas = state
        if not deltas:
            return super()._norm(weight, x)
        return ops.add_rms_norm(x, deltas[0], weight, self.config.rms_norm_eps), x

    def _mix(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> State:
        delta = self._sum_of_products(attended.flatten(1), layer.output, layer.output_bias)
        hidden, x = self._norm(layer.post_norm, x, delta)
        hidden = ops.gated_linear(hidden, layer.gate, layer.gate_bias, layer.up, layer.up_bias, by_row=self.batch_invariant)
        return x, self._sum_of_products(hidden, layer.down, layer.down_bias)

    def _sum_of_products(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Row-parallel. No rank has another's sum before that one has written this layer's K and V."""
        part = ops.linear(x, weight, bias if self._collectives.rank == 0 else None, by_row=self.batch_invariant)
        total = self._collectives.all_reduce(part)
        if self._written is not None and self._on_layer is not None:
            layer, self._written = self._written, None
            self._on_layer(layer)
        return total

    def _predict(self, weights: ModelWeights, *state: Tensor) -> tuple[Tensor, ...]:
        """Vocabulary-parallel: all of the logits on rank 0, none elsewhere."""
        (mine,) = super()._predict(weights, *state)
        parts = self._collectives.gather(mine)
        return (whole_rows(parts, self.vocab_size) if parts else mine[:, :0],)
