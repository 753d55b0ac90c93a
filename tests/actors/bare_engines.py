"""Engines without weights, for tests of who gets blocks, and sequences for them."""

from __future__ import annotations

from typing import Any

import torch
from rank_memories import RankMemories

from polymux.actors.engine import Engine, EngineSettings
from polymux.transport.errors import PolymuxError
from polymux.transport.messages import Generate, KVLayout, ModelSpec, Peer, SamplingParams
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, Epoch, ModelName, SequenceId, WorkerId, pack_ids

A, B = ModelName("a"), ModelName("b")
LAYOUTS = {
    A: KVLayout(num_layers=1, num_kv_heads=1, head_dim=128, dtype="float32"),
    B: KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32"),
}
PEER = Peer(worker_id=WorkerId("prefill-0"), epoch=Epoch(1), address="tcp://127.0.0.1:1", host_id="here")


def spec_of(model: ModelName) -> ModelSpec:
    return ModelSpec(
        model=model,
        path="",
        digest=model,
        config_json="{}",
        dtype="float32",
        kv=LAYOUTS[model],
        weight_bytes=MIB,
        vocab_size=100,
        max_model_len=128,
        eos_token_ids=(),
    )


class NoWeights:
    def fetch(self, model: ModelName) -> Any:
        raise PolymuxError("no weights here")


def engine_of(num_slabs: int, num_ranks: int = 1) -> Engine:
    """Of several ranks, the others' are memories alone."""
    torch.set_num_threads(1)
    nbytes = MIB + num_slabs * 64 * KIB
    settings = EngineSettings(weight_reserve_bytes=MIB, slab_bytes=64 * KIB)
    ranks = RankMemories(nbytes, num_ranks) if num_ranks > 1 else None
    engine = Engine(Region.create(nbytes), settings, NoWeights(), ranks=ranks)
    for model in LAYOUTS:
        engine.specs[model] = spec_of(model)
    return engine


def generate(sequence_id: str, model: ModelName, num_tokens: int) -> Generate:
    return Generate(
        sequence_id=SequenceId(sequence_id),
        model=model,
        prompt_ids=pack_ids([1] * num_tokens),
        output_ids=b"",
        sampling=SamplingParams(max_tokens=8),
        prefill=PEER,
        deadline_s=60.0,
        tpot_slo_s=0.1,
        due_in_s=10.0,
    )
