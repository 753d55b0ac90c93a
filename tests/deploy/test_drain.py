"""Emptying a worker, as an operator asks for it: over HTTP, and by the SDK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from zero_stack import ZeroStack, serving

from polymux.deploy.client import Client
from polymux.deploy.http.auth import hash_key

MakeStack = Callable[..., ZeroStack]


async def test_a_drain_names_its_worker_and_answers_when_it_has_stopped(stack: ZeroStack, connect: Callable[[ZeroStack], Any]) -> None:
    async with connect(stack) as client:
        response = await client.post("/v1/polymux/workers/decode-0/drain")
        assert (response.status_code, response.json()) == (200, {"worker": "decode-0", "state": "stopped"})
        unknown = await client.post("/v1/polymux/workers/decode-7/drain?timeout_s=5")
        assert unknown.status_code == 400 and "decode-7" in unknown.json()["error"]["message"]
        assert (await client.get("/v1/polymux/workers/decode-0/drain")).status_code == 405
    assert stack.control.drained == ["decode-0"]


@pytest.mark.parametrize("timeout_s", ["0", "-1", "601", "nan", "soon"])
async def test_a_time_that_cannot_be_is_named(stack: ZeroStack, connect: Callable[[ZeroStack], Any], timeout_s: str) -> None:
    async with connect(stack) as client:
        response = await client.post(f"/v1/polymux/workers/decode-0/drain?timeout_s={timeout_s}")
    assert response.status_code == 400 and response.json()["error"]["param"] == "timeout_s"
    assert stack.control.drained == []


async def test_a_drain_needs_a_key_where_there_are_keys(make_stack: MakeStack, connect: Callable[[ZeroStack], Any]) -> None:
    stack = make_stack(http_settings={"api_keys": (hash_key("the-only-key"),)})
    async with connect(stack) as client:
        assert (await client.post("/v1/polymux/workers/decode-0/drain")).status_code == 401
        assert stack.control.drained == []
        headers = {"Authorization": "Bearer the-only-key"}
        assert (await client.post("/v1/polymux/workers/decode-0/drain", headers=headers)).status_code == 200


def test_the_sdk_drains_a_worker(stack: ZeroStack) -> None:
    with serving(stack.app) as url, Client(url) as client:
        client.drain("prefill-0", timeout_s=3.0)
    assert stack.control.drained == ["prefill-0"]
