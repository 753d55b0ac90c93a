"""What the switch benchmarks run on: a weight store with its socket, and engines over arenas of any size."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.model_runner import ForwardBatch, SequenceSlice
from polymux.actors.store_client import StoreClient
from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.transport.messages import ModelSpec
from polymux.transport.region import Region
from polymux.transport.units import GIB, KIB, MIB, ModelName

MODELS = Path(__file__).parent.parent / "deploy" / "demo" / "models"
A, B = ModelName("a"), ModelName("b")


class Bench:
    """A store with its socket, and engines over arenas of any size."""

    def __init__(self, paths: dict[ModelName, Path], dtype: str) -> None:
        self._token = "bench-" + os.urandom(16).hex()
        self._store = StoreServer(budget_bytes=8 * GIB, layout="auto", token=self._token)
        self.specs: dict[ModelName, ModelSpec] = {
            model: self._store.register(ModelSource(model=model, path=str(path), dtype=dtype, max_model_len=256))
            for model, path in paths.items()
        }

    def engine(self, num_resident: int, kv_bytes: int = 64 * MIB) -> Engine:
        """Weights may borrow `kv_bytes` while no sequence holds them."""
        reserve = num_resident * max(spec.weight_bytes for spec in self.specs.values()) + 4 * KIB
        engine = Engine(Region.create(reserve + kv_bytes), EngineSettings(weight_reserve_bytes=reserve), self.client())
        for spec in self.specs.values():
            engine.add_model(spec)
        return engine

    def client(self) -> StoreClient:
        return StoreClient(self._store.address, self._token)

    def close(self) -> None:
        self._store.close()


def step(engine: Engine, model: ModelName) -> int:
    """One decode step of one sequence: the token."""
    pool = engine.pool(model)
    blocks = pool.allocate(1)
    cut = SequenceSlice(start=0, num_tokens=1, context_len=0, block_ids=blocks)
    logits = engine.forward(ForwardBatch(token_ids=torch.tensor([1]), slices=(cut,), logits_rows=None))
    pool.free(blocks)
    return int(logits.argmax())
