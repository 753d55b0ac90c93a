"""Cached prompts as users meet them: counted in usage by every kind of answer, never shared with those who must not share them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import torch

from polymux.cluster.config import ClusterConfig
from polymux.cluster.local import LocalCluster
from polymux.deploy.demo.run import CONFIG
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.auth import hash_key
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.settings import FrontDoorSettings, HttpSettings
from polymux.transport.units import ClientId

KEYS = ("key-of-one-tenant-0123456789", "key-of-another-tenant-0123456789")
WORDS = " ".join(["all work and no play makes a dull boy;"] * 4)
BODY = {"model": "llama-small", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@asynccontextmanager
async def serving(*keys: str, **engine: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The demo's models behind the real application; a client with the first key."""
    torch.set_num_threads(1)
    data = ClusterConfig.load(CONFIG).to_dict(show_secrets=True)
    config = ClusterConfig.from_dict(data | {"engine": data["engine"] | engine})
    async with LocalCluster(config) as cluster:
        frontdoor = FrontDoor(FrontDoorSettings(client_id=ClientId("front"), token=config.security.cluster_token), cluster)
        app = build_asgi(frontdoor, HttpSettings(api_keys=tuple(map(hash_key, keys))))
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front", headers=headers, timeout=60)
        async with app.router.lifespan_context(app), client:
            yield client


async def ask(client: httpx.AsyncClient, path: str, body: dict[str, Any], key: str = "") -> dict[str, Any]:
    """The usage of an answer; of a stream, from its last chunk."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not body.get("stream"):
        return dict((await client.post(path, json=body, headers=headers)).raise_for_status().json()["usage"])
    text = (await client.post(path, json=body | {"stream_options": {"include_usage": True}}, headers=headers)).raise_for_status().text
    return dict(json.loads(text.strip().splitlines()[-3].removeprefix("data: "))["usage"])


def cached(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/completions", {"prompt": WORDS}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}]})],
    ids=["completions", "chat"],
)
async def test_a_prompt_that_came_before_is_counted_but_for_its_last_block(path: str, prompt: dict[str, Any], is_stream: bool) -> None:
    async with serving() as client:
        body = BODY | prompt | {"stream": is_stream}
        first, second = await ask(client, path, body), await ask(client, path, body)
        assert cached(first) == 0
        assert cached(second) == (second["prompt_tokens"] - 1) // 16 * 16 > 0
        assert first | {"prompt_tokens_details": None} == second | {"prompt_tokens_details": None}


async def test_several_prompts_and_choices_count_each_prompt_once() -> None:
    async with serving() as client:
        body = BODY | {"prompt": [WORDS, "a" + WORDS], "n": 2, "temperature": 1}
        first, second = await ask(client, "/v1/completions", body), await ask(client, "/v1/completions", body)
        assert cached(first) == 0
        assert second["prompt_tokens"] - 32 <= cached(second) < second["prompt_tokens"]


async def test_tenants_and_salts_share_nothing() -> None:
    async with serving(*KEYS) as client:
        body = BODY | {"prompt": WORDS}
        for key in KEYS:
            assert cached(await ask(client, "/v1/completions", body, key)) == 0
            assert cached(await ask(client, "/v1/completions", body | {"cache_salt": "s"}, key)) == 0
        for key in KEYS:
            assert cached(await ask(client, "/v1/completions", body, key)) > 0
            assert cached(await ask(client, "/v1/completions", body | {"cache_salt": "s"}, key)) > 0


async def test_a_cache_that_is_off_counts_nothing() -> None:
    async with serving(prefix_caching=False) as client:
        body = BODY | {"prompt": WORDS}
        assert [cached(await ask(client, "/v1/completions", body)) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("salt", ["", "x" * 513, 7])
async def test_a_salt_that_is_none_is_refused_by_name(salt: Any) -> None:
    async with serving() as client:
        response = await client.post("/v1/completions", json=BODY | {"prompt": "a", "cache_salt": salt})
        assert response.status_code == 400 and response.json()["error"]["param"] == "cache_salt"


async def test_what_the_cache_did_is_in_the_metrics() -> None:
    async with serving() as client:
        body = BODY | {"prompt": WORDS}
        usages = [await ask(client, "/v1/completions", body) for _ in range(2)]
        names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
        totals = [0.0, 0.0]
        async with asyncio.timeout(20):
            while not totals[1]:
                await asyncio.sleep(0.05)
                lines = (await client.get("/metrics")).text.splitlines()
                totals = [sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in names]
        assert totals == [sum(usage["prompt_tokens"] for usage in usages), cached(usages[1])]
