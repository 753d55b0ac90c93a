"""The HTTP application as clients meet it: bodies, statuses, headers, and the shape of every error."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from zero_stack import BOS, EOS, ZeroStack, byte_spec, write_checkpoint

import polymux
from polymux.actors.tokenizer import Tokenizer
from polymux.deploy.http.auth import hash_key
from polymux.deploy.http.openai import ChatCompletionRequest, CompletionRequest
from polymux.transport.errors import Draining, ModelLoading, OutOfMemory, Overloaded, PeerLost, PolymuxError, RateLimited

MakeStack = Callable[..., ZeroStack]
Connect = Callable[[ZeroStack], Any]
CHAT: dict[str, Any] = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}
PROMPT: dict[str, Any] = {"model": "bytes", "prompt": "hello", "max_tokens": 64}


def error_in(response: httpx.Response) -> dict[str, Any]:
    """The error object, which has its four keys and nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert response.headers["content-type"] == "application/json"
    return dict(body["error"])


# -- generation -------------------------------------------------------------------------------------------------------


async def test_a_chat_is_answered_by_the_template_of_the_model(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT)
    body = response.json()
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "user: hi\nassistant: ", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 21,
        "total_tokens": 41,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert body["object"] == "chat.completion"


async def test_parts_of_a_message_are_joined_for_a_template_that_wants_text(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "bytes", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.json()["choices"][0]["message"]["content"] == "system: s\nuser: a\nb\nassistant: "


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hello", ["hello"]), (["ab", "cd"], ["ab", "cd"]), (list(b"xyz"), ["xyz"]), ([list(b"x"), list(b"yz")], ["x", "yz"])],
)
async def test_a_prompt_may_have_any_of_its_four_shapes(client: httpx.AsyncClient, prompt: Any, expected: list[str]) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "prompt": prompt})).json()
    assert [choice["text"] for choice in body["choices"]] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == sum(map(len, expected)) + len(expected)


async def test_several_choices_count_their_prompt_once(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "prompt": ["ab", "cde"], "n": 2, "best_of": 2, "seed": 4})).json()
    assert [choice["text"] for choice in body["choices"]] == ["ab", "ab", "cde", "cde"]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 14)
    seeds = [command.sampling.seed for command in stack.workers[0].commands]
    assert seeds[0] == seeds[2] == 4
    assert seeds[1] == seeds[3] != 4


async def test_a_request_without_a_seed_gets_one_of_its_own(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    for _ in range(2):
        await client.post("/v1/completions", json=PROMPT)
    first, second = (command.sampling.seed for command in stack.workers[0].commands)
    assert first != second


async def test_echo_puts_the_prompt_before_the_text(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "echo": True, "max_tokens": 2})).json()
    assert body["choices"][0]["text"] == "hellohe"
    body = (await client.post("/v1/completions", json={**PROMPT, "prompt": [list(b"ab"), list(b"cd")], "echo": True, "n": 2})).json()
    assert [choice["text"] for choice in body["choices"]] == ["abab", "abab", "cdcd", "cdcd"]


async def test_a_stop_string_ends_the_text_and_frees_the_worker(client: httpx.AsyncClient, stack: ZeroStack, eventually: Any) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "stop": ["zz", "lo"], "ignore_eos": True, "max_tokens": 900})).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("hel", "stop")
    assert body["usage"]["completion_tokens"] == 5
    await asyncio.sleep(0)
    assert await asyncio.to_thread(eventually, lambda: stack.num_running == 0)


async def test_a_stop_token_ends_the_text(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "stop_token_ids": [ord("o")]})).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("hell", "stop")


async def test_max_tokens_ends_with_length(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "max_tokens": 2})).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("he", "length")


async def test_logprobs_of_a_completion(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/completions", json={**PROMPT, "prompt": "aé", "logprobs": 2})).json()
    assert body["choices"][0]["logprobs"] == {
        "text_offset": [0, 1, 1],
        "token_logprobs": [-0.25, -0.5, -0.75],
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "top_logprobs": [
            {"a": -0.25, "b": -1.25},
            {"bytes:\\xc3": -0.5, "bytes:\\xc4": -1.5},
            {"bytes:\\xa9": -0.75, "bytes:\\xaa": -1.75},
        ],
    }
    body = (await client.post("/v1/completions", json={**PROMPT, "prompt": "a", "logprobs": 0})).json()
    assert body["choices"][0]["logprobs"] == {"text_offset": [0], "token_logprobs": [-0.25], "tokens": ["a"], "top_logprobs": None}


async def test_logprobs_of_a_chat(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 1})).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "u",
                "logprob": -0.25,
                "bytes": [117],
                "top_logprobs": [{"token": "u", "logprob": -0.25, "bytes": [117]}, {"token": "v", "logprob": -1.25, "bytes": [118]}],
            }
        ],
        "refusal": None,
    }
    body = (await client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "max_tokens": 1})).json()
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_the_service_tier_is_told_where_it_was_asked_for(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/chat/completions", json={**CHAT, "service_tier": "auto"})).json()["service_tier"] == "default"
    assert "service_tier" not in (await client.post("/v1/chat/completions", json=CHAT)).json()


async def test_the_models_own_sampling_defaults_are_used_unless_switched_off(
    tmp_path: Path, make_stack: MakeStack, connect: Connect
) -> None:
    specs = (byte_spec("bytes", write_checkpoint(tmp_path / "m", {"temperature": 0.25, "top_k": 9})),)
    for use, expected in ((True, (0.25, 9)), (False, (1.0, 0))):
        stack = make_stack(specs=specs, http_settings={"use_generation_config": use})
        async with connect(stack) as client:
            await client.post("/v1/completions", json=PROMPT)
        sampling = stack.workers[0].commands[0].sampling
        assert (sampling.temperature, sampling.top_k) == expected


# -- headers ----------------------------------------------------------------------------------------------------------


async def test_the_clients_request_id_is_echoed_and_never_ours_to_trust(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    for _ in range(2):
        response = await client.post("/v1/completions", json=PROMPT, headers={"X-Request-Id": "mine"})
        assert response.headers["x-request-id"] == "mine"
        assert response.json()["id"] == "cmpl-mine"
    assert len({ask.request_id for ask in stack.control.asks}) == 2
    odd = await client.get("/health", headers={"X-Request-Id": "a b" + "x" * 200})
    assert len(odd.headers["x-request-id"]) == 32
    named = await client.post("/v1/completions", json={**PROMPT, "request_id": "job-1"}, headers={"X-Request-Id": "mine"})
    assert (named.json()["id"], named.headers["x-request-id"]) == ("cmpl-job-1", "mine")


async def test_slo_and_deadline_headers_reach_controller_and_worker(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    headers = {"x-slo-ttft-ms": "250", "x-slo-tpot-ms": "12.5", "x-request-timeout-s": "7"}
    await client.post("/v1/completions", json=PROMPT, headers=headers)
    ask, command = stack.control.asks[0], stack.workers[0].commands[0]
    assert (ask.ttft_slo_s, ask.tpot_slo_s) == (0.25, 0.0125)
    assert 6.0 < ask.deadline_s <= 7.0
    assert 6.0 < command.deadline_s <= 7.0
    assert command.tpot_slo_s == 0.0125


@pytest.mark.parametrize(
    ("slo", "headers", "wanted"),
    [
        ("batch", {}, (600.0, 1.0)),
        ("interactive", {}, (10.0, 0.1)),
        ({"ttft_ms": 250, "tpot_ms": 12.5}, {}, (0.25, 0.0125)),
        ({"tpot_ms": 20}, {}, (None, 0.02)),
        ("batch", {"x-slo-tpot-ms": "50"}, (600.0, 0.05)),
    ],
)
async def test_a_body_may_name_a_class_or_numbers_and_a_header_outranks_it(
    client: httpx.AsyncClient, stack: ZeroStack, slo: Any, headers: dict[str, str], wanted: tuple[float | None, float]
) -> None:
    response = await client.post("/v1/completions", json={**PROMPT, "slo": slo}, headers=headers)
    assert response.status_code == 200, response.text
    ask = stack.control.asks[0]
    assert (ask.ttft_slo_s, ask.tpot_slo_s) == wanted


@pytest.mark.parametrize("slo", ["soon", {"ttft_ms": 0}, {"ttft": 1}, {"tpot_ms": "fast"}, 3])
async def test_an_slo_that_is_none_is_refused_by_name(client: httpx.AsyncClient, slo: Any) -> None:
    response = await client.post("/v1/completions", json={**PROMPT, "slo": slo})
    assert response.status_code == 400
    assert error_in(response)["param"].split(".")[0] == "slo", response.text


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-request-timeout-s"])
@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
async def test_a_header_that_is_no_duration_is_refused_by_name(client: httpx.AsyncClient, name: str, value: str) -> None:
    response = await client.post("/v1/completions", json=PROMPT, headers={name: value})
    assert response.status_code == 400
    assert error_in(response)["param"] == name


# -- the other endpoints ----------------------------------------------------------------------------------------------


async def test_health_asks_nobody_and_ready_asks_the_controller(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    stack.control.is_ready = False
    health, ready = await client.get("/health"), await client.get("/ready")
    assert (health.status_code, health.content) == (200, b"")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "reasons": ["no decode worker"]})
    stack.control.is_ready = True
    await asyncio.sleep(0.6)
    ready = await client.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "reasons": []})
    stack.frontdoor.drain()
    assert (await client.get("/ready")).json()["reasons"] == ["draining"]
    assert (await client.get("/health")).status_code == 200


async def test_every_registered_model_is_listed(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert (listed["object"], [one["id"] for one in listed["data"]]) == ("list", ["bytes"])
    one = (await client.get("/v1/models/bytes")).json()
    assert one == listed["data"][0]
    assert one | {"id": "bytes", "object": "model", "owned_by": "polymux", "max_model_len": 1024} == one


async def test_a_model_name_may_have_slashes(checkpoint: Path, make_stack: MakeStack, connect: Connect) -> None:
    async with connect(make_stack(specs=(byte_spec("org/bytes", checkpoint),))) as client:
        assert (await client.get("/v1/models/org/bytes")).json()["id"] == "org/bytes"
        assert (await client.post("/v1/completions", json={**PROMPT, "model": "org/bytes"})).json()["model"] == "org/bytes"


async def test_a_model_that_is_registered_later_is_found(client: httpx.AsyncClient, stack: ZeroStack, checkpoint: Path) -> None:
    assert (await client.post("/v1/completions", json={**PROMPT, "model": "late"})).status_code == 404
    stack.control.specs += (byte_spec("late", checkpoint),)
    await asyncio.sleep(0.25)
    assert (await client.post("/v1/completions", json={**PROMPT, "model": "late"})).status_code == 200


async def test_tokenize_and_detokenize(client: httpx.AsyncClient) -> None:
    response = await client.post("/tokenize", json={"model": "bytes", "prompt": "aé", "return_token_strs": True})
    assert response.json() == {"count": 3, "max_model_len": 1024, "tokens": [97, 195, 169], "token_strs": ["a", "\ufffd", "\ufffd"]}
    response = await client.post("/tokenize", json={"model": "bytes", "messages": CHAT["messages"], "add_generation_prompt": False})
    assert bytes(response.json()["tokens"]) == b"user: hi\n"
    response = await client.post("/detokenize", json={"model": "bytes", "tokens": [97, 195, 169, BOS, EOS]})
    assert response.json() == {"prompt": "aé"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "bytes"}, "prompt"),
        ("/tokenize", {"model": "bytes", "prompt": "x", "messages": CHAT["messages"]}, "prompt"),
        ("/tokenize", {"model": "bytes", "prompt": "x", "chat_template": "y"}, "chat_template"),
        ("/detokenize", {"model": "bytes", "tokens": [0, 9999]}, "tokens[1]"),
        ("/detokenize", {"model": "bytes", "tokens": "x"}, "tokens"),
    ],
)
async def test_tokenizer_endpoints_refuse_by_name(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert error_in(response)["param"] == param


async def test_version_openapi_and_topology(client: httpx.AsyncClient, stack: ZeroStack, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await client.get("/version")).json() == {"version": polymux.__version__}

    async def topology() -> dict[str, Any]:
        return {"is_ready": True, "workers": ({"busy_s": math.inf, "counters": {"x": 1.0}},)}

    monkeypatch.setattr(stack.control, "topology", topology)
    assert (await client.get("/v1/polymux/topology")).json() == {"is_ready": True, "workers": [{"busy_s": None, "counters": {"x": 1.0}}]}
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.removeprefix("#/components/schemas/") in schemas
    assert set(schemas["ChatCompletionRequest"]["properties"]) == set(ChatCompletionRequest.model_fields)
    assert set(schemas["CompletionRequest"]["properties"]) == set(CompletionRequest.model_fields)


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
