"""Front door, controller and real workers in one process: requests go on while their workers are emptied and change roles."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
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
from polymux.disagg.roles import AutoSplit
from polymux.transport.errors import DeadlineExceeded, InvalidRequest
from polymux.transport.units import MIB, ClientId, WorkerId

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
NAMES = ("llama-small", "qwen3-small")


def config_of(num_prefill: int, num_decode: int, *, split: str = "fixed", tpot_slo_s: float = 0.1) -> ClusterConfig:
    torch.set_num_threads(1)
    return ClusterConfig.from_dict(
        {
            "models": [
                {"name": name, "path": str(MODELS / name), "dtype": "float32", "max_model_len": 512, "tpot_slo_s": tpot_slo_s}
                for name in NAMES
            ],
            "pools": {
                "prefill": {"workers": num_prefill, "arena_bytes": 48 * MIB, "num_threads": 1},
                "decode": {"workers": num_decode, "arena_bytes": 48 * MIB, "num_threads": 1},
                "split": split,
            },
            "engine": {"batch_invariant": True},
            "liveness": {"report_interval_s": 0.1, "worker_lease_s": 10.0},
        }
    )


class Stack:
    def __init__(self, cluster: LocalCluster, client: httpx.AsyncClient) -> None:
        self.cluster, self.client = cluster, client

    async def text(self, number: int, max_tokens: int = 100, temperature: float = 0.8, prompt: str = "Once upon a time") -> str:
        body: dict[str, Any] = {
            "model": NAMES[number % 2],
            "prompt": f"{number}. {prompt}",
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": number,
            "ignore_eos": True,
        }
        response = await self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == max_tokens
        return str(response.json()["choices"][0]["text"])

    def roles(self) -> dict[str, str]:
        return {w.worker_id: w.role for w in self.cluster.controller.topology().workers if w.state == "alive"}

    async def quiet(self) -> None:
        """Nothing runs, and no block is out anywhere."""
        async with asyncio.timeout(15):
            while any(worker._engine.blocks.num_out for worker in self.cluster.workers):
                await asyncio.sleep(0.02)
        for worker in self.cluster.workers:
            worker._engine.blocks.check()
        self.cluster.controller.check()


@asynccontextmanager
async def serving(config: ClusterConfig) -> AsyncIterator[Stack]:
    async with LocalCluster(config) as cluster:
        settings = FrontDoorSettings(client_id=ClientId("front-0"), token=config.security.cluster_token, drain_timeout_s=5.0)
        frontdoor = FrontDoor(settings, cluster)
        await frontdoor.start()
        transport = httpx.ASGITransport(build_asgi(frontdoor))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            try:
                yield Stack(cluster, client)
            finally:
                await frontdoor.aclose()


async def test_a_drained_decode_worker_stops_and_no_client_notices() -> None:
    async with serving(config_of(1, 2)) as stack:
        alone = [await stack.text(i) for i in range(4)]
        asks = [asyncio.create_task(stack.text(i)) for i in range(4)]
        await asyncio.sleep(0.15)
        busy = [w.worker_id for w in stack.cluster.controller.topology().workers if w.role == "decode" and w.num_placed]
        await stack.cluster.drain(WorkerId(busy[0]))
        assert stack.roles().keys() == {"prefill-0", "decode-0", "decode-1"} - {busy[0]}
        assert await asyncio.gather(*asks) == alone
        stats = stack.cluster.controller.stats()
        assert stats.outcomes.get("moved", 0) > 0 and "replayed" not in stats.outcomes
        assert stats.num_workers_lost == 0 and len(stack.cluster.workers) == 2
        assert await stack.text(7) == await stack.text(7)
        await stack.quiet()


async def test_a_drained_prefill_worker_ends_its_prompts_first() -> None:
    async with serving(config_of(2, 1)) as stack:
        alone = [await stack.text(i, 40, prompt="word " * 200) for i in range(6)]
        asks = [asyncio.create_task(stack.text(i, 40, prompt="word " * 200)) for i in range(6)]
        await asyncio.sleep(0.05)
        await stack.cluster.drain(WorkerId("prefill-0"))
        assert await asyncio.gather(*asks) == alone
        assert "replayed" not in stack.cluster.controller.stats().outcomes
        await stack.quiet()


@pytest.mark.parametrize("worker", ["prefill-0", "decode-0", "decode-9"])
async def test_a_worker_that_nobody_can_stand_in_for_is_not_drained(worker: str) -> None:
    async with serving(config_of(1, 1)) as stack:
        with pytest.raises(InvalidRequest, match=r"last|not serving"):
            await stack.cluster.drain(WorkerId(worker))
        assert len(await stack.text(1, 20)) > 0


async def test_a_drain_that_takes_too_long_leaves_the_worker_serving() -> None:
    async with serving(config_of(1, 2)) as stack:
        pool = stack.cluster.workers[2]._engine.pool(stack.cluster.workers[2]._engine.specs.keys().__iter__().__next__())
        taken = pool.allocate(1)
        with pytest.raises(DeadlineExceeded, match="goes on serving"):
            await stack.cluster.drain(WorkerId("decode-1"), 0.3)
        pool.free(taken)
        assert stack.roles()["decode-1"] == "decode"
        await stack.cluster.drain(WorkerId("decode-1"))
        await stack.quiet()


async def test_where_roles_follow_the_load_two_workers_can_do_with_one() -> None:
    async with serving(config_of(1, 1, split="auto")) as stack:
        alone = [await stack.text(i) for i in range(2)]
        asks = [asyncio.create_task(stack.text(i)) for i in range(2)]
        await asyncio.sleep(0.15)
        await stack.cluster.drain(WorkerId("decode-0"))
        assert await asyncio.gather(*asks) == alone
        assert [await stack.text(i) for i in range(2)] == alone
        assert stack.cluster.controller.topology().is_ready
        await stack.quiet()


async def test_the_split_follows_a_load_of_long_prompts_and_then_of_long_answers() -> None:
    async with serving(config_of(1, 3, split="auto", tpot_slo_s=0.0015)) as stack:
        stack.cluster.controller._steering._split = AutoSplit(hold_s=0.5, min_pressure=0.05)  # small models on a machine that others share

        numbers = itertools.count(1)

        async def load(is_enough: Callable[[int], bool], make: Callable[[int], Awaitable[str]]) -> None:
            """Requests, six at a time, until enough workers prefill."""

            async def some() -> None:
                while not is_enough(list(stack.roles().values()).count("prefill")):
                    await make(next(numbers))

            async with asyncio.timeout(60):
                await asyncio.gather(*(some() for _ in range(6)))

        for _ in range(2):
            await load(lambda num_prefill: num_prefill >= 2, lambda i: stack.text(i, 1, prompt="word " * 230))
            await load(lambda num_prefill: num_prefill == 1, lambda i: stack.text(i, 200))
        await stack.quiet()
