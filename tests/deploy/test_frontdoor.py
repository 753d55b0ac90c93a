"""Requests whatever happens to their workers, their client and their controller: no gap, no block kept, one release each."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from zero_stack import ZeroStack, serving

from polymux.transport.errors import PeerLost, PolymuxError, TransferTimeout, WorkerLost
from polymux.transport.units import unpack_ids

MakeStack = Callable[..., ZeroStack]
Connect = Callable[[ZeroStack], Any]
TEXT = "The quick brown fox jumps over the lazy dog. " * 4
PROMPT: dict[str, Any] = {"model": "bytes", "prompt": TEXT, "max_tokens": 200}


async def until(claim: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait for a claim to come true; fail if it does not."""
    async with asyncio.timeout(within_s):
        while not claim():
            await asyncio.sleep(0.002)


# -- lost workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_killed_workers_requests_go_on_elsewhere_without_a_gap(make_stack: MakeStack, connect: Connect, is_stream: bool) -> None:
    stack = make_stack(num_workers=2, step_s=0.003)
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json={**PROMPT, "stream": is_stream, "n": 3, "seed": 9}))
        await until(lambda: stack.workers[0].num_running == 3)
        await asyncio.sleep(0.1)
        await asyncio.to_thread(stack.workers[0].stop)
        response = await request
    if is_stream:
        found = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
        texts = ["".join(e["choices"][0]["text"] for e in found if e["choices"][0]["index"] == i) for i in range(3)]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts == [TEXT] * 3
    replays = stack.workers[1].commands
    assert len(replays) == 3
    for command in replays:
        done = bytes(unpack_ids(command.output_ids))
        assert len(done) > 5
        assert TEXT.encode().startswith(done), "the new worker is told what its client has"
    first = {command.sampling.seed for command in stack.workers[0].commands}
    assert {command.sampling.seed for command in replays} == first
    assert {ask.request_id for ask in stack.control.asks} == {stack.control.asks[0].request_id}
    assert set(stack.control.asks[-1].excluded) == {"prefill-0", "decode-0"}
    assert [release.outcome for release in stack.control.releases] == ["finished"]
    assert b'polymux:replays_total{model_name="bytes"} 3.0' in stack.frontdoor.metrics.render(None)


async def test_only_sequences_that_need_it_are_placed_anew(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(num_workers=2, step_s=0.003)
    stack.workers[0].failures[1] = TransferTimeout("decode heard nothing")
    async with connect(stack) as client:
        response = await client.post("/v1/completions", json={**PROMPT, "n": 3})
    assert [choice["text"] for choice in response.json()["choices"]] == [TEXT] * 3
    replayed = {int(command.sequence_id.split("/")[1].split(".")[0]) for command in stack.workers[1].commands}
    assert len(replayed) == 1 and set(stack.control.asks[-1].staying) == {0, 1, 2} - replayed


async def test_a_worker_that_cannot_be_reached_is_replaced(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(num_workers=2)
    stack.workers[0].stop()
    async with connect(stack) as client:
        response = await client.post("/v1/completions", json=PROMPT)
    assert response.json()["choices"][0]["text"] == TEXT
    assert set(stack.control.asks[-1].excluded) == {"prefill-0", "decode-0"}


async def test_a_worker_that_came_back_as_another_incarnation_serves(make_stack: MakeStack, connect: Connect) -> None:
    """Nobody else can, and for a while the controller sends to the dead one: that is waited out, and its name excluded no longer."""
    stack = make_stack(num_workers=2, step_s=0.003)
    stack.control.pairs.pop()
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        await until(lambda: stack.workers[0].num_running == 1)
        stack.workers[0].stop()
        await asyncio.sleep(0.4)
        assert len(stack.control.asks) > 4
        stack.control.pairs[:] = [(stack.workers[1].prefill, stack.workers[1].decode)]
        response = await request
    assert response.json()["choices"][0]["text"] == TEXT


async def test_a_lost_prefill_worker_matters_only_while_it_owes_a_token(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(num_workers=2, step_s=0.003)
    prefill_of_second = stack.workers[1].prefill
    stack.control.pairs[:] = [(prefill_of_second, stack.workers[0].decode)]
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        await until(lambda: stack.frontdoor.num_open_links == 2 and stack.workers[0].num_running == 1)
        await asyncio.sleep(0.05)
        await asyncio.to_thread(stack.workers[1].stop)
        response = await request
    assert response.json()["choices"][0]["text"] == TEXT
    assert len(stack.control.asks) == 1


async def test_a_first_token_that_died_with_its_prefill_worker_is_made_again(make_stack: MakeStack, connect: Connect) -> None:
    """The decode worker goes on, but the client would have a gap."""
    stack = make_stack(num_workers=2, step_s=0.003)
    dead = stack.workers[1]
    stack.control.pairs[:] = [(dead.prefill, stack.workers[0].decode), (stack.workers[0].prefill, stack.workers[0].decode)]
    dead.prefill_server.send = lambda *_: False  # type: ignore[method-assign]
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        await until(lambda: stack.workers[0].num_running == 1)
        await asyncio.sleep(0.05)
        await asyncio.to_thread(dead.stop)
        response = await request
    assert response.json()["choices"][0]["text"] == TEXT
    assert len(stack.workers[0].commands) == 2
    assert stack.workers[0].cancelled == [stack.workers[0].commands[0].sequence_id]


async def test_when_every_worker_dies_the_request_fails_in_time(
    make_stack: MakeStack, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polymux.deploy.http.placer.READMIT_PAUSES_S", (0.01, 0.02))
    stack = make_stack(step_s=0.003)
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        await until(lambda: stack.workers[0].num_running == 1)
        await asyncio.to_thread(stack.workers[0].stop)
        response = await request
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "upstream_timeout"
    assert response.headers["retry-after"] == "1"
    assert [release.outcome for release in stack.control.releases] == ["failed"]


@pytest.mark.parametrize("is_first_dead", [False, True])
async def test_what_a_worker_gives_up_goes_on_elsewhere_with_its_kv(make_stack: MakeStack, connect: Connect, is_first_dead: bool) -> None:
    """No replay, no gap; the new worker is told where the KV is. The old worker's death afterwards changes nothing."""
    stack = make_stack(num_workers=2, step_s=0.003, frontdoor_settings={"max_replays": 0})
    old, new = stack.workers
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json={**PROMPT, "n": 3, "seed": 9}))
        await until(lambda: old.num_running == 3)
        await asyncio.sleep(0.1)
        stack.control.emptied = [old.decode.worker_id]
        old.move()
        await until(lambda: new.num_running == 3)
        await asyncio.sleep(0.05)
        if is_first_dead:
            await asyncio.to_thread(old.stop)
        response = await request
    assert [choice["text"] for choice in response.json()["choices"]] == [TEXT] * 3
    assert stack.control.asks[-1].moving == (0, 1, 2) and stack.control.asks[-1].excluded == ()
    assert [command.handover for command in new.commands] == [command.sequence_id for command in old.commands]
    assert {command.prefill.worker_id for command in new.commands} == {old.decode.worker_id}
    assert b'polymux:replays_total{model_name="bytes"} 0.0' in stack.frontdoor.metrics.render(None)
    assert [release.outcome for release in stack.control.releases] == ["finished"]


async def test_a_client_that_goes_while_its_sequence_moves_frees_it_where_it_was_kept(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(num_workers=1, step_s=0.003)
    old = stack.workers[0]
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json={**PROMPT, "stream": True}))
        await until(lambda: old.num_running == 1)
        await asyncio.sleep(0.05)
        stack.control.emptied = [old.decode.worker_id]
        old.move()  # and nobody else is there
        await until(lambda: bool(stack.control.asks[-1].moving))
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await until(lambda: old.cancelled == [old.commands[0].sequence_id])


async def test_replays_are_bounded(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(num_workers=2, frontdoor_settings={"max_replays": 2})
    for worker in stack.workers:
        worker.failures = _Endless(WorkerLost("again"))
    async with connect(stack) as client:
        response = await client.post("/v1/completions", json=PROMPT)
    assert response.status_code == 504
    assert sum(len(worker.commands) for worker in stack.workers) == 3


class _Endless(dict[int, PolymuxError]):
    """The same failure at whatever token."""

    def __init__(self, error: PolymuxError) -> None:
        super().__init__()
        self._error = error

    def pop(self, *_: Any) -> PolymuxError:
        return self._error


# -- clients that leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_is_cancelled_at_the_worker_at_once(make_stack: MakeStack, is_stream: bool) -> None:
    stack = make_stack(step_s=0.005)
    body = {**PROMPT, "ignore_eos": True, "max_tokens": 800, "n": 4, "stream": is_stream}
    with serving(stack.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            request = asyncio.create_task(_read_a_little(client, body))
            await until(lambda: stack.num_running == 4)
            if is_stream:
                await asyncio.sleep(0.1)
            request.cancel()
            left_s = time.monotonic()
            await until(lambda: stack.num_running == 0, within_s=1.0)
            assert time.monotonic() - left_s < 1.0
        await until(lambda: len(stack.control.releases) == 1)
    assert sorted(stack.workers[0].cancelled) == sorted(command.sequence_id for command in stack.workers[0].commands)
    assert stack.control.releases[0].outcome == "cancelled"
    assert stack.frontdoor.num_open_requests == 0
    assert b'polymux:http_responses_total{path="/v1/completions",status="499"} 1.0' in stack.frontdoor.metrics.render(None)


async def _read_a_little(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            pass


async def test_a_client_that_never_reads_is_left_at_its_deadline(make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.deploy.http.generate.SEND_GRACE_S", 0.2)
    stack = make_stack(frontdoor_settings={"request_timeout_s": 1.0})
    body = json.dumps({**PROMPT, "ignore_eos": True, "max_tokens": 800, "n": 16, "logprobs": 20, "stream": True}).encode()
    with serving(stack.app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: stack.frontdoor.num_open_requests == 1)
            await until(lambda: stack.frontdoor.num_open_requests == 0, within_s=5.0)
    await until(lambda: stack.num_running == 0 and len(stack.control.releases) == 1)


async def test_what_a_client_does_not_read_is_bounded(make_stack: MakeStack) -> None:
    stack = make_stack(frontdoor_settings={"max_pending_updates": 500})
    body = json.dumps({**PROMPT, "ignore_eos": True, "max_tokens": 800, "n": 16, "logprobs": 20, "stream": True}).encode()
    with serving(stack.app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: len(stack.workers[0].cancelled) == 16)
        await until(lambda: len(stack.control.releases) == 1)
    assert stack.control.releases[0].outcome == "cancelled"
    assert stack.num_running == 0


# -- the controller, and the end ---------------------------------------------------------------------------------------


async def test_the_controller_hears_that_a_front_door_lives(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(frontdoor_settings={"heartbeat_interval_s": 0.02})
    async with connect(stack):
        await until(lambda: stack.control.heartbeats > 3)


async def test_streams_go_on_while_the_controller_is_away(make_stack: MakeStack, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(step_s=0.003, frontdoor_settings={"heartbeat_interval_s": 0.02, "models_ttl_s": 0.01})

    async def gone(*_: Any) -> Any:
        raise PeerLost("no controller")

    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        await until(lambda: stack.num_running == 1)
        back = stack.control.heartbeat
        for name in ("heartbeat", "models", "topology", "admit"):
            monkeypatch.setattr(stack.control, name, gone)
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "bytes"
        assert (await client.get("/ready")).status_code == 503
        assert (await client.post("/v1/completions", json=PROMPT)).status_code == 503
        assert (await request).json()["choices"][0]["text"] == TEXT
        monkeypatch.setattr(stack.control, "heartbeat", back)
        before = stack.control.heartbeats
        await until(lambda: stack.control.heartbeats > before)


async def test_a_known_model_does_not_wait_for_a_controller_that_hangs(
    make_stack: MakeStack, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = make_stack(frontdoor_settings={"models_ttl_s": 0.01})

    async def hang() -> Any:
        await asyncio.sleep(60)

    async with connect(stack) as client:
        await client.get("/v1/models")
        monkeypatch.setattr(stack.control, "models", hang)
        await asyncio.sleep(0.02)
        async with asyncio.timeout(2.0):
            assert (await client.post("/v1/completions", json=PROMPT)).json()["choices"][0]["text"] == TEXT
            assert (await client.get("/v1/models")).status_code == 200


async def test_a_controller_that_hangs_is_not_waited_for(make_stack: MakeStack, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(frontdoor_settings={"control_timeout_s": 0.1})

    async def hang(*_: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(stack.control, "admit", hang)
    async with connect(stack) as client:
        response = await client.post("/v1/completions", json=PROMPT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
        hurried = await client.post("/v1/completions", json=PROMPT, headers={"x-request-timeout-s": "0.05"})
        assert (hurried.status_code, hurried.json()["error"]["code"]) == (408, "request_timeout")
        await until(lambda: len(stack.control.releases) == 2)


async def test_a_release_that_fails_is_tried_again(make_stack: MakeStack, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack()
    tried = []
    release = stack.control.release

    async def flaky(message: Any) -> None:
        tried.append(message)
        if len(tried) == 1:
            raise PeerLost("no controller")
        await release(message)

    monkeypatch.setattr(stack.control, "release", flaky)
    async with connect(stack) as client:
        await client.post("/v1/completions", json=PROMPT)
        await until(lambda: len(stack.control.releases) == 1)
    assert tried == [stack.control.releases[0]] * 2


async def test_a_release_tells_what_the_request_was(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.004)
    async with connect(stack) as client:
        await client.post("/v1/completions", json={**PROMPT, "max_tokens": 20, "n": 2})
    release = stack.control.releases[0]
    assert (release.request_id, release.num_output_tokens) == (stack.control.asks[0].request_id, 40)
    assert release.ttft_s is not None
    assert release.tpot_s is not None
    assert 0.003 < release.tpot_s < 0.1


async def test_closing_waits_for_open_requests_and_refuses_new_ones(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.002)
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json=PROMPT))
        await until(lambda: stack.num_running == 1)
        closing = asyncio.create_task(stack.frontdoor.aclose())
        await asyncio.sleep(0.01)
        assert (await client.post("/v1/completions", json=PROMPT)).json()["error"]["code"] == "draining"
        assert (await request).json()["choices"][0]["text"] == TEXT
        await closing
        assert stack.frontdoor.num_open_links == 0


async def test_closing_does_not_wait_for_ever(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(step_s=0.005, frontdoor_settings={"drain_timeout_s": 0.1})
    async with connect(stack) as client:
        request = asyncio.create_task(client.post("/v1/completions", json={**PROMPT, "ignore_eos": True, "max_tokens": 800}))
        await until(lambda: stack.num_running == 1)
        await stack.frontdoor.aclose()
        assert (await request).json()["error"]["code"] == "draining"
    await until(lambda: stack.num_running == 0)
    assert [release.outcome for release in stack.control.releases] == ["failed"]


async def test_many_clients_at_once_each_get_their_own_text_and_nothing_is_left(make_stack: MakeStack, connect: Connect) -> None:
    stack = make_stack(num_workers=2)
    async with connect(stack) as client:
        prompts = [f"{i}: " + TEXT[: 20 + i] for i in range(64)]
        responses = await asyncio.gather(
            *(client.post("/v1/completions", json={**PROMPT, "prompt": p, "stream": i % 2 == 0}) for i, p in enumerate(prompts))
        )
        for prompt, response in zip(prompts, responses, strict=True):
            if response.headers["content-type"].startswith("text/event-stream"):
                found = [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-2]]
                assert "".join(event["choices"][0]["text"] for event in found) == prompt
            else:
                assert response.json()["choices"][0]["text"] == prompt
        await until(lambda: len(stack.control.releases) == 64)
    assert stack.num_running == 0
    assert stack.frontdoor.num_open_requests == 0
