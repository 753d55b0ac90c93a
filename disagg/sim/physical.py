"""A cost model from measured coefficients and byte counts: batch size counts, KV has its true size, bytes cross a link at its bandwidth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polymux.disagg.cost import prefill_features
from polymux.disagg.sim.costs import SECOND, Three
from polymux.disagg.sim.sized import SizedCosts, SizedKind

GIB = 1 << 30
KIB = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalKind(SizedKind):
    """Fitted seconds, as `disagg.cost` fits them: prefill 1, tokens, tokens^2; decode step 1, sequences, kv tokens. None is negative."""

    prefill: Three
    decode: Three


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalCosts(SizedCosts):
    """One kind of device and the models on it."""

    kinds: Mapping[str, PhysicalKind]
    link_bytes_per_s: float  # host memory to device, one way
    switch_overhead_us: int = 2_000  # rebinding, the first launch

    def chunks_us(self, kind: str, chunks: Sequence[tuple[int, int]]) -> int:
        _, num_tokens, squares = prefill_features(chunks)
        return _us(self.kinds[kind].prefill, num_tokens, squares)

    def decode_us(self, kind: str, num_seqs: int, kv_tokens: int) -> int:
        return _us(self.kinds[kind].decode, num_seqs, kv_tokens)

    def load_us(self, kind: str) -> int:
        return self.switch_overhead_us + round(self.weight_bytes(kind) / self.link_bytes_per_s * SECOND)

    def kv_in_us(self, kind: str, kv_tokens: int) -> int:
        return round(kv_tokens * self.kv_bytes(kind) / self.link_bytes_per_s * SECOND)


def _us(coefficients: Three, first: float, second: float) -> int:
    base, one, two = coefficients
    return max(1, round((base + one * first + two * second) * SECOND))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    weight_bytes: int
    kv_bytes: int
    num_layers: int


# fp16 weights by the models' cards, KV by layers, KV heads and head size
_SIZES = {
    "qwen2.5-7b": _Sizes(weight_bytes=round(14.2 * GIB), kv_bytes=56 * KIB, num_layers=28),
    "yi-9b": _Sizes(weight_bytes=round(16.5 * GIB), kv_bytes=96 * KIB, num_layers=48),
    "llama2-13b": _Sizes(weight_bytes=round(24.2 * GIB), kv_bytes=800 * KIB, num_layers=40),
}

# Least squares over the artifact's profiles (vLLM 0.5.1) of at most 4096 tokens, where no prefill was split; negative terms are zero.
_CLEAN: dict[str, dict[str, tuple[Three, Three]]] = {
    "h100": {
        "qwen2.5-7b": ((5.76e-3, 21.35e-6, 0.0), (9.15e-3, 68.0e-6, 0.0)),
        "yi-9b": ((8.58e-3, 26.74e-6, 0.11e-9), (13.85e-3, 72.2e-6, 0.0)),
        "llama2-13b": ((7.25e-3, 40.48e-6, 0.15e-9), (12.59e-3, 106.9e-6, 0.10e-6)),
    },
    "h800": {
        "qwen2.5-7b": ((5.32e-3, 22.65e-6, 0.05e-9), (8.34e-3, 102.2e-6, 0.039e-6)),
        "yi-9b": ((7.31e-3, 29.21e-6, 0.0), (11.61e-3, 99.5e-6, 0.088e-6)),
        "llama2-13b": ((6.85e-3, 45.16e-6, 0.14e-9), (12.56e-3, 152.1e-6, 0.190e-6)),
    },
}

# Not measured: an H100's compute with the H200's memory, whose bandwidth (4.8 against 3.35 TB/s by their data sheets) bounds decode steps.
_CLEAN["h200"] = {
    kind: (prefill, (decode[0] * 0.7, decode[1] * 0.7, decode[2] * 0.7)) for kind, (prefill, decode) in _CLEAN["h100"].items()
}

DEVICES = {"h100": 72 * GIB, "h800": 72 * GIB, "h200": 129 * GIB}  # with their memory for weights and KV


def physical_costs(device: str, *, link_bytes_per_s: float = 25e9, memory_bytes: int | None = None) -> PhysicalCosts:
    """Of one of `DEVICES`. The default link is half of what PCIe 5.0 x16 is specified for."""
    kinds = {
        kind: PhysicalKind(
            prefill=prefill,
            decode=decode,
            num_weight_bytes=_SIZES[kind].weight_bytes,
            num_kv_bytes=_SIZES[kind].kv_bytes,
            num_layers=_SIZES[kind].num_layers,
        )
        for kind, (prefill, decode) in _CLEAN[device].items()
    }
    return PhysicalCosts(kinds=kinds, memory_bytes=memory_bytes or DEVICES[device], link_bytes_per_s=link_bytes_per_s)
