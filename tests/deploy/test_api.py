"""The HTTP application as clients meet it: bodies, statuses and headers."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_bodies import CHAT, PROMPT, Connect, MakeStack, error_in
from zero_stack import BOS, EOS, ZeroStack, byte_spec, write_checkpoint

import polymux
from polymux.deploy.http.openai import ChatCompletionRequest, CompletionRequest

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
    assert 0.2 < command.due_in_s <= 0.25 and command.tpot_slo_s == 0.0125


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
