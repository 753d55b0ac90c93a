"""The demo's small models in a store without a socket, and engines over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.model_runner import ForwardBatch, SequenceSlice
from polymux.actors.weight_store import ModelSource, WeightStore
from polymux.actors.weights.load import cut
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, ModelName
from polymux.transport.weights import OpenImage

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
SMALL, OTHER = ModelName("llama-small"), ModelName("qwen3-small")


class Store:
    """The demo's store without its socket."""

    def __init__(self) -> None:
        self._store = WeightStore(budget_bytes=64 * MIB, layout="auto")
        self.specs = {
            model: replace(self._store.register(ModelSource(model=model, path=str(MODELS / model), dtype="float32")), max_model_len=64)
            for model in (SMALL, OTHER)
        }

    def fetch(self, model: ModelName) -> OpenImage:
        manifest, fd = self._store.open(model)
        return OpenImage(manifest, fd, self.specs[model].weight_bytes)

    def engine(self, *models: ModelName, kv_bytes: int = MIB) -> Engine:
        """One whose arena's reserve holds these models' weights at once."""
        reserve = -(-(sum(self.specs[model].weight_bytes for model in models) + 4 * KIB) // MIB) * MIB
        engine = Engine(Region.create(reserve + kv_bytes), EngineSettings(weight_reserve_bytes=reserve, slab_bytes=256 * KIB), self)
        for spec in self.specs.values():
            engine.add_model(spec)
        return engine


def logits_of(engine: Engine, on_layer: Callable[[int], None] | None = None) -> Tensor:
    """Of a short prompt, by the active model."""
    assert engine.residency.active is not None
    pool = engine.pool(engine.residency.active)
    blocks = pool.allocate(1)
    try:
        cut = SequenceSlice(start=0, num_tokens=5, context_len=0, block_ids=blocks)
        return engine.forward(ForwardBatch(token_ids=torch.tensor([3, 1, 4, 1, 5]), slices=(cut,), logits_rows=None), on_layer)
    finally:
        pool.free(blocks)


def num_pieces(store: Store, model: ModelName) -> int:
    engine = store.engine(model)
    engine.activate(model)
    manifest = engine.residency.residents[model].manifest
    engine.close()
    return len(cut(manifest, 4 * KIB))
