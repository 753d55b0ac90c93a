"""Engines of several ranks without roles, over the demo's small models: each other rank is a process that runs a test's own program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from polymux.actors.device import Device
from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.parallel.leader import Ranks, RankSettings
from polymux.actors.store_client import StoreClient
from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.transport.messages import Shard
from polymux.transport.units import KIB, MIB

from .planned_batches import MODELS, NAMES

TOKEN = "test-cluster-token-0123456789"


class RankStore:
    """Has the models' images for every rank of these degrees."""

    def __init__(self, degrees: tuple[int, ...]) -> None:
        self.server = StoreServer(budget_bytes=64 * MIB, layout="plain", token=TOKEN, kv_bytes=0)
        self.specs = {
            name: self.server.register(
                ModelSource(model=name, path=str(MODELS / name), dtype="float32", max_model_len=192, degrees=degrees)
            )
            for name in NAMES
        }


@contextmanager
def rank_engine(
    store: RankStore, num_ranks: int, device: Device, program: Sequence[str], *, timeout_s: float, **engine: Any
) -> Iterator[Engine]:
    """One of so many ranks, of which `device` is the first's. `engine`: its settings, other than those that fit the models."""
    specs = [spec.on_ranks(num_ranks) for spec in store.specs.values()]
    reserve = sum(spec.weight_bytes for spec in specs) + MIB
    settings = EngineSettings(weight_reserve_bytes=reserve, slab_bytes=256 * KIB, max_num_seqs=6, **engine)
    nbytes, ranks = reserve + 4 * MIB, None
    device.enter()
    if num_ranks > 1:
        told = RankSettings(
            worker_id="w",
            num_ranks=num_ranks,
            device=settings.device,
            arena_bytes=nbytes,
            weight_reserve_bytes=reserve,
            max_num_seqs=settings.max_num_seqs,
            num_threads=1,
            batch_invariant=settings.batch_invariant,
            store_address=store.server.address,
            token=TOKEN,
            timeout_s=timeout_s,
        )
        ranks = Ranks(told, device=device, program=program)
    source = StoreClient(store.server.address, TOKEN, Shard(rank=0, num_ranks=num_ranks))
    made = Engine(device.create(nbytes), settings, source, device=device, ranks=ranks)
    try:
        for spec in specs:
            made.add_model(spec)
        yield made
    finally:
        made.close()
