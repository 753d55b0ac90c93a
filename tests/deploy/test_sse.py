"""Streams, event by event: what comes first and last, what is never split, and what happens when nothing or an error comes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from zero_stack import ZeroStack, serving

from polymux.deploy.http.formats import quote
from polymux.transport.errors import OutOfMemory, TransferTimeout

MakeStack = Callable[..., ZeroStack]
Connect = Callable[[ZeroStack], Any]
CHAT: dict[str, Any] = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PROMPT: dict[str, Any] = {"model": "bytes", "prompt": "hello", "max_tokens": 64, "stream": True}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream, whose framing is exact."""
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *parts, rest = response.content.decode().split("\n\n")
    assert rest == ""
    assert parts[-1] == "data: [DONE]"
    lines = [part for part in parts[:-1] if part != ": ping"]
    assert all(line.startswith("data: ") and len(line.splitlines()) == 1 for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_chat_stream_says_role_then_content_then_reason(client: httpx.AsyncClient) -> None:
    found = events(await client.post("/v1/chat/completions", json=CHAT))
    choices = [event["choices"][0] for event in found]
    assert choices[0] == {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert "".join(choice["delta"]["content"] for choice in choices[1:-1]) == "user: hi\nassistant: "
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in found}) == 1
    assert found[0]["object"] == "chat.completion.chunk"
    assert all("usage" not in event for event in found)


async def test_a_completion_stream_carries_text(client: httpx.AsyncClient) -> None:
    found = events(await client.post("/v1/completions", json={**PROMPT, "echo": True}))
    assert "".join(event["choices"][0]["text"] for event in found) == "hellohello"
    assert found[0]["choices"][0] == {"index": 0, "text": "hello", "logprobs": None, "finish_reason": None}
    assert found[-1]["choices"][0]["finish_reason"] == "stop"
    assert {event["object"] for event in found} == {"text_completion"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_usage_comes_last_and_is_null_before(client: httpx.AsyncClient, path: str) -> None:
    body = {**(CHAT if "chat" in path else PROMPT), "stream_options": {"include_usage": True}}
    *others, last = events(await client.post(path, json=body))
    assert all(event["usage"] is None and event["choices"] for event in others)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert last["usage"]["completion_tokens"] == last["usage"]["prompt_tokens"] + 1


async def test_continuous_usage_counts_up(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        event["usage"]["completion_tokens"]
        for event in events(await client.post("/v1/completions", json={**PROMPT, "stream_options": options}))
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 6


async def test_choices_are_told_apart_by_index(client: httpx.AsyncClient) -> None:
    found = events(await client.post("/v1/completions", json={**PROMPT, "prompt": ["ab", "cd"], "n": 2}))
    texts = {index: "".join(e["choices"][0]["text"] for e in found if e["choices"][0]["index"] == index) for index in range(4)}
    assert texts == {0: "ab", 1: "ab", 2: "cd", 3: "cd"}
    assert sorted(e["choices"][0]["index"] for e in found if e["choices"][0]["finish_reason"]) == [0, 1, 2, 3]


async def test_logprobs_are_streamed_with_their_text(client: httpx.AsyncClient) -> None:
    found = events(await client.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 1}))
    for choice in (event["choices"][0] for event in found[1:-1]):
        named = bytes(byte for token in choice["logprobs"]["content"] for byte in token["bytes"])
        assert named.decode() == choice["delta"]["content"]
    offsets = []
    for event in events(await client.post("/v1/completions", json={**PROMPT, "logprobs": 0})):
        if event["choices"][0]["logprobs"]:
            offsets += event["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 1, 2, 3, 4]


async def test_a_token_has_its_event_when_the_client_keeps_up(stack: ZeroStack) -> None:
    """The engine steps when the event of the step before has gone out."""
    may_step = threading.Semaphore(1)
    stack.workers[0].may_step = lambda: may_step.acquire(timeout=5.0)

    async def paced(scope: Any, receive: Any, send: Any) -> None:
        async def send_and_go_on(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                may_step.release()

        await stack.app(scope, receive, send_and_go_on)

    await stack.frontdoor.start()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(paced), base_url="http://front") as client:
        response = await client.post("/v1/completions", json=PROMPT)
    assert [event["choices"][0]["text"] for event in events(response)] == ["h", "e", "l", "l", "o", ""]
    await stack.frontdoor.aclose()


async def test_no_event_splits_a_character(make_stack: MakeStack, connect: Connect) -> None:
    async with connect(make_stack(step_s=0.002)) as client:
        response = await client.post("/v1/completions", json={**PROMPT, "prompt": "a€😀b"})
    texts = [event["choices"][0]["text"] for event in events(response)]
    assert len(texts) > 2
    assert "".join(texts) == "a€😀b"


async def test_no_letter_of_a_stop_string_is_streamed(make_stack: MakeStack, connect: Connect) -> None:
    async with connect(make_stack(step_s=0.002)) as client:
        found = events(await client.post("/v1/completions", json={**PROMPT, "prompt": "a</ b</s>c", "stop": "</s>"}))
    assert "".join(event["choices"][0]["text"] for event in found) == "a</ b"
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_no_text_breaks_a_line(end: str) -> None:
    assert len(quote(f"a{end}b").splitlines()) == 1
    assert json.loads(quote(f"a{end}b")) == f"a{end}b"


async def test_an_error_before_the_first_token_has_its_own_status(client: httpx.AsyncClient, stack: ZeroStack) -> None:
    stack.workers[0].failures[0] = OutOfMemory("arena")
    response = await client.post("/v1/completions", json=PROMPT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


async def test_an_error_after_the_first_token_is_the_last_event(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.005)
    stack.workers[0].failures[2] = OutOfMemory("arena")
    async with connect(stack) as client:
        *tokens, last = events(await client.post("/v1/completions", json=PROMPT))
    assert "".join(event["choices"][0]["text"] for event in tokens) == "he"
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["type"] == "server_error"
    assert [release.outcome for release in stack.control.releases] == ["failed"]


async def test_a_deadline_in_a_stream_is_its_last_event(make_stack: MakeStack, connect: Connect) -> None:
    async with connect(make_stack(step_s=0.02)) as client:
        body = {**PROMPT, "ignore_eos": True, "max_tokens": 900}
        *_, last = events(await client.post("/v1/completions", json=body, headers={"x-request-timeout-s": "0.3"}))
    assert last["error"]["code"] == "request_timeout"


async def test_a_silent_stream_is_kept_open_by_comments(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(http_settings={"first_byte_s": 0.05, "keep_alive_s": 0.05})
    may_go = threading.Event()
    stack.workers[0].may_step = lambda: may_go.wait(5.0)
    async with connect(stack) as client:
        asyncio.get_running_loop().call_later(0.3, may_go.set)
        response = await client.post("/v1/chat/completions", json=CHAT)
    parts = response.text.split("\n\n")
    assert '"role":"assistant"' in parts[0], "the headers and the role do not wait for ever"
    assert parts[1:3] == [": ping", ": ping"]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(response)) == "user: hi\nassistant: "


async def test_headers_wait_for_the_first_token(make_stack: MakeStack) -> None:
    stack = make_stack()
    may_go = threading.Event()
    stack.workers[0].may_step = lambda: may_go.wait(5.0)
    with serving(stack.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            sending = asyncio.create_task(client.send(client.build_request("POST", "/v1/completions", json=PROMPT), stream=True))
            await asyncio.sleep(0.2)
            assert not sending.done()
            may_go.set()
            response = await sending
            await response.aread()
    assert response.status_code == 200


async def test_a_failed_transfer_is_tried_again_and_not_seen(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.003, num_workers=2)
    stack.workers[0].failures[1] = TransferTimeout("decode heard nothing")
    async with connect(stack) as client:
        found = events(await client.post("/v1/completions", json=PROMPT))
    assert "".join(event["choices"][0]["text"] for event in found) == "hello"
    assert stack.control.asks[1].excluded == ("prefill-0",)


def test_a_client_that_reads_slowly_gets_fewer_and_longer_events(make_stack: MakeStack) -> None:
    stack = make_stack()
    with serving(stack.app) as url, httpx.Client(base_url=url) as client:
        body = {**PROMPT, "prompt": "word " * 20, "ignore_eos": True, "max_tokens": 900, "n": 16, "logprobs": 20}
        with client.stream("POST", "/v1/completions", json=body) as response:
            time.sleep(0.5)
            content = response.read()
    num_events = content.count(b"\n\n") - 1
    assert num_events < 16 * 900 / 4
    texts = [json.loads(part.removeprefix(b"data: "))["choices"][0]["text"] for part in content.split(b"\n\n")[:-2]]
    assert sum(map(len, texts)) == 16 * 900
