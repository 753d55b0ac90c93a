"""What the HTTP application refuses and how: statuses, the one shape of errors, keys, and bodies that nobody thought of."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_bodies import CHAT, PROMPT, Connect, MakeStack, error_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from zero_stack import ZeroStack, byte_spec

from polymux.actors.tokenizer import Tokenizer
from polymux.deploy.http.auth import hash_key
from polymux.transport.errors import Draining, ModelLoading, OutOfMemory, Overloaded, PeerLost, PolymuxError, RateLimited

# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405)],
)
async def test_unknown_paths_and_methods_have_the_shape_of_all_errors(
    client: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert error_in(response)["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


async def test_an_unknown_model_is_404(client: httpx.AsyncClient) -> None:
    for response in (await client.post("/v1/completions", json={**PROMPT, "model": "x"}), await client.get("/v1/models/x")):
        assert response.status_code == 404
        assert error_in(response) | {"type": "invalid_request_error", "param": "model", "code": "model_not_found"} == error_in(response)


async def test_a_prompt_that_can_never_fit_is_400(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={**PROMPT, "prompt": "x" * 2000})
    assert response.status_code == 400
    assert error_in(response)["code"] == "context_length_exceeded"


async def test_a_text_that_is_hopelessly_long_is_not_even_tokenized(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("was tokenized"))
    text = "x" * 1024 * 4 * 5  # tokens, slack, and more than the longest token, </s>
    chat = {**CHAT, "messages": [{"role": "user", "content": text}]}
    for path, body, param in (("/v1/completions", {**PROMPT, "prompt": text}, "prompt"), ("/v1/chat/completions", chat, "messages")):
        response = await client.post(path, json=body)
        assert response.status_code == 400
        assert (error_in(response)["code"], error_in(response)["param"]) == ("context_length_exceeded", param)


async def test_a_long_text_is_tokenized_while_others_are_served(checkpoint: Path, make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(specs=(byte_spec("bytes", checkpoint, max_model_len=1 << 20),))
    async with connect(stack) as client:
        await client.post("/v1/completions", json=PROMPT)
        long = asyncio.create_task(client.post("/tokenize", json={"model": "bytes", "prompt": "word " * 120_000}))
        gaps = [time.perf_counter()]
        while not long.done():
            assert (await client.get("/health")).status_code == 200
            await asyncio.sleep(0)
            gaps.append(time.perf_counter())
        assert (await long).json()["count"] == 600_000
    longest_s = max(after - before for before, after in itertools.pairwise(gaps))
    assert longest_s < 0.4 * (gaps[-1] - gaps[0]), f"others waited {longest_s:.2f} s of {gaps[-1] - gaps[0]:.2f} s"


async def test_a_body_beyond_the_cap_is_413_told_or_not(make_stack: MakeStack, connect: Connect) -> None:
    async def untold() -> Any:
        for _ in range(4):
            yield b"x" * 400

    async with connect(make_stack(http_settings={"max_body_bytes": 1000})) as client:
        for content in (b"x" * 1001, untold()):
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == 413
            assert error_in(response)["code"] == "request_too_large"


async def test_a_body_that_does_not_come_is_408(make_stack: MakeStack, connect: Connect) -> None:
    async def stalled() -> Any:
        yield b"{"
        await asyncio.sleep(5)

    async with connect(make_stack(http_settings={"body_timeout_s": 0.1})) as client:
        response = await client.post("/v1/completions", content=stalled())
    assert response.status_code == 408
    assert error_in(response)["code"] == "request_timeout"


REFUSALS = [
    (Overloaded("full", retry_after_s=2.2), 503, "service_unavailable_error", "overloaded", "3"),
    (ModelLoading("waking"), 503, "service_unavailable_error", "model_loading", "1"),
    (Draining("going"), 503, "service_unavailable_error", "draining", "1"),
    (RateLimited("slow down", retry_after_s=10), 429, "rate_limit_error", "rate_limit_exceeded", "10"),
    (PeerLost("no controller"), 503, "service_unavailable_error", "overloaded", "1"),
    (OutOfMemory("arena"), 500, "server_error", "internal_error", None),
]


@pytest.mark.parametrize(("error", "status", "kind", "code", "retry_after"), REFUSALS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_what_the_controller_refuses_has_its_status(
    client: httpx.AsyncClient,
    stack: ZeroStack,
    error: PolymuxError,
    status: int,
    kind: str,
    code: str,
    retry_after: str | None,
    is_stream: bool,
) -> None:
    stack.control.refusal = error
    response = await client.post("/v1/completions", json={**PROMPT, "stream": is_stream})
    assert response.status_code == status
    assert (error_in(response)["type"], error_in(response)["code"]) == (kind, code)
    assert response.headers.get("retry-after") == retry_after
    await asyncio.sleep(0.01)
    assert len(stack.control.releases) == 1, "the books are cleared of refused requests too"


async def test_a_deadline_that_passes_is_408_and_not_worth_a_retry(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.05)
    async with connect(stack) as client:
        body = {**PROMPT, "ignore_eos": True, "max_tokens": 900}
        response = await client.post("/v1/completions", json=body, headers={"x-request-timeout-s": "0.2"})
    assert response.status_code == 408
    assert error_in(response)["type"] == "timeout_error"
    assert response.headers["x-should-retry"] == "false"
    assert [release.outcome for release in stack.control.releases] == ["failed"]


async def test_more_open_requests_than_allowed_is_503(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.05, frontdoor_settings={"max_open_requests": 1})
    async with connect(stack) as client:
        first = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        while stack.frontdoor.num_open_requests == 0:
            await asyncio.sleep(0.005)
        second = await client.post("/v1/completions", json=PROMPT)
        assert (second.status_code, error_in(second)["code"]) == (503, "overloaded")
        assert (await first).status_code == 200


async def test_a_bug_is_500_with_nothing_of_its_insides(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    stack.control.refusal = ZeroDivisionError("secret")  # type: ignore[assignment]
    response = await client.post("/v1/completions", json=PROMPT, headers={"X-Request-Id": "find-me"})
    assert response.status_code == 500
    assert (error_in(response)["type"], error_in(response)["code"]) == ("server_error", "internal_error")
    assert "secret" not in response.text
    assert "find-me" in response.text


# -- keys -------------------------------------------------------------------------------------------------------------


async def test_a_key_opens_all_but_what_probes_need(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(http_settings={"api_keys": (hash_key("first-key"), hash_key("second-key"))})
    async with connect(stack) as client:
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert (await client.get(path)).status_code == 200
        for path in ("/v1/models", "/openapi.json", "/v1/polymux/topology", "/nowhere"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-key"}, {"Authorization": "Bearer"}):
                response = await client.get(path, headers=headers)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_in(response)["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            assert (await client.post("/v1/completions", json=PROMPT, headers=headers)).status_code == 200
    tenants = {ask.tenant for ask in stack.control.asks}
    assert len(tenants) == 2
    assert all(tenant.startswith("key-") for tenant in tenants)


async def test_an_application_under_a_prefix_is_the_same(make_stack: MakeStack) -> None:
    stack = make_stack(http_settings={"api_keys": (hash_key("the-only-key"),)})
    mounted = Starlette(routes=[Mount("/llm", stack.app)])
    await stack.frontdoor.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(mounted), base_url="http://front") as client:
        assert (await client.get("/llm/health")).status_code == 200
        assert (await client.get("/llm/v1/models")).status_code == 401
        headers = {"Authorization": "Bearer the-only-key"}
        assert (await client.post("/llm/v1/completions", json=PROMPT, headers=headers)).json()["choices"][0]["text"] == "hello"
    await stack.frontdoor.aclose()


# -- whatever comes ---------------------------------------------------------------------------------------------------

SHARED = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "n",
]
FIELDS = [
    *SHARED,
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "stream",
    "stream_options",
    "user",
    "logprobs",
    "echo",
    "prompt",
]
VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats(-3, 3)
    | st.text(max_size=6)
    | st.lists(st.integers(0, 300) | st.text(max_size=3), max_size=4)
    | st.dictionaries(st.integers(0, 300).map(str), st.floats(-120, 120), max_size=2)
)


def test_no_value_of_any_field_makes_a_500(stack: ZeroStack) -> None:
    with TestClient(stack.app) as client:

        @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), is_chat=st.booleans())
        def check(fields: dict[str, Any], is_chat: bool) -> None:
            path, base = ("/v1/chat/completions", CHAT) if is_chat else ("/v1/completions", PROMPT)
            body = json.dumps({**base, "max_tokens": 8, **fields})
            response = client.post(path, content=body)
            assert response.status_code in (200, 400), response.text
            if response.status_code == 400:
                assert response.json()["error"]["param"]

        check()
    assert stack.frontdoor.num_open_requests == 0
    assert len(stack.control.releases) == len(stack.control.asks)
