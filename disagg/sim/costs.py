"""What things cost in a simulation: integer microseconds, so that every run of the same work gives the same times to the last digit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Three = tuple[float, float, float]

MS = 1000
SECOND = 1_000_000  # microseconds


class CostModel(Protocol):
    """Of one kind of device. `kind` names a model's architecture and size; models of one kind cost the same."""

    def prefill_us(self, kind: str, lengths: Sequence[int], cached: Sequence[int] = ()) -> int:
        """One step over so many tokens of each prompt; after these many of each that have their KV, none where they are not given."""

    def decode_us(self, kind: str, num_seqs: int, kv_tokens: int) -> int:
        """One step of a batch whose contexts add up to `kv_tokens`."""

    def load_us(self, kind: str) -> int:
        """Bring the weights in, with nothing prefetched."""

    def prefetch_us(self, kind: str) -> int:
        """The same beside a worker's compute, where that is slower."""

    def prefetched_us(self, kind: str, computed_us: int) -> int:
        """Bring them in when the load had `computed_us` of the former model's compute to hide behind."""

    def kv_in_us(self, kind: str, kv_tokens: int) -> int:
        """Bring that much KV cache from host memory."""

    def weight_bytes(self, kind: str) -> int: ...

    def kv_bytes(self, kind: str) -> int:
        """Of one token."""

    def arena_bytes(self) -> int:
        """Of one device, weights and KV together."""

    def max_kv_tokens(self, kind: str) -> int:
        """Of one model alone on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindCosts:
    """Fitted seconds: prefill = a + b * tokens + c * sum of squared lengths; decode step = a + b * kv tokens + c * sequences."""

    prefill: Three
    decode: Three
    weight_gb: int
    kv_bytes: int  # of a token


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactCosts:
    """The cost model of the simulator that the Aegaeon artifact (SOSP '25) ships, exactly: whole milliseconds, rounded down.

    Its habits are kept because its figures rest on them: the batch term of a decode step enters once, negative, whatever the batch; a
    load takes size over 16 GB/s, KV comes in at half a megabyte a token for every model and is paid once a turn; going out is free.
    """

    kinds: Mapping[str, KindCosts]
    memory_gb: int = 80
    link_gb_per_s: int = 16
    min_prefetched_ms: int = 10

    def prefill_us(self, kind: str, lengths: Sequence[int], cached: Sequence[int] = ()) -> int:
        """What is cached counts for nothing: the artifact has no such thing."""
        a, b, c = self.kinds[kind].prefill
        return int(1000 * (a + b * sum(lengths) + c * sum(n * n for n in lengths))) * MS

    def decode_us(self, kind: str, num_seqs: int, kv_tokens: int) -> int:
        a, b, c = self.kinds[kind].decode
        return int(1000 * (a + b * kv_tokens - c)) * MS

    def load_us(self, kind: str) -> int:
        return int(self.kinds[kind].weight_gb / self.link_gb_per_s * 1000) * MS

    def prefetch_us(self, kind: str) -> int:
        return self.load_us(kind)

    def prefetched_us(self, kind: str, computed_us: int) -> int:
        return max(self.min_prefetched_ms * MS, self.load_us(kind) - computed_us)

    def kv_in_us(self, kind: str, kv_tokens: int) -> int:
        return int(kv_tokens * 0.5 / self.link_gb_per_s) * MS

    def weight_bytes(self, kind: str) -> int:
        return self.kinds[kind].weight_gb << 30

    def kv_bytes(self, kind: str) -> int:
        return self.kinds[kind].kv_bytes

    def arena_bytes(self) -> int:
        return self.memory_gb << 30

    def max_kv_tokens(self, kind: str) -> int:
        costs = self.kinds[kind]
        return int((self.memory_gb - costs.weight_gb) * 0.8 / (costs.kv_bytes / 2**30))


H100_ARTIFACT = ArtifactCosts(
    kinds={
        "qwen2.5-7b": KindCosts(
            prefill=(0.016105319238229505, 1.462442545886591e-05, -6.637200162506729e-10),
            decode=(0.00858222632393528, 2.589395963587745e-07, 7.614765070231733e-05),
            weight_gb=14,
            kv_bytes=401_408,
        ),
        "yi-9b": KindCosts(
            prefill=(0.008493644362887041, 2.685196672003255e-05, -6.151448745161461e-10),
            decode=(0.01381161716499307, -2.9321864328413474e-07, 8.124200390866246e-05),
            weight_gb=18,
            kv_bytes=786_432,
        ),
        "llama2-13b": KindCosts(
            prefill=(0.007455501538639539, 4.1198056900104157e-05, -1.1858108286924018e-09),
            decode=(0.012492969300955283, 1.2539260413885968e-07, 0.0001150557187433762),
            weight_gb=26,
            kv_bytes=819_200,
        ),
    }
)
