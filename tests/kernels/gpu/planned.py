"""A bound model whose steps are planned ones: on a GPU as they are, on the CPU with every kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polymux.actors.model_runner import ForwardBatch
from polymux.actors.models.decoder import Decoder, ModelWeights, PlannedStep
from polymux.kernels import choice
from polymux.kernels.gpu.plan import AttendSpec, StepPlanner, Workspace
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.gpu.tiled import TiledAttention
from polymux.kernels.ops import PagedCache


class PlannedModel:
    """With the interface of `model_runner.BoundModel`; every step has `padding` more rows than tokens."""

    def __init__(self, decoder: Decoder, weights: ModelWeights, kv: Tensor, padding: int = 1) -> None:
        self.config = decoder.config
        self._decoder, self._weights, self._cache, self._padding = decoder, weights, PagedCache(kv), padding
        self._device = kv.device
        config = decoder.config
        spec = AttendSpec(
            shape=self._cache.shape,
            num_heads=config.num_heads,
            dtype=kv.dtype,
            scale=config.head_dim**-0.5,
            windows=tuple(dict.fromkeys(config.windows)),
            max_blocks=1024,
            device=kv.device,
            workspace=Workspace(kv.device),
            batch_invariant=decoder.batch_invariant,
        )
        self._planner = StepPlanner(spec.shape, TiledAttention(spec))
        self._staging = Staging(self._planner.num_words(256, 1024, 2), kv.device)
        decoder.prepare()

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> Tensor:
        num_rows = batch.token_ids.shape[0] + self._padding
        self._staging.begin()
        plan = self._planner.plan(batch.slices, self.config.windows, self._staging, num_rows)
        wanted = batch.logits_rows
        if wanted is None:
            wanted = torch.tensor([s.start + s.num_tokens - 1 for s in batch.slices])
        token_ids = torch.nn.functional.pad(batch.token_ids, (0, self._padding)).to(self._device)
        step = PlannedStep(token_ids, plan, wanted.to(self._device))
        with torch.inference_mode(), choice.override("all=triton"):
            return self._decoder.forward(self._weights, self._cache, step, on_layer)
