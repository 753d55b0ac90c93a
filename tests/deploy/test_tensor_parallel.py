"""`tensor_parallel` in a pool: the same answers over HTTP, and a worker that loses a rank is replaced while its clients wait."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from polymux.cluster.config import ClusterConfig
from polymux.cluster.local import LocalCluster
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.transport.errors import ConfigError
from polymux.transport.units import MIB, ClientId

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
NAMES = ("llama-small", "qwen3-small")


def config_of(prefill_ranks: int, decode_ranks: int, *names: str) -> ClusterConfig:
    torch.set_num_threads(1)
    models = [{"name": name, "path": str(MODELS / name), "dtype": "float32", "max_model_len": 256} for name in names or NAMES]
    pool = {"arena_bytes": 24 * MIB, "num_threads": 1}
    return ClusterConfig.from_dict(
        {
            "models": models,
            "pools": {"prefill": {**pool, "tensor_parallel": prefill_ranks}, "decode": {**pool, "tensor_parallel": decode_ranks}},
            "engine": {"rank_timeout_s": 5.0},
            "liveness": {"report_interval_s": 0.1, "worker_lease_s": 10.0},
        }
    )


@asynccontextmanager
async def serving(config: ClusterConfig) -> AsyncIterator[tuple[LocalCluster, httpx.AsyncClient]]:
    async with LocalCluster(config) as cluster:
        settings = FrontDoorSettings(client_id=ClientId("front-0"), token=config.security.cluster_token, drain_timeout_s=5.0)
        frontdoor = FrontDoor(settings, cluster)
        await frontdoor.start()
        transport = httpx.ASGITransport(build_asgi(frontdoor))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=90) as client:
            try:
                yield cluster, client
            finally:
                await frontdoor.aclose()


async def text(client: httpx.AsyncClient, number: int, max_tokens: int = 40) -> str:
    body: dict[str, Any] = {
        "model": NAMES[number % 2],
        "prompt": f"{number}. Once upon a time there was a little girl named",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def test_a_pool_of_two_ranks_answers_as_one_and_survives_the_loss_of_a_rank() -> None:
    async with serving(config_of(1, 1)) as (_, client):
        expected = [await text(client, i) for i in range(4)]
    async with serving(config_of(2, 1)) as (cluster, client):
        assert await asyncio.gather(*(text(client, i) for i in range(4))) == expected
        topology = (await client.get("/v1/polymux/topology")).json()
        assert {worker["worker_id"]: worker["num_ranks"] for worker in topology["workers"]} == {"prefill-0": 2, "decode-0": 1}
        assert {worker["arena_bytes"] for worker in topology["workers"]} == {48 * MIB, 24 * MIB}
        (ranks,) = [worker._ranks for worker in cluster.workers if worker._ranks is not None]
        os.kill(ranks.pids[0], signal.SIGKILL)
        assert await asyncio.gather(*(text(client, i) for i in range(4))) == expected
        workers = cluster.controller.topology().workers
        assert sorted((w.worker_id, w.num_ranks, w.state) for w in workers if w.state != "lost") == [
            ("decode-0", 1, "alive"),
            ("prefill-0", 2, "alive"),
        ]


async def test_a_model_that_ranks_cannot_share_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="num_heads=4"):
        async with serving(config_of(3, 1, NAMES[0])):
            pass
