"""The decoder skeleton: one forward pass for Llama, Mistral, Qwen2 and Qwen3, given whichever weights are bound to it.

It holds no weights. What a layer has (biases, head norms) shows in its `LayerWeights`, so nothing here asks which architecture it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.models.rope import RotaryTable
from polymux.kernels import ops
from polymux.kernels.attend_plan import AttentionPlan
from polymux.kernels.few_rows import FewRows, Heads
from polymux.kernels.paged import Span, WritePlan

if TYPE_CHECKING:
    from polymux.kernels.gpu.plan import StepPlan

INVARIANT_ROWS = 16  # token rows in every product under `batch_invariant`

RowFunction = Callable[..., tuple[Tensor, ...]]
OnLayer = Callable[[int], None] | None
State = tuple[Tensor, ...]  # what goes from layer to layer: the residual [T, H] and, of a rank, a sum that is not yet added to it


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Views of the arena; linear weights plain [out, in] or packed."""

    input_norm: Tensor
    qkv: Tensor  # [q_size + 2 kv_size, hidden]
    qkv_bias: Tensor | None
    head_norms: Tensor | None  # [Hq + Hkv, D]: q's norm weight for each query head, then k's
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Tensor  # [V, H], or a row view of a packed head that is tied to it
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor  # [V, H]


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass as tensors. Rows past the real tokens are padding: computed, written nowhere and read by no one."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    max_position: int
    writes: WritePlan
    attention: Mapping[int | None, AttentionPlan]  # by window
    logits_rows: Tensor | None  # [R] int64; None: every row, in order


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One forward pass of a GPU: what depends on the sequences is in tensors on the device, so a captured graph serves other steps too."""

    token_ids: Tensor  # [T] int64, with any ids in the padding rows
    plan: StepPlan
    logits_rows: Tensor | None  # [R] int64; None: every row, in order


class Decoder:
    """The pass for one architecture shape and dtype: rotary tables and constants, and the order of operations."""

    def __init__(self, config: ArchConfig, dtype: torch.dtype, device: torch.device, *, batch_invariant: bool) -> None:
        self.config = config
        self.vocab_size = config.vocab_size  # of the logits
        self.batch_invariant = batch_invariant
        self._dtype = dtype
        self._rotary = RotaryTable(config, dtype, device)
        self._angles: Tensor | None = None
        self._scale = config.head_dim**-0.5
        self._num_qk_heads = config.num_heads + config.num_kv_heads

    def prepare(self, max_position: int = 0) -> None:
        """Make the rotary table of planned steps for every position that the model has; it stays where it is from then on."""
        num_positions = max(max_position + 1, self.config.max_position_embeddings)
        if self._angles is None or self._angles.shape[0] < num_positions:
            self._angles = self._rotary.joined(num_positions)

    def forward(
        self,
        weights: ModelWeights,
        cache: ops.PagedCache,
        step: Step | PlannedStep,
        on_layer: OnLayer,
        before_layer: OnLayer = None,
    ) -> Tensor:
        """Logits [R, V] fp32; the K and V of the step's tokens are in the cache afterwards.

        `before_layer(i)` returns once layer i's weights may be read, and for i = num_layers those after the layers; the embedding's may be.
        """
        config = self.config
        attend = self._attention(cache, step)
        x = self._embed(weights.embedding, step.token_ids)
        attended = x.new_zeros(x.shape[0], config.num_heads, config.head_dim)
        state: State = (x,)
        for i, layer in enumerate(weights.layers):
            if before_layer is not None:
                before_layer(i)
            x = attend(i, layer, state, on_layer, attended)
            state = self._by_rows(self._mix, layer, x, attended)
        if before_layer is not None:
            before_layer(config.num_layers)
        if step.logits_rows is not None:
            state = tuple(one[step.logits_rows] for one in state)
        if not state[0].shape[0]:
            return torch.empty(0, self.vocab_size, device=x.device)
        (logits,) = self._by_rows(self._predict, weights, *state)
        return logits.float()

    def _attention(self, cache: ops.PagedCache, step: Step | PlannedStep) -> Callable[..., Tensor]:
        """A step's part of each layer that reads and writes the cache; returns the residual."""
        if isinstance(step, PlannedStep):
            assert self._angles is not None, "the decoder is not prepared for planned steps"
            return partial(self._attend_planned, cache, step, self._angles)
        return partial(self._attend, cache, step, *self._rotary.at(step.positions, step.max_position))

    def _attend(
        self,
        cache: ops.PagedCache,
        step: Step,
        cos: Tensor,
        sin: Tensor,
        i: int,
        layer: LayerWeights,
        state: State,
        on_layer: OnLayer,
        out: Tensor,
    ) -> Tensor:
        q, k, v, x = self._by_rows(self._project, layer, cos, sin, *state)
        ops.kv_write(cache, i, k, v, step.writes)
        if on_layer is not None:
            on_layer(i)
        ops.attend(q, k, v, cache, i, step.attention[self.config.windows[i]], self._scale, out)
        return x

    def _attend_planned(
        self,
        cache: ops.PagedCache,
        step: PlannedStep,
        angles: Tensor,
        i: int,
        layer: LayerWeights,
        state: State,
        on_layer: OnLayer,
        out: Tensor,
    ) -> Tensor:
        heads, x = self._by_rows(self._heads, layer, *state)
        q = ops.rotate_write(cache, i, heads, layer.head_norms, self.config.rms_norm_eps, angles, step.plan)
        if on_layer is not None:
            on_layer(i)
        ops.attend_planned(q, cache, i, step.plan.attention[self.config.windows[i]], self._scale, out)
        return x

    def agreed(self, token_ids: Tensor) -> Tensor:
        """What a step is fed, where several compute it together: rank 0's."""
        return token_ids

    def _embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        return ops.embed(table, token_ids, self.config.hidden_size)

    def _linear_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        return ops.linear_add(x, weight, bias, residual, by_row=self.batch_invariant)

    def few_rows(self, weights: ModelWeights, cache: ops.PagedCache) -> FewRows | None:
        """What `decode` runs these weights by, where this machine can."""
        config = self.config
        heads = Heads(num_heads=config.num_heads, eps=config.rms_norm_eps, scale=self._scale, windows=config.windows)
        return None if self.batch_invariant else ops.compile_few_rows(weights.layers, weights.final_norm, weights.head, cache, heads)

    def decode(
        self,
        weights: ModelWeights,
        few_rows: FewRows,
        token_ids: Tensor,
        spans: Sequence[Span],
        on_layer: OnLayer,
        before_layer: OnLayer = None,
    ) -> Tensor:
        """As `forward` for one token of each sequence, as many as `few_rows` takes: every row's logits."""
        lengths = [span.context_len for span in spans]
        cos, sin = self._rotary.at(torch.tensor(lengths), max(lengths))
        x = ops.embed(weights.embedding, token_ids, self.config.hidden_size).contiguous()
        few_rows.begin(x, [span.block_ids for span in spans], lengths, cos, sin)
        if before_layer is None and on_layer is None:
            return few_rows.logits(0)
        for i in range(self.config.num_layers):
            if before_layer is not None:
                before_layer(i)
            few_rows.layers(i, i + 1)
            if on_layer is not None:
                on_layer(i)
        if before_layer is not None:
            before_layer(self.config.num_layers)
        return few_rows.logits()

    def _project(self, layer: LayerWeights, cos: Tensor, sin: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """q [T, Hq, D] and k [T, Hkv, D], rotated, v [T, Hkv, D], and the residual."""
        config, num_qk = self.config, self._num_qk_heads
        heads, x = self._heads(layer, *state)
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if layer.head_norms is not None:
            qk = ops.rms_norm(qk, layer.head_norms, config.rms_norm_eps)
        qk = ops.rotate(qk, cos, sin)
        return qk[:, : config.num_heads], qk[:, config.num_heads :], v, x

    def _heads(self, layer: LayerWeights, *state: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [T, Hq + 2 Hkv, D], and the residual."""
        hidden, x = self._norm(layer.input_norm, *state)
        heads = ops.linear(hidden, layer.qkv, layer.qkv_bias, by_row=self.batch_invariant)
        return heads.view(x.shape[0], -1, self.config.head_dim), x

    def _norm(self, weight: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of what goes from layer to layer, and the residual."""
        (x,) = state
        return ops.rms_norm(x, weight, self.config.rms_norm_eps), x

    def _mix(self, layer: LayerWeights, x: Tensor, attended: Tensor) -> State:
        x = self._linear_add(attended.flatten(1), layer.output, layer.output_bias, x)
        hidden = ops.rms_norm(x, layer.post_norm, self.config.rms_norm_eps)
        hidden = ops.gated_linear(hidden, layer.gate, layer.gate_bias, layer.up, layer.up_bias, by_row=self.batch_invariant)
        return (self._linear_add(hidden, layer.down, layer.down_bias, x),)

    def _predict(self, weights: ModelWeights, *state: Tensor) -> tuple[Tensor, ...]:
        hidden, _ = self._norm(weights.final_norm, *state)
        return (ops.linear(hidden, weights.head, by_row=self.batch_invariant),)

    def _by_rows(self, function: RowFunction, weights: LayerWeights | ModelWeights, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Apply a row-wise function to all rows at once; under `batch_invariant` to so many at a time, always as many, padded with zeros.

        A product's bits may depend on how many rows it has, never on what the other rows are.
        """
        num_rows = inputs[0].shape[0]
        if not self.batch_invariant:
            return function(weights, *inputs)
        pieces = []
        for start in range(0, num_rows, INVARIANT_ROWS):
            parts = [x[start : start + INVARIANT_ROWS] for x in inputs]
            missing = INVARIANT_ROWS - parts[0].shape[0]
            if missing:
                parts = [torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) for x in parts]
            pieces.append(function(weights, *parts))
        return tuple(torch.cat(column)[:num_rows] for column in zip(*pieces, strict=True))
