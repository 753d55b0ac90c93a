"""The whole cluster in one process: it comes up with real checkpoints, shows what it is, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polymux.cluster.config import ClusterConfig, LivenessConfig, ModelConfig, PoolConfig, PoolsConfig
from polymux.cluster.local import LocalCluster
from polymux.transport.errors import CheckpointError, ConfigError
from polymux.transport.units import MIB

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
NAMES = ("llama-small", "qwen3-small")


def model(name: str, path: Path | None = None) -> ModelConfig:
    return ModelConfig(name=name, path=str(path or MODELS / name), dtype="float32", max_model_len=128)


def config_for(*models: ModelConfig, arena_bytes: int = 48 * MIB) -> ClusterConfig:
    torch.set_num_threads(1)
    pool = PoolConfig(arena_bytes=arena_bytes, num_threads=1)
    liveness = LivenessConfig(report_interval_s=0.05, worker_lease_s=5.0)
    return ClusterConfig(models=models, pools=PoolsConfig(prefill=pool, decode=pool), liveness=liveness)


@pytest.fixture(autouse=True)
def threads_of_others() -> Iterator[None]:
    """Those that were there before the test are not this cluster's."""
    global _known
    _known = frozenset(threading.enumerate())
    yield


_known: frozenset[threading.Thread] = frozenset()


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("polymux") and thread not in _known]


async def test_it_shows_its_workers_and_models_and_leaves_no_thread() -> None:
    async with LocalCluster(config_for(*map(model, NAMES))) as cluster:
        topology = await cluster.topology()
        assert [worker["worker_id"] for worker in topology["workers"]] == ["decode-0", "prefill-0"]
        assert {worker["role"] for worker in topology["workers"]} == {"prefill", "decode"}
        assert [spec.model for spec in await cluster.models()] == list(NAMES)
        assert all(set(worker._engine.specs) == set(NAMES) for worker in cluster.workers)
        assert topology["stats"]["num_workers_alive"] == 2 and topology["stats"]["num_blocks_out"] == 0
    assert cluster.workers == [] and engine_threads() == []
    await cluster.stop()


async def test_a_model_added_while_it_runs_is_known_to_all() -> None:
    async with LocalCluster(config_for(model(NAMES[0]))) as cluster:
        await cluster.add_model(model(NAMES[1]))
        with pytest.raises(ConfigError, match="another name"):
            await cluster.add_model(model(NAMES[0], MODELS / NAMES[1]))
        with pytest.raises(CheckpointError):
            await cluster.add_model(model("absent", MODELS / "absent"))
        assert [spec.model for spec in await cluster.models()] == list(NAMES)
        assert all(set(worker._engine.specs) == set(NAMES) for worker in cluster.workers)


async def test_a_worker_whose_engine_ends_is_replaced() -> None:
    async with LocalCluster(config_for(model(NAMES[0]))) as cluster:
        dead = cluster.workers[1]
        dead._probe = lambda: False  # type: ignore[method-assign]
        dead._pause_s = lambda: 0.001  # type: ignore[method-assign]
        dead._mailbox.wake()
        async with asyncio.timeout(20):
            while len(cluster.workers) < 2 or cluster.workers[1] is dead:
                await asyncio.sleep(0.02)
        assert cluster.workers[1]._epoch > dead._epoch


async def test_an_arena_that_is_too_small_ends_the_start_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"arena_bytes=.* raise it to"):
        await LocalCluster(config_for(model(NAMES[0]), arena_bytes=2 * MIB)).start()
    assert engine_threads() == []


async def test_a_stop_during_the_start_leaves_no_thread() -> None:
    cluster = LocalCluster(config_for(model(NAMES[0])))
    starting = asyncio.create_task(cluster.start())
    await asyncio.sleep(0.1)
    await cluster.stop()
    await asyncio.gather(starting, return_exceptions=True)
    assert cluster.workers == [] and engine_threads() == []
