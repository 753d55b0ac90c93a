"""What cost models share that know their kinds by byte counts: how memory is used up, and what is left of a load behind compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedKind:
    num_weight_bytes: int
    num_kv_bytes: int  # of a token
    num_layers: int = 32  # that come and are computed one after another


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedCosts(ABC):
    """Base of a `CostModel`; it lacks the times."""

    kinds: Mapping[str, SizedKind]
    memory_bytes: int
    switch_overhead_us: int  # where the weights are there

    @abstractmethod
    def load_us(self, kind: str) -> int: ...

    def prefetch_us(self, kind: str) -> int:
        return self.load_us(kind)

    def prefetched_us(self, kind: str, computed_us: int) -> int:
        return max(self.switch_overhead_us, self.load_us(kind) - computed_us)

    def prefill_us(self, kind: str, lengths: Sequence[int], cached: Sequence[int] = ()) -> int:
        return self.chunks_us(kind, tuple(zip(cached or (0,) * len(lengths), lengths, strict=True)))

    @abstractmethod
    def chunks_us(self, kind: str, chunks: Sequence[tuple[int, int]]) -> int:
        """A prefill step over each chunk's (tokens cached before, tokens computed now)."""

    def weight_bytes(self, kind: str) -> int:
        return self.kinds[kind].num_weight_bytes

    def kv_bytes(self, kind: str) -> int:
        return self.kinds[kind].num_kv_bytes

    def num_layers(self, kind: str) -> int:
        return self.kinds[kind].num_layers

    def arena_bytes(self) -> int:
        return self.memory_bytes

    def max_kv_tokens(self, kind: str) -> int:
        return (self.memory_bytes - self.weight_bytes(kind)) // self.kv_bytes(kind)
