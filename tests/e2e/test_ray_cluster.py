"""The whole path on a real Ray: actors, Serve, HTTP, the official client; correct under load, frugal at rest, alive after a kill."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray

import harness
from polymux.cluster.bootstrap import find_controller, start_local_ray
from polymux.cluster.config import ClusterConfig
from polymux.deploy.app import DEMO_CONFIG, start_serving, stop_serving

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

MIB = 1024 * 1024
MAX_TOKENS = 24
NUM_CLIENTS = 64
NUM_ROUNDS = 10


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    return ClusterConfig.load(DEMO_CONFIG, overrides=["serve.port=18123", "name=polymux-test"])


@pytest.fixture(scope="module")
def url(config: ClusterConfig) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="pmx-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start_local_ray(3, folder)
        try:
            yield start_serving(config)
            stop_serving(config)
            assert find_controller(config) is None, "the controller outlived its cluster"
        finally:
            ray.shutdown()


def pids(seen: dict[str, Any]) -> dict[str, int]:
    return {worker["worker_id"]: worker["pid"] for worker in seen["workers"] if worker["state"] != "lost"}


async def test_a_mixed_load_gives_the_tokens_of_transformers_while_workers_switch(url: str) -> None:
    before = (await harness.topology(url))["stats"]["counters"]
    answers = await harness.mixed_load(url, 64, MAX_TOKENS)
    assert harness.wrong_answers(answers, MAX_TOKENS) == []
    after = await harness.wait_counted(url, "kv_transfers_committed", before.get("kv_transfers_committed", 0) + 64)
    assert after["model_switches"] - before.get("model_switches", 0) >= 10
    assert after["kv_transfers_failed"] == 0 and after["kv_stale_moves"] == 0
    async with httpx.AsyncClient(base_url=url) as client:
        lanes = (await client.get("/v1/polymux/timeline")).raise_for_status().json()["lanes"]
    assert [lane["missing"] for lane in lanes] == [None, None, None]
    assert {"active", "switch", "prefill", "decode", "kv_in", "kv_out"} <= {span[0] for lane in lanes for span in lane["spans"]}


@dataclass(frozen=True)
class Usage:
    """What the workers hold between two rounds. A worker maps a model's image when it first loads that model, in whichever round."""

    images: tuple[str, ...]
    other_files: tuple[str, ...]
    memory_bytes: int


def usage_of(seen: dict[str, Any]) -> Usage:
    files = [f"{worker} {target}" for worker, pid in pids(seen).items() for target in harness.open_files(pid)]
    images = tuple(sorted(name for name in files if any(f"/memfd:polymux-{model}" in name for model in harness.MODELS)))
    memory_bytes = sum(map(harness.resident_memory_bytes, pids(seen).values()))
    return Usage(images=images, other_files=tuple(name for name in files if name not in images), memory_bytes=memory_bytes)


async def test_64_streams_at_once_are_correct_and_leave_nothing_behind_over_ten_rounds(url: str) -> None:
    seen = await harness.topology(url)
    usage: list[Usage] = []
    while len(usage) < NUM_ROUNDS or (usage[-6].images != usage[-1].images and len(usage) < 2 * NUM_ROUNDS):
        answers = await harness.mixed_load(url, NUM_CLIENTS, MAX_TOKENS)
        assert harness.wrong_answers(answers, MAX_TOKENS) == []
        seen = await harness.wait_idle(url)
        usage.append(usage_of(seen))
    images = usage[-1].images
    assert len(images) == len(set(images)) > 0, images  # each once
    assert usage[-6].images == images
    assert usage[-1].memory_bytes <= max(past.memory_bytes for past in usage[:-5]) + 8 * MIB, [past.memory_bytes for past in usage]
    allowed = max(len(past.other_files) for past in usage[:-5])
    deadline_s = time.monotonic() + 5
    while len(usage_of(seen).other_files) > allowed and time.monotonic() < deadline_s:
        await asyncio.sleep(0.2)  # what a worker reads at this moment, it closes
    others = usage_of(seen).other_files
    assert len(others) <= allowed, sorted(set(others) - set(usage[0].other_files))


async def test_a_worker_stays_within_its_arena_and_400_mib(url: str) -> None:
    seen = await harness.topology(url)
    for worker in seen["workers"]:
        assert harness.peak_memory_bytes(worker["pid"]) <= worker["arena_bytes"] + 400 * MIB, worker["worker_id"]


async def test_the_official_client_works_unchanged(url: str) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
    async with client:
        listed = [model.id async for model in client.models.list()]
        assert set(listed) == set(harness.MODELS)
        answer = await client.chat.completions.create(
            model="llama-small", messages=[{"role": "user", "content": harness.QUESTIONS[0]}], max_tokens=MAX_TOKENS, temperature=0
        )
        expected = harness.greedy_answer("llama-small", harness.QUESTIONS[0], MAX_TOKENS)
        assert answer.choices[0].message.content == expected
        stream = await client.completions.create(model="qwen3-small", prompt="The ", max_tokens=8, temperature=0, stream=True)
        assert sum(len(chunk.choices) for chunk in [chunk async for chunk in stream]) > 1
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="absent", messages=[{"role": "user", "content": "?"}])


async def test_a_client_that_goes_away_frees_its_blocks_within_a_second(url: str) -> None:
    body = {"model": "llama-large", "prompt": "The ", "max_tokens": 900, "ignore_eos": True, "stream": True, "temperature": 0}
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            for _ in range(6):
                await anext(lines)
        closed_s = time.monotonic()
    # the controller hears of it with the next report, at most an interval later
    seen = await harness.wait_idle(url, deadline_s=2.5)
    assert seen["stats"]["num_inflight"] == 0 and time.monotonic() - closed_s < 2.5


async def test_an_idle_cluster_takes_less_than_5_percent_of_a_core_beyond_what_ray_takes_for_its_actors(url: str) -> None:
    """Ray wakes every actor a hundred times a second, which costs 0.5 to 2.5% of a core each, by the machine and its neighbours: what
    actors that do nothing are seen to take in the same windows is Ray's. One window of six is enough: the same work never costs less."""
    await harness.wait_idle(url)
    watched = list(pids(await harness.topology(url)).values()) + front_doors_and_controller()
    assert len(watched) >= 5
    bare = [BareActor.remote() for _ in range(3)]
    bare_pids = await asyncio.gather(*(actor.pid.remote() for actor in bare))
    await asyncio.sleep(3.0)  # they have just started
    shares: list[tuple[float, float]] = []
    while len(shares) < 6 and not any(ours - len(watched) * theirs / len(bare) < 0.05 for ours, theirs in shares):
        shares.append(await cpu_shares(watched, bare_pids, 6.0))
    for actor in bare:
        ray.kill(actor)
    assert min(ours - len(watched) * theirs / len(bare) for ours, theirs in shares) < 0.05, shares


@ray.remote(num_cpus=0)
class BareActor:
    """What Ray itself costs: asynchronous, as ours are, and never called again."""

    async def pid(self) -> int:
        return os.getpid()


async def cpu_shares(ours: list[int], theirs: list[int], seconds: float) -> tuple[float, float]:
    """CPU time of these processes, and of those, in cores, over a while."""

    def used() -> tuple[float, float]:
        return sum(map(harness.cpu_seconds, ours)), sum(map(harness.cpu_seconds, theirs))

    began_s, before = time.monotonic(), used()
    await asyncio.sleep(seconds)
    elapsed_s, after = time.monotonic() - began_s, used()
    return (after[0] - before[0]) / elapsed_s, (after[1] - before[1]) / elapsed_s


def front_doors_and_controller() -> list[int]:
    """Processes of this test's Ray by the title that Ray gives them."""
    titles = ("ray::ControllerActor", "ray::ServeReplica:polymux-test")
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if (line := child.cmdline()) and line[0].startswith(titles)]


async def test_streams_survive_the_death_of_a_decode_worker(url: str) -> None:
    seen = await harness.topology(url)
    load = asyncio.create_task(harness.mixed_load(url, 16, 96))
    await asyncio.sleep(0.5)
    os.kill(pids(seen)["decode-0"], signal.SIGKILL)
    assert harness.wrong_answers(await load, 96) == []
    async with asyncio.timeout(60):
        while len(alive := pids(await harness.topology(url))) < 3 or alive["decode-0"] == pids(seen)["decode-0"]:
            await asyncio.sleep(0.5)
    await harness.wait_idle(url)
    assert harness.wrong_answers(await harness.mixed_load(url, 8, MAX_TOKENS), MAX_TOKENS) == []
