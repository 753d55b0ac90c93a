"""Instances whose ranks plan their steps and sum over NCCL, each rank a process: the tokens of one rank, and the end of a lost one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import stand_in
from planned_batches import KINDS, MODELS, NAMES, Batch, tokens_of
from rank_gpus import PROGRAM, RankGpu

from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.parallel.leader import Ranks, RankSettings
from polymux.actors.store_client import StoreClient
from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.kernels import choice
from polymux.transport.messages import ModelSpec, Shard
from polymux.transport.units import KIB, MIB, ModelName

TOKEN = "test-cluster-token-0123456789"
DEGREES = (1, 2, 4)

pytestmark = pytest.mark.skipif(stand_in.compiler() is None, reason="no C compiler for the GPU's stand-in")


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    with choice.override("all=torch"):
        yield


class Store:
    def __init__(self) -> None:
        self.server = StoreServer(budget_bytes=64 * MIB, layout="plain", token=TOKEN, kv_bytes=0)
        self.specs = {
            name: self.server.register(
                ModelSource(model=name, path=str(MODELS / name), dtype="float32", max_model_len=192, degrees=DEGREES)
            )
            for name in NAMES
        }


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.server.close()


@contextmanager
def instance(store: Store, num_ranks: int, *, device: RankGpu | None = None, timeout_s: float = 20.0, **engine: Any) -> Iterator[Engine]:
    """An engine of so many ranks; of one, a plain CPU's."""
    specs = [spec.on_ranks(num_ranks) for spec in store.specs.values()]
    reserve = sum(spec.weight_bytes for spec in specs) + MIB
    settings = EngineSettings(weight_reserve_bytes=reserve, slab_bytes=256 * KIB, max_num_seqs=6, **engine)
    nbytes = reserve + 4 * MIB
    device = device or RankGpu()
    ranks = None
    if num_ranks > 1:
        told = RankSettings(
            worker_id="w",
            num_ranks=num_ranks,
            arena_bytes=nbytes,
            weight_reserve_bytes=reserve,
            max_num_seqs=6,
            num_threads=1,
            batch_invariant=settings.batch_invariant,
            store_address=store.server.address,
            token=TOKEN,
            timeout_s=timeout_s,
        )
        ranks = Ranks(told, device=device, program=PROGRAM)
    source = StoreClient(store.server.address, TOKEN, Shard(rank=0, num_ranks=num_ranks))
    made = Engine(device.create(nbytes), settings, source, device=device, ranks=ranks)
    try:
        for spec in specs:
            made.add_model(spec)
        yield made
    finally:
        made.close()


def answers(engine: Engine, name: ModelName, kind: str, num_steps: int = 8, num_seqs: int = 3) -> list[list[int]]:
    params = [replace(KINDS[kind], seed=i) for i in range(num_seqs)]
    spec: ModelSpec = engine.specs[name]
    return tokens_of(Batch(engine, spec, params, runs_ahead=kind != "penalized").run(num_steps))


@pytest.fixture(scope="module")
def alone(store: Store) -> dict[tuple[ModelName, str], list[list[int]]]:
    """What one rank says."""
    with choice.override("all=torch"), instance(store, 1) as engine:
        return {(name, kind): answers(engine, name, kind) for name in NAMES for kind in ("greedy", "sampled", "penalized")}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_say_what_one_says_with_steps_that_run_ahead(num_ranks: int, store: Store, alone: dict[Any, Any]) -> None:
    device = RankGpu()
    with instance(store, num_ranks, device=device) as engine:
        found = {(name, kind): answers(engine, name, kind) for name in NAMES for kind in ("greedy", "sampled", "penalized")}
    assert found == alone
    assert device.graphs.num_replayed > 20
    assert stand_in.count("comms") == 0
