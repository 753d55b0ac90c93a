"""Attention steps for tests: random queries over caches in shuffled blocks, computed by one implementation and by the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymux.actors.model_runner import SequenceSlice
from polymux.kernels import reference
from polymux.kernels.gpu.plan import AttendSpec, Attention, StepPlan, StepPlanner, Workspace
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.paged import CacheShape

NUM_LAYERS, LAYER, SIZE = 2, 1, 16
Sizes = Sequence[tuple[int, int]]  # (tokens, tokens before them) of each sequence
MIXED = ((1, 90), (18, 50), (1, 0), (33, 0), (1, 300), (5, 7))


@dataclass(frozen=True, kw_only=True)
class Case:
    sizes: Sizes
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 32
    window: int | None = None
    dtype: torch.dtype = torch.float32
    padding: int = 0
    num_sms: int = 4
    batch_invariant: bool = False


class Step:
    """Random queries over caches that lie in shuffled blocks, with NaN wherever no token is."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        num_tokens = sum(tokens for tokens, _ in case.sizes)
        wanted = [-(-(tokens + context) // SIZE) for tokens, context in case.sizes]
        ids = iter(random.Random(sum(wanted)).sample(range(2 * sum(wanted) + 1), sum(wanted)))
        starts = [sum(tokens for tokens, _ in case.sizes[:i]) for i in range(len(case.sizes))]
        self.spans = tuple(
            SequenceSlice(start=start, num_tokens=tokens, context_len=context, block_ids=[next(ids) for _ in range(n)])
            for start, (tokens, context), n in zip(starts, case.sizes, wanted, strict=True)
        )
        kv = torch.full((2 * sum(wanted) + 1, NUM_LAYERS, 2, case.kv_heads, SIZE, case.head_dim), torch.nan)
        for span in self.spans:
            end = span.context_len + span.num_tokens
            for i, block in enumerate(span.block_ids):
                kv[block, :, :, :, : end - i * SIZE] = torch.randn_like(kv[block, :, :, :, : end - i * SIZE])
        self.kv = kv.to(device, case.dtype)
        heads = case.kv_heads * case.group
        fused = torch.randn(num_tokens + case.padding, heads + 2, case.head_dim).to(device, case.dtype)
        self.q = fused[:, :heads]  # as of a fused projection: rows further apart than they are long
        self.scale = case.head_dim**-0.5

    @property
    def spec(self) -> AttendSpec:
        case = self.case
        return AttendSpec(
            shape=CacheShape.of(self.kv),
            num_heads=case.kv_heads * case.group,
            dtype=case.dtype,
            scale=self.scale,
            windows=(case.window,),
            max_blocks=self.kv.shape[0],
            device=self.device,
            workspace=Workspace(self.device, 1 << 20),
            batch_invariant=case.batch_invariant,
        )

    def plan(self, attention: Attention, staging: Staging | None = None) -> StepPlan:
        planner = StepPlanner(CacheShape.of(self.kv), attention)
        num_blocks = sum(len(span.block_ids) for span in self.spans)
        staging = staging or Staging(planner.num_words(self.q.shape[0], num_blocks), self.device)
        staging.begin()
        return planner.plan(self.spans, [self.case.window], staging, self.q.shape[0])

    def expected(self) -> Tensor:
        rows = [self.q[span.start : span.start + span.num_tokens] for span in self.spans]
        # The reference weighs what it masks by zero, so it must not meet the NaN.
        kv = self.kv.nan_to_num()
        parts = [
            reference.attend(q, kv, LAYER, span.block_ids, span.context_len, self.case.window, self.scale)
            for q, span in zip(rows, self.spans, strict=True)
        ]
        return torch.cat((*parts, torch.zeros_like(self.q[: self.case.padding])))
