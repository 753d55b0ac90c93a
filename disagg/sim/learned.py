"""A cost model from what real workers learned of themselves: the fits that they save under `costs.path`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polymux.disagg.cost import Fit, decode_features, prefill_features, switch_features
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.sized import SizedCosts, SizedKind
from polymux.transport.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedKind(SizedKind):
    """`digest` is of its weights, as the saved fits are keyed."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedCosts(SizedCosts):
    """Of one kind of device. `fits` are the saved ones by key; build with `learned_costs`, which says what is missing."""

    kinds: Mapping[str, LearnedKind]
    fits: Mapping[str, Fit]
    switch_overhead_us: int = 1_000  # where the weights are there
    prefetch_bytes_per_s: float | None = None  # of a load beside compute; None: as fast as the learned switch

    def chunks_us(self, kind: str, chunks: Sequence[tuple[int, int]]) -> int:
        return self._us(f"prefill/{self.kinds[kind].digest}", prefill_features(chunks))

    def decode_us(self, kind: str, num_seqs: int, kv_tokens: int) -> int:
        return self._us(f"decode/{self.kinds[kind].digest}", decode_features(num_seqs, kv_tokens))

    def load_us(self, kind: str) -> int:
        return self._us("switch", switch_features(self.weight_bytes(kind)))

    def prefetch_us(self, kind: str) -> int:
        load_us = self.load_us(kind)
        return (
            load_us
            if self.prefetch_bytes_per_s is None
            else max(load_us, round(self.weight_bytes(kind) / self.prefetch_bytes_per_s * SECOND))
        )

    def kv_in_us(self, kind: str, kv_tokens: int) -> int:
        return self._us("swap" if "swap" in self.fits else "switch", switch_features(kv_tokens * self.kv_bytes(kind)))

    def _us(self, key: str, features: Sequence[float]) -> int:
        return max(1, round(self.fits[key].predict(features) * SECOND))


def learned_costs(
    kinds: Mapping[str, LearnedKind], fits: Mapping[str, Fit], *, memory_bytes: int, prefetch_bytes_per_s: float | None = None
) -> LearnedCosts:
    """Raises ConfigError, naming the fits that were not saved: those models never ran there."""
    wanted = {"switch", *(f"{phase}/{kind.digest}" for kind in kinds.values() for phase in ("prefill", "decode"))}
    if missing := sorted(wanted - fits.keys()):
        raise ConfigError(f"saved costs have no {', '.join(missing)}; serve these models once with costs.path set", param="costs")
    return LearnedCosts(kinds=kinds, fits=fits, memory_bytes=memory_bytes, prefetch_bytes_per_s=prefetch_bytes_per_s)
