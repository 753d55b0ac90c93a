"""Attention problems of the benchmark, on the GPU: a paged cache of random values, a step over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from polymux.kernels.gpu.config import Tiles
from polymux.kernels.gpu.plan import AttendPlan, AttendSpec, Attention, StepPlanner, Workspace
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.gpu.tiled import TiledAttention
from polymux.kernels.paged import CacheShape

SIZE = 16  # slots of a block
DTYPE = torch.bfloat16
NUM_LAYERS = 4  # calls go over all of them in turn, so none finds its keys in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """A model's attention."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


LLAMA_8B = Heads(name="llama_8b", num_heads=32, num_kv_heads=8, head_dim=128)
QWEN_7B = Heads(name="qwen_7b", num_heads=28, num_kv_heads=4, head_dim=128)
QWEN_HALF_B = Heads(name="qwen_0.5b", num_heads=14, num_kv_heads=2, head_dim=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step: (tokens, tokens before them) of each sequence."""

    heads: Heads
    sizes: tuple[tuple[int, int], ...]

    @property
    def is_decode(self) -> bool:
        return all(tokens == 1 for tokens, _ in self.sizes)

    @property
    def kv_bytes(self) -> int:
        """What one layer must read: K and V of every token that is seen, once."""
        return sum(tokens + context for tokens, context in self.sizes) * self.heads.num_kv_heads * self.heads.head_dim * 2 * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Of both products over the keys that are seen, not over those that are masked."""
        pairs = sum(tokens * context + tokens * (tokens + 1) // 2 for tokens, context in self.sizes)
        return 4 * pairs * self.heads.num_heads * self.heads.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    start: int
    num_tokens: int
    context_len: int
    block_ids: list[int]


@dataclass(slots=True, kw_only=True)
class Step:
    """A case with its memory. Blocks lie in random order."""

    case: Case
    device: torch.device = field(default_factory=partial(torch.device, "cuda"))
    dtype: torch.dtype = DTYPE
    kv: Tensor = field(init=False)
    q: Tensor = field(init=False)
    out: Tensor = field(init=False)
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        heads, sizes, options = self.case.heads, self.case.sizes, {"dtype": self.dtype, "device": self.device}
        counts = [-(-(tokens + context) // SIZE) for tokens, context in sizes]
        ids = iter(torch.randperm(sum(counts)).tolist())
        starts = torch.tensor([0, *(tokens for tokens, _ in sizes)]).cumsum(0).tolist()
        self.spans = [
            Span(start=start, num_tokens=tokens, context_len=context, block_ids=[next(ids) for _ in range(count)])
            for start, (tokens, context), count in zip(starts, sizes, counts, strict=False)
        ]
        self.kv = torch.empty(sum(counts), NUM_LAYERS, 2, heads.num_kv_heads, SIZE, heads.head_dim, **options).normal_()
        self.q = torch.randn(starts[-1], heads.num_heads, heads.head_dim, **options)
        self.out = torch.full_like(self.q, torch.nan)

    @property
    def scale(self) -> float:
        return float(self.case.heads.head_dim) ** -0.5

    @property
    def spec(self) -> AttendSpec:
        return AttendSpec(
            shape=CacheShape.of(self.kv),
            num_heads=self.case.heads.num_heads,
            dtype=self.dtype,
            scale=self.scale,
            windows=(None,),
            max_blocks=self.kv.shape[0],
            device=self.device,
            workspace=Workspace(self.device),
        )

    def plan(self, tiles: Tiles | None = None) -> AttendPlan:
        return self.plan_by(TiledAttention(self.spec, tiles=tiles))

    def plan_by(self, attention: Attention) -> AttendPlan:
        planner = StepPlanner(CacheShape.of(self.kv), attention)
        staging = Staging(planner.num_words(self.q.shape[0], self.kv.shape[0]), self.device)
        staging.begin()
        return planner.plan(self.spans, [None], staging, self.q.shape[0]).attention[None]

    def ours(self, plan: AttendPlan) -> Callable[[], None]:
        """Attention of each layer in turn."""
        from polymux.kernels.gpu.attend import attend

        def run() -> None:
            for layer in range(NUM_LAYERS):
                attend(self.q, self.kv, layer, plan, self.scale, self.out)

        return run


def graph_of(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` captured, after it has been compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
