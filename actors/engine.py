"""The engine: models in one arena, one active at a time, stepped batch by batch. A plain class, driven by one thread.

It knows no roles and no network: the prefill and the decode role (`prefill.py`, `decode.py`) decide what to step and where tokens go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from polymux.actors.arena import Arena
from polymux.actors.device import DEVICES, CpuDevice, Device
from polymux.actors.drawn import Ask, Drawn, Known, draw_later
from polymux.actors.kv_blocks import BlockManager, BlockPool, kv_view
from polymux.actors.model_runner import ForwardBatch, Model, ModelRunner, SequenceSlice, plan_on
from polymux.actors.models.decoder import OnLayer
from polymux.actors.parallel.leader import Ranks
from polymux.actors.parallel.weights import RankDevice, RankLoader
from polymux.actors.prefix_cache import PrefixCache
from polymux.actors.sampler import sample_each
from polymux.actors.weights.load import ImageSource
from polymux.actors.weights.loader import Loader
from polymux.actors.weights.residency import Residency, Switch
from polymux.disagg.eviction import plan_release
from polymux.disagg.views import CachedView
from polymux.transport.errors import ConfigError, ModelNotFound, PolymuxError, RankLost
from polymux.transport.messages import ModelSpec
from polymux.transport.region import Region
from polymux.transport.units import ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine may use, and how it computes."""

    weight_reserve_bytes: int  # of the arena, never given to KV
    slab_bytes: int | None = None  # None: from the arena's size
    max_num_seqs: int = 64  # sequences in one decode step
    max_num_batched_tokens: int = 512  # prompt tokens in one prefill step
    batch_invariant: bool = False
    device: str = "cpu"  # or "cuda": the one GPU that this process sees
    prefix_caching: bool = True  # full blocks stay after their sequence, for prompts that begin alike

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.device not in DEVICES:
            raise ConfigError(f"device={self.device!r} is not one of {', '.join(DEVICES)}")


class Reclaimer(Protocol):
    """Holds KV of the arena for work that may come: a prefix cache."""

    @property
    def num_bytes(self) -> int:
        """In slabs that it could give back now."""

    def value(self) -> float:
        """Expected seconds that the least valuable of those slabs saves, a byte."""

    def release(self, nbytes: int) -> int:
        """Give slabs of at least so many bytes back to the arena, the least valuable first. How many bytes they were."""


class Engine:
    """Not thread-safe: its worker's engine thread calls everything here."""

    def __init__(
        self,
        region: Region,
        settings: EngineSettings,
        source: ImageSource,
        clock: Callable[[], float] = time.monotonic,
        device: Device | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`region` is the device's; without one, a CPU's. `ranks`: the others of this instance, whose rank 0 this is; closed with it."""
        self.settings = settings
        self.clock = clock
        self.device = device or CpuDevice()
        self._ranks = ranks
        if ranks is not None:
            self.device = RankDevice(self.device, ranks, region)
        self.arena = Arena(region, weight_reserve_bytes=settings.weight_reserve_bytes, slab_bytes=settings.slab_bytes, device=self.device)
        self.blocks = BlockManager(self.arena)
        self.prefixes = PrefixCache(self.blocks, clock, is_enabled=settings.prefix_caching)
        make_loader = partial(RankLoader, ranks) if ranks is not None else Loader
        self.residency = Residency(self.arena, source, clock, on_leave=self._unbind, make_loader=make_loader)
        self.reclaimers: list[Reclaimer] = [self.prefixes]  # who else keeps bytes that may save work
        self.arena.make_way = self._make_way
        self.specs: dict[ModelName, ModelSpec] = {}
        self._runner = ModelRunner(
            batch_invariant=settings.batch_invariant,
            device=self.device.torch_device,
            collectives=ranks.collectives if ranks is not None else None,
            planned=plan_on(self.device, max_num_seqs=settings.max_num_seqs, batch_invariant=settings.batch_invariant),
        )
        self._bound: dict[ModelName, Model] = {}
        self.stalled_s = 0.0  # of the last forward pass: waiting for weights under way
        self.is_streaming = False  # the last forward pass waits for them on the device: its time is not its own

    def add_model(self, spec: ModelSpec) -> None:
        """Make a model known. Raises ConfigError when it could never run in this arena."""
        if spec.weight_bytes > self.arena.weight_reserve_bytes:
            raise ConfigError(
                f"models.{spec.model}: its weights take {spec.weight_bytes} bytes and the arena keeps "
                f"{self.arena.weight_reserve_bytes} for weights; raise the pool's `arena`"
            )
        pool = self.blocks.pool(spec.kv)
        if pool.max_blocks < spec.kv.num_blocks(spec.max_model_len):
            raise ConfigError(
                f"models.{spec.model}: max_model_len={spec.max_model_len} needs {spec.kv.num_blocks(spec.max_model_len)} KV blocks and "
                f"the arena holds {pool.max_blocks}; lower max_model_len or raise the pool's `arena`"
            )
        self._runner.prepare(spec.dtype)
        self.specs[spec.model] = spec

    def spec(self, model: ModelName) -> ModelSpec:
        try:
            return self.specs[model]
        except KeyError:
            raise ModelNotFound(f"model {model!r} is not known to this worker", param="model") from None

    def pool(self, model: ModelName) -> BlockPool:
        return self.blocks.pool(self.spec(model).kv)

    def activate(self, model: ModelName, wanted: Collection[ModelName] = ()) -> Switch | None:
        """Make `model` the active one, as soon as its first layer can run; None when it already was.

        Raises as `Residency.switch`, the former model then still active.
        """
        if self.residency.active == model:
            return None
        return self.residency.switch(self.spec(model), wanted=wanted)

    def prefetch(self, model: ModelName | None, wanted: Collection[ModelName] = ()) -> bool:
        """Begin to load the model that is likely to be active next, in the background; nothing is waited for.

        False when there is none, when it is resident or on its way, or when others' weights are worth more than the time it would save.
        """
        return model is not None and model in self.specs and self.residency.prefetch(self.specs[model], wanted=wanted)

    def forward(self, batch: ForwardBatch, on_layer: OnLayer = None) -> Tensor:
        """Step the active model: fp32 logits [R, vocab]. Layers still on their way are waited for one by one.

        Raises PolymuxError when no model is active, and what a load under way met; the model before is active again then.
        """
        active, model, before_layer = self._ready()
        if self._ranks is None:
            return model.forward(batch, on_layer, before_layer)
        return self._ranks.step(active, batch, lambda: model.forward(batch, on_layer, before_layer))

    def _ready(self) -> tuple[ModelName, Model, OnLayer]:
        """The active model, and what to call before each of its layers while some are on their way."""
        active, self.stalled_s = self.residency.active, 0.0
        if active is None:
            raise PolymuxError("no model is active: the last switch failed")
        before_layer = None if self.residency.residents[active].load is None else self._await_layer
        self.is_streaming = self.device.is_async and before_layer is not None
        return active, self._bind(active), before_layer

    @property
    def lost(self) -> RankLost | None:
        """Why this engine will never compute again: a rank is gone. Safe from any thread."""
        return self._ranks.lost if self._ranks is not None else None

    def copy_kv(self, model: ModelName, source_ids: Sequence[int], target_ids: Sequence[int], layers: range) -> None:
        """Copy layers of blocks to others, on every rank. A block that is its own target stays as it is."""
        layout = self.spec(model).kv
        others = self._ranks.memories if self._ranks is not None else ()
        for kv in (kv_view(memory, layout) for memory in (self.arena.memory, *others)):
            for source, target in zip(source_ids, target_ids, strict=True):
                if source != target:
                    kv[target, layers.start : layers.stop] = kv[source, layers.start : layers.stop]

    def decode(self, batch: ForwardBatch, asks: Sequence[Ask], on_layer: OnLayer = None) -> Drawn:
        """Step the active model, and draw a token for each row of its logits. Raises as `forward`.

        Where the device is asynchronous nothing was waited for but weights: the next step may take these tokens before they are read.
        """
        if self.device.graphs is not None and batch.logits_rows is None:
            active, model, before_layer = self._ready()
            if self._ranks is None:
                drawn = model.decode(batch, asks, before_layer)
            else:
                drawn = self._ranks.decode(active, batch, partial(model.decode, batch, asks, before_layer))
            if drawn is not None:
                return drawn
        return self.draw(self.forward(batch, on_layer), asks)

    def draw(self, logits: Tensor, asks: Sequence[Ask]) -> Drawn:
        """A token for each row of logits [R, V] fp32."""
        if self.device.is_async and asks:
            return draw_later(logits, asks, self.device)
        return Known(sample_each(logits, [ask.state for ask in asks]) if asks else ())

    def _await_layer(self, layer: int) -> None:
        self.stalled_s += self.residency.await_layer(layer)

    def probe(self) -> bool:
        """One token through the active model, in a block of its own: does it still compute? True when there is nothing to probe with."""
        active = self.residency.active
        if active is None or not self.pool(active).num_free:
            return True
        blocks = self.pool(active).allocate(1)
        try:
            token = SequenceSlice(start=0, num_tokens=1, context_len=0, block_ids=blocks)
            logits = self.forward(ForwardBatch(token_ids=torch.zeros(1, dtype=torch.int64), slices=(token,), logits_rows=None))
            return bool(torch.isfinite(logits).all())
        finally:
            self.pool(active).free(blocks)

    def _make_way(self, offset: int) -> None:
        """KV wants a slab where weights lie: whoever's bytes are worth least gives some, cached KV or the models past the reserve."""
        caches = {f"cache {i}": reclaimer for i, reclaimer in enumerate(self.reclaimers)}
        views = [CachedView(holder=name, nbytes=one.num_bytes, value=one.value()) for name, one in caches.items()]
        for holder, nbytes in plan_release([*views, *self.residency.borrowed()], self.arena.slab_bytes):
            if holder not in caches:
                break
            if caches[holder].release(nbytes) >= self.arena.slab_bytes:
                return
        self.residency.vacate(offset)

    def _bind(self, model: ModelName) -> Model:
        """The model over its weights' present place; anew where a failed switch had evicted it and brought it back."""
        if model not in self._bound:
            resident = self.residency.residents[model]
            self._bound[model] = self._runner.bind(resident.manifest, resident.weights, self.pool(model).kv)
        return self._bound[model]

    def _unbind(self, model: ModelName) -> None:
        self._bound.pop(model, None)
        if self._ranks is not None and model not in self.residency.residents:  # else it only moved
            self._ranks.drop(model)

    def close(self) -> None:
        if self._ranks is not None:
            if self._ranks.lost is None:
                with suppress(RankLost):  # one that is found out only now
                    self.device.mark().wait()  # what is in the queue may still be at the other ranks' memory
            self._ranks.close()
        self.residency.close()
        self._bound.clear()
        self._runner.forget()
        self.device.close()
        self.arena.close()
