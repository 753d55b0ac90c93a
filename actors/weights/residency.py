"""Which models' weights are in the arena, and the switch that brings one in: a transaction that leaves the old state or the new one.

Reserve a range (evicting by value), load the image into it, verify, commit. On any error the range is given back, an active model that
had to be evicted is loaded again, and the error is raised: the worker still serves the model it had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from polymux.actors.arena import Arena, Span
from polymux.actors.weights.image import ImageManifest, verify_image
from polymux.disagg.eviction import Popularity, plan_eviction
from polymux.disagg.views import ArenaView, ResidentView
from polymux.transport.errors import CheckpointError, OutOfMemory, PolymuxError
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName
from polymux.transport.weights import OpenImage, read_image


class ImageSource(Protocol):
    """Where weight images come from: the node's weight store."""

    def fetch(self, model: ModelName) -> OpenImage: ...


@dataclass(slots=True)
class Resident:
    """One model's weights in the arena."""

    spec: ModelSpec
    manifest: ImageManifest
    span: Span
    weights: Tensor  # uint8 [nbytes], a view of the arena


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What one change of the active model took."""

    source: ModelName | None
    target: ModelName
    seconds: float
    nbytes: int  # copied into the arena; 0 when the target was resident
    evicted: tuple[ModelName, ...]


@dataclass(slots=True)
class Residency:
    """The resident models of one arena, and the active one. Not thread-safe: the engine thread owns it."""

    arena: Arena
    source: ImageSource
    clock: Callable[[], float] = time.monotonic
    on_evict: Callable[[Resident], None] = lambda _: None
    residents: dict[ModelName, Resident] = field(default_factory=dict)
    popularity: dict[ModelName, Popularity] = field(default_factory=dict)
    active: ModelName | None = None
    bytes_per_s: float = 5e9  # of the last loads, smoothed; starts from a guess at host memory
    _verified: set[str] = field(default_factory=set)

    def switch(self, spec: ModelSpec, *, wanted: Collection[ModelName] = ()) -> Switch:
        """Make `spec`'s model active. Models in `wanted` have work waiting and are evicted last.

        Raises OutOfMemory when it cannot fit even alone, CheckpointError when its image is corrupt, and whatever the source raises;
        in each case the model that was active still is.
        """
        started_s, before = self.clock(), self.active
        evicted: list[Resident] = []
        nbytes = 0
        if spec.model not in self.residents:
            try:
                nbytes = self._bring_in(spec, wanted, evicted)
            except BaseException:
                self._restore(before, evicted)
                raise
        self.active = spec.model
        self.popularity[spec.model] = self.popularity.get(spec.model, Popularity()).touched(self.clock())
        seconds = self.clock() - started_s
        if nbytes:
            self.bytes_per_s += 0.3 * (nbytes / max(seconds, 1e-6) - self.bytes_per_s)
        return Switch(source=before, target=spec.model, seconds=seconds, nbytes=nbytes, evicted=tuple(r.spec.model for r in evicted))

    def _bring_in(self, spec: ModelSpec, wanted: Collection[ModelName], evicted: list[Resident]) -> int:
        with self.source.fetch(spec.model) as image:
            manifest = ImageManifest.from_bytes(image.manifest)
            if manifest.digest != spec.digest:
                raise CheckpointError(
                    f"the weight image of {spec.model} has digest {manifest.digest}, not {spec.digest}; register it again"
                )
            span = self._reserve(manifest.nbytes, wanted, evicted)
            weights = self.arena.memory[span.offset : span.end]
            try:
                read_image(image.fd, self.arena.region.buffer[span.offset : span.end], 0, manifest.nbytes)
                if manifest.digest not in self._verified:
                    verify_image(manifest, weights)
                    self._verified.add(manifest.digest)
            except BaseException:
                self.arena.free_weights(span)
                raise
        self.residents[spec.model] = Resident(spec, manifest, span, weights)
        return int(manifest.nbytes)

    def _reserve(self, nbytes: int, wanted: Collection[ModelName], evicted: list[Resident]) -> Span:
        """A free range, after evictions if it must be; the active model leaves only when nothing else makes room."""
        plan = plan_eviction(self._view(wanted, lock_active=True), nbytes) or plan_eviction(self._view(wanted, lock_active=False), nbytes)
        if plan is None:
            raise OutOfMemory(
                f"a weight image of {nbytes} bytes does not fit beside pinned models into the {self.arena.weight_reserve_bytes} "
                "kept for weights; raise the pool's arena_bytes"
            )
        for model in plan.victims:
            evicted.append(self.residents[model])
            self.evict(model)
        return self.arena.place_weights(nbytes, plan.offset)

    def evict(self, model: ModelName) -> None:
        """Give back a resident's range. Its image stays in the host store."""
        resident = self.residents.pop(model)
        self.on_evict(resident)
        self.arena.free_weights(resident.span)
        if self.active == model:
            self.active = None

    def _restore(self, active: ModelName | None, evicted: Sequence[Resident]) -> None:
        """Bring the active model back if this switch evicted it; a failure here leaves no active model, and the next switch loads one."""
        if active is None or active in self.residents:
            return
        spec = next(r.spec for r in evicted if r.spec.model == active)
        with suppress(PolymuxError, OSError):
            self._bring_in(spec, (), [])
            self.active = active

    def _view(self, wanted: Collection[ModelName], *, lock_active: bool) -> ArenaView:
        now_s = self.clock()
        return ArenaView(
            start=0,
            end=self.arena.weight_reserve_bytes,  # past it KV may be wanted at any time, and nothing would evict weights for it
            residents=tuple(
                ResidentView(
                    model=model,
                    offset=resident.span.offset,
                    nbytes=resident.span.nbytes,
                    reload_s=resident.span.nbytes / self.bytes_per_s,
                    reuse_chance=self.popularity.get(model, Popularity()).chance(now_s),
                    has_work=model in wanted,
                    is_locked=resident.spec.is_pinned or (lock_active and model == self.active),
                )
                for model, resident in self.residents.items()
            ),
        )
