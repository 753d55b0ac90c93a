"""Which weights are in the arena, and what they leave to KV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.store_client import StoreClient
from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.transport.messages import ModelSpec
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, ModelName

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
NAMES = ("llama-small", "qwen3-small", "llama-again")
TOKEN = "test-cluster-token-0123456789"


@pytest.fixture
def store() -> Iterator[StoreServer]:
    torch.set_num_threads(1)
    server = StoreServer(budget_bytes=64 * MIB, layout="auto", token=TOKEN)
    yield server
    server.close()


def specs_of(store: StoreServer) -> list[ModelSpec]:
    return [
        store.register(ModelSource(model=ModelName(name), path=str(MODELS / name.replace("again", "small")), max_model_len=64))
        for name in NAMES
    ]


def test_weights_never_take_the_memory_that_kv_needs(store: StoreServer) -> None:
    specs = specs_of(store)
    reserve = specs[0].weight_bytes + specs[1].weight_bytes + 512
    settings = EngineSettings(weight_reserve_bytes=reserve, slab_bytes=128 * KIB)
    engine = Engine(Region.create(reserve + 4 * MIB), settings, StoreClient(store.address, TOKEN))
    for spec in specs:
        engine.add_model(spec)
    num_slabs = engine.arena.num_free_slabs
    assert num_slabs >= 31
    for spec in specs * 2:
        engine.activate(spec.model)
        assert engine.arena.num_free_slabs == num_slabs
        assert engine.arena.weights_end <= reserve
        assert len(engine.residency.residents) <= 2
        engine.arena.check()
    engine.close()
