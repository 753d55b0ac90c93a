"""Twelve models on workers that hold three: every answer is, to the bit, what an engine gives that holds only that model.

Front door, controller, workers and store are the real ones in one process; requests come by a Zipf popularity at Poisson times.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.model_runner import ForwardBatch, SequenceSlice
from polymux.actors.sampler import SamplerState, sample
from polymux.actors.store_client import StoreClient
from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.cluster.config import ClusterConfig
from polymux.cluster.local import LocalCluster
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.generation import Envelope, Generation, SequencePlan
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.transport.messages import ModelSpec, SamplingParams
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, ClientId, ModelName, pack_ids

CHECKPOINTS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
FAMILIES = ("llama-small", "llama-large", "qwen3-small", "qwen3-large")
TOKEN = "test-cluster-token-0123456789"
NUM_REQUESTS = 200
MEAN_GAP_S = 0.02
MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class Ask:
    number: int
    at_s: float
    model: ModelName
    prompt: tuple[int, ...]
    sampling: SamplingParams


def variant_of(family: str, seed: int, folder: Path) -> Path:
    """The same network with other weights: each tensor shaken by a twentieth of its spread."""
    shutil.copytree(CHECKPOINTS / family, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in folder.glob("*.safetensors"):
        weights = {
            name: (w.float() + 0.05 * w.float().std() * torch.randn(w.shape, generator=generator)).to(w.dtype)
            for name, w in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Twelve names: each demo checkpoint twice, and a variant of each with weights of its own."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("variants")
    paths = {f"{family}-{copy}": str(CHECKPOINTS / family) for family in FAMILIES for copy in "ab"}
    return paths | {f"{family}-v": str(variant_of(family, i, folder / family)) for i, family in enumerate(FAMILIES)}


def asks_of(names: Sequence[str], vocab_size: int, *, num: int, seed: int, stem: int = 0, max_tokens: int = 24) -> list[Ask]:
    """`stem`: tokens with which all prompts of a model begin. Every other request is sampled."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    stems = {name: [rng.randrange(8, vocab_size) for _ in range(stem)] for name in names}
    asks, at_s = [], 0.0
    for i in range(num):
        at_s += rng.expovariate(1 / MEAN_GAP_S)
        name = rng.choices(names, weights)[0]
        prompt = stems[name] + [rng.randrange(8, vocab_size) for _ in range(rng.randrange(5, 60))]
        sampling = SamplingParams(
            max_tokens=rng.randrange(max_tokens // 2, max_tokens + 1),
            temperature=0.9 if i % 2 else 0.0,
            top_p=0.95,
            seed=i,
            ignore_eos=True,
            repetition_penalty=1.1 if i % 3 == 0 else 1.0,
        )
        asks.append(Ask(i, at_s, ModelName(name), tuple(prompt), sampling))
    return asks


class Alone:
    """An engine for one model at a time, and nothing else: no neighbours, no chunks, no cache of prefixes."""

    def __init__(self, catalogue: dict[str, str]) -> None:
        self._catalogue = catalogue
        self._answers: dict[tuple[str, tuple[int, ...], SamplingParams], list[int]] = {}

    def answers(self, asks: Sequence[Ask]) -> list[list[int]]:
        for model in sorted({ask.model for ask in asks}):
            missing = [ask for ask in asks if ask.model == model and (model, ask.prompt, ask.sampling) not in self._answers]
            if missing:
                self._serve(model, missing)
        return [self._answers[ask.model, ask.prompt, ask.sampling] for ask in asks]

    def _serve(self, model: ModelName, asks: Sequence[Ask]) -> None:
        store = StoreServer(budget_bytes=64 * MIB, layout="auto", token=TOKEN, kv_bytes=0)
        spec = store.register(ModelSource(model=model, path=self._catalogue[model], max_model_len=MAX_MODEL_LEN))
        reserve = spec.weight_bytes + MIB
        settings = EngineSettings(weight_reserve_bytes=reserve, slab_bytes=512 * KIB, batch_invariant=True, prefix_caching=False)
        engine = Engine(Region.create(reserve + 8 * MIB), settings, StoreClient(store.address, TOKEN))
        try:
            engine.add_model(spec)
            engine.activate(model)
            for ask in asks:
                self._answers[model, ask.prompt, ask.sampling] = generate_alone(engine, spec, ask)
        finally:
            engine.close()
            store.close()


def generate_alone(engine: Engine, spec: ModelSpec, ask: Ask) -> list[int]:
    output: list[int] = []
    state = SamplerState(ask.sampling, list(ask.prompt), output, spec.eos_token_ids, spec.vocab_size)
    pool = engine.pool(spec.model)
    blocks = pool.allocate(spec.kv.num_blocks(len(ask.prompt) + ask.sampling.max_tokens))
    rows, num_cached = list(ask.prompt), 0
    for _ in range(ask.sampling.max_tokens):
        part = SequenceSlice(start=0, num_tokens=len(rows), context_len=num_cached, block_ids=blocks)
        logits = engine.forward(ForwardBatch(token_ids=torch.tensor(rows), slices=(part,), logits_rows=torch.tensor([len(rows) - 1])))
        num_cached += len(rows)
        token = sample(logits, [state])[0].token_id
        output.append(token)
        state.append(token)
        rows = [token]
    pool.free(blocks)
    return output


@pytest.fixture(scope="module")
def alone(catalogue: dict[str, str]) -> Iterator[Alone]:
    yield Alone(catalogue)


class Stack:
    """The cluster behind a front door."""

    def __init__(self, cluster: LocalCluster, frontdoor: FrontDoor) -> None:
        self.cluster = cluster
        self._frontdoor = frontdoor

    async def answer(self, ask: Ask, pace: float = 1.0) -> list[int]:
        await asyncio.sleep(ask.at_s * pace)
        loaded = await self._frontdoor.model(ask.model)
        plan = SequencePlan(prompt_ids=pack_ids(ask.prompt), num_prompt_tokens=len(ask.prompt), sampling=ask.sampling)
        generation = Generation(
            envelope=Envelope(request_id=f"r{ask.number}", public_id="", timeout_s=120.0),
            model=ask.model,
            sequences=(plan,),
            choices_per_prompt=1,
            num_prompt_tokens=len(ask.prompt),
        )
        async with self._frontdoor.open(generation, loaded.tokenizer) as request:
            while not request.is_finished:
                await request.news()
            return list(request.choices[0].output_ids)

    def counter(self, name: str) -> float:
        return sum(dict(worker.report().counters).get(name, 0.0) for worker in self.cluster.workers)

    async def check_whole(self) -> None:
        """Nothing runs, no block is out in either tier, and the books agree."""
        memories = [w._engine.blocks for w in self.cluster.workers] + [w._tier.blocks for w in self.cluster.workers if w._tier is not None]
        async with asyncio.timeout(20):
            while any(blocks.num_out for blocks in memories):
                await asyncio.sleep(0.02)
        for blocks in memories:
            blocks.check()
        self.cluster.controller.check()


def room_for_three(catalogue: dict[str, str]) -> int:
    """Of the largest: images are little larger than checkpoints."""
    sizes = sorted(Path(path, "model.safetensors").stat().st_size for path in catalogue.values())
    return sum(sizes[-3:]) * 5 // 4


@asynccontextmanager
async def serving(
    catalogue: dict[str, str], *, num_decode: int = 1, kv_bytes: int = 24 * MIB, split: str = "fixed", **engine: Any
) -> AsyncIterator[Stack]:
    """One prefill worker and `num_decode` decode workers, each with room for three models."""
    reserve = room_for_three(catalogue)
    arena = {"workers": 1, "arena_bytes": reserve + kv_bytes, "num_threads": 1}
    config = ClusterConfig.from_dict(
        {
            "models": [{"name": name, "path": path, "max_model_len": MAX_MODEL_LEN} for name, path in catalogue.items()],
            "pools": {"prefill": arena, "decode": {**arena, "workers": num_decode}, "split": split},
            "engine": {"batch_invariant": True, "kv_fraction": kv_bytes / (reserve + kv_bytes), "slab_bytes": 256 * KIB, **engine},
            "store": {"budget_bytes": 64 * MIB, "kv_bytes": 32 * MIB},
            "liveness": {"report_interval_s": 0.1, "worker_lease_s": 20.0},
            "limits": {"ttft_refusal_factor": None},
        }
    )
    async with LocalCluster(config) as cluster:
        frontdoor = FrontDoor(
            FrontDoorSettings(client_id=ClientId("front-0"), token=config.security.cluster_token, drain_timeout_s=5.0), cluster
        )
        await frontdoor.start()
        try:
            yield Stack(cluster, frontdoor)
        finally:
            await frontdoor.aclose()


def vocab_size(catalogue: dict[str, str]) -> int:
    return min(int(json.loads(Path(path, "config.json").read_text())["vocab_size"]) for path in catalogue.values())


async def test_two_hundred_requests_to_twelve_models_get_what_each_model_gives_alone(catalogue: dict[str, str], alone: Alone) -> None:
    asks = asks_of(sorted(catalogue), vocab_size(catalogue), num=NUM_REQUESTS, seed=1)
    async with serving(catalogue) as stack:
        answers = await asyncio.gather(*(stack.answer(ask) for ask in asks))
        assert stack.counter("model_loads") > len(catalogue), "they did not share too small a memory"
        assert stack.counter("kv_transfers_committed") >= NUM_REQUESTS
        await stack.check_whole()
    assert answers == await asyncio.to_thread(alone.answers, asks)


async def test_the_same_while_kv_is_swapped_to_host_memory_mid_answer(catalogue: dict[str, str], alone: Alone) -> None:
    asks = asks_of(sorted(catalogue), vocab_size(catalogue), num=40, seed=2, max_tokens=160)
    async with serving(catalogue, kv_bytes=3 * MIB, prefix_caching=False) as stack:
        answers = await asyncio.gather(*(stack.answer(ask, pace=0.0) for ask in asks))
        assert stack.counter("swap_outs") > 0 and stack.counter("swap_ins") > 0
        await stack.check_whole()
    assert answers == await asyncio.to_thread(alone.answers, asks)


async def test_the_same_while_batches_move_between_workers_mid_answer(catalogue: dict[str, str], alone: Alone) -> None:
    asks = asks_of(sorted(catalogue), vocab_size(catalogue), num=40, seed=3, max_tokens=60)
    async with serving(catalogue, num_decode=2) as stack:
        serving_all = asyncio.gather(*(stack.answer(ask) for ask in asks))
        decodes = [worker for worker in stack.cluster.workers if worker.settings.role == "decode"]
        for i in range(1000):
            if serving_all.done():
                break
            decodes[i % 2].move()
            await asyncio.sleep(0.15)
        answers = await serving_all
        assert stack.counter("sequences_moved") > 0
        await stack.check_whole()
    assert answers == await asyncio.to_thread(alone.answers, asks)


async def test_the_same_with_prompts_that_begin_alike(catalogue: dict[str, str], alone: Alone) -> None:
    asks = asks_of(sorted(catalogue), vocab_size(catalogue), num=60, seed=4, stem=100)
    async with serving(catalogue) as stack:
        answers = await asyncio.gather(*(stack.answer(ask) for ask in asks))
        assert stack.counter("prefix_cache_hits") > 60 * 40
        await stack.check_whole()
    assert answers == await asyncio.to_thread(alone.answers, asks)


async def test_the_same_where_every_worker_does_both_phases(catalogue: dict[str, str], alone: Alone) -> None:
    asks = asks_of(sorted(catalogue), vocab_size(catalogue), num=60, seed=5)
    async with serving(catalogue, split="shared") as stack:
        answers = await asyncio.gather(*(stack.answer(ask) for ask in asks))
        assert stack.counter("kv_transfers_committed") <= stack.counter(
            "sequences_moved"
        )  # on a slow machine a late worker gives some away
        await stack.check_whole()
    assert answers == await asyncio.to_thread(alone.answers, asks)
