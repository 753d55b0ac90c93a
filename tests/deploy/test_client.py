"""The client SDK: results, streams, retries, time-outs, errors, and how little it needs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from zero_stack import ZeroStack, serving

import polymux
from polymux.deploy.client import AsyncClient, Client
from polymux.deploy.http.auth import hash_key
from polymux.deploy.sdk_stream import StreamState
from polymux.deploy.sdk_wire import MAX_DELAY_S, Attempts, ClientSettings
from polymux.transport.errors import (
    AuthenticationFailed,
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelLoading,
    ModelNotFound,
    Overloaded,
    PeerLost,
    PolymuxError,
    RateLimited,
    WorkerLost,
)

ANSWER = "user: hi\nassistant: "
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def served(make_stack: Callable[..., ZeroStack]) -> Iterator[tuple[ZeroStack, str]]:
    stack = make_stack()
    with serving(stack.app) as url:
        yield stack, url


@pytest.fixture
def sdk(served: tuple[ZeroStack, str]) -> Iterator[Client]:
    with Client(served[1]) as client:
        yield client


# -- what it returns --------------------------------------------------------------------------------------------------


def test_a_chat_and_a_completion(sdk: Client) -> None:
    answer = sdk.chat("bytes", "hi", temperature=0, n=2)
    assert (answer.text, answer.finish_reason, answer.usage.total_tokens) == (ANSWER, "stop", 62)
    assert [choice.text for choice in answer.choices] == [ANSWER, ANSWER]
    assert (
        sdk.chat("bytes", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]).text == "system: s\nuser: u\nassistant: "
    )
    completion = sdk.complete("bytes", ["ab", "cd"], logprobs=1)
    assert [choice.text for choice in completion.choices] == ["ab", "cd"]
    assert completion.choices[1].logprobs is not None
    assert completion.choices[1].logprobs.tokens == ["c", "d"]


def test_logprobs_of_a_chat_are_typed(sdk: Client) -> None:
    logprobs = sdk.chat("bytes", "hi", logprobs=True, top_logprobs=2, max_tokens=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(one.token, one.logprob) for one in logprobs.content[0].top_logprobs] == [("u", -0.25), ("v", -1.25)]


def test_the_other_endpoints(sdk: Client) -> None:
    assert [one.id for one in sdk.models()] == ["bytes"]
    assert sdk.models()[0].max_model_len == 1024
    assert sdk.tokenize("bytes", "ab").tokens == [97, 98]
    assert bytes(sdk.tokenize("bytes", messages="hi").tokens).decode() == ANSWER
    assert sdk.detokenize("bytes", [97, 98]) == "ab"
    assert sdk.health()
    assert sdk.ready()
    assert sdk.version() == polymux.__version__
    assert sdk.topology()["is_ready"] is True


def test_ready_says_why_not(sdk: Client, served: tuple[ZeroStack, str]) -> None:
    served[0].control.is_ready = False
    ready = sdk.ready()
    assert not ready
    assert ready.reasons == ["no decode worker"]


async def test_the_asynchronous_client_does_the_same(served: tuple[ZeroStack, str]) -> None:
    async with AsyncClient(served[1]) as client:
        answers = await asyncio.gather(*(client.chat("bytes", "hi") for _ in range(8)))
        assert {answer.text for answer in answers} == {ANSWER}
        assert (await client.complete("bytes", "ab")).text == "ab"
        assert [one.id for one in await client.models()] == ["bytes"]
        assert (await client.tokenize("bytes", "ab")).count == 2
        assert await client.detokenize("bytes", [97]) == "a"
        assert await client.health()
        assert await client.ready()
        assert await client.version() == polymux.__version__
        assert (await client.topology())["is_ready"] is True


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_is_an_iterator_that_adds_up(sdk: Client, served: tuple[ZeroStack, str]) -> None:
    served[0].workers[0].step_s = 0.005
    with sdk.stream_chat("bytes", "hi") as stream:
        pieces = [chunk.text for chunk in stream]
    assert "".join(pieces) == stream.text == ANSWER
    assert len(pieces) > 5
    assert (stream.finish_reason, stream.is_done) == ("stop", True)
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 21
    assert stream.ttft_s is not None
    assert stream.tpot_s is not None
    assert 0.003 < stream.tpot_s < 0.1
    assert stream.id == f"chatcmpl-{stream.request_id}"


def test_streams_of_several_choices_are_kept_apart(sdk: Client) -> None:
    stream = sdk.stream_complete("bytes", ["ab", "cd"])
    assert {chunk.index for chunk in stream} == {0, 1}
    assert stream.texts == ["ab", "cd"]
    assert stream.finish_reasons == ["stop", "stop"]


@pytest.mark.parametrize("is_entered", [True, False])
def test_leaving_a_stream_early_cancels_it(sdk: Client, served: tuple[ZeroStack, str], eventually: Any, is_entered: bool) -> None:
    stack, _ = served
    stack.workers[0].step_s = 0.01
    stream = sdk.stream_complete("bytes", "ab", max_tokens=900, ignore_eos=True)
    if is_entered:
        with stream:
            next(stream)
    else:
        next(stream)
        stream.close()
    assert eventually(lambda: stack.num_running == 0, within_s=1.0)
    assert eventually(lambda: len(stack.control.releases) == 1)
    assert stack.control.releases[0].outcome == "cancelled"


async def test_cancelling_a_task_cancels_its_request(served: tuple[ZeroStack, str]) -> None:
    stack, url = served
    stack.workers[0].step_s = 0.01

    async def follow(stream: Any) -> None:
        async with stream:
            async for _ in stream:
                pass

    async with AsyncClient(url) as client:
        for work in (
            follow(client.stream_complete("bytes", "ab", max_tokens=900, ignore_eos=True)),
            client.complete("bytes", "ab", max_tokens=900, ignore_eos=True),
        ):
            task = asyncio.ensure_future(work)
            while not stack.num_running:
                await asyncio.sleep(0.005)
            task.cancel()
            async with asyncio.timeout(1.0):
                while stack.num_running:
                    await asyncio.sleep(0.005)
            with pytest.raises(asyncio.CancelledError):
                await task


def test_an_error_in_a_stream_is_raised_with_its_class(sdk: Client, served: tuple[ZeroStack, str]) -> None:
    stack, _ = served
    stack.workers[0].step_s = 0.01
    stack.workers[0].failures[2] = DeadlineExceeded("late")
    stream = sdk.stream_complete("bytes", "abcdef")
    with pytest.raises(DeadlineExceeded, match="late"):
        stream.read()
    assert stream.text == "ab"


async def test_a_refused_stream_raises_when_it_is_opened(served: tuple[ZeroStack, str]) -> None:
    async with AsyncClient(served[1]) as client:
        with pytest.raises(ModelNotFound):
            async with client.stream_chat("other", "hi"):
                pass
        assert await client.stream_chat("bytes", "hi").read() == ANSWER


@pytest.mark.parametrize(
    ("parts", "texts"),
    [
        ([b'data: {"choices":[{"index":0,"text":"a"}]}\n\ndata: [DONE]\n\n'], ["a"]),
        ([b": ping\n\nda", b'ta:{"choices":[{"index":0,"text":"\xc3', b'\xa9"}]}\r\n\r\ndata: [DONE]\n\n'], ["é"]),
        ([b'event: x\nid: 1\ndata: {"choices":\ndata: [{"index":0,"text":"b"}]}\n\n', b"data: [DONE]\n\n"], ["b"]),
        ([bytes([byte]) for byte in 'data: {"choices":[{"index":0,"text":"\u2028"}]}\n\ndata: [DONE]\n\n'.encode()], ["\u2028"]),
    ],
)
def test_events_are_read_however_their_bytes_are_cut(parts: list[bytes], texts: list[str]) -> None:
    state = StreamState()
    assert [chunk.text for part in parts for chunk in state.feed(part)] == texts
    state.check_end()


def test_a_connection_that_ends_early_is_an_error() -> None:
    state = StreamState()
    assert len(list(state.feed(b'data: {"choices":[{"index":0,"text":"a"}]}\n\n'))) == 1
    with pytest.raises(PeerLost):
        state.check_end()
    with pytest.raises(PeerLost, match="not JSON"):
        list(state.feed(b"data: {\n\n"))


# -- errors and retries -----------------------------------------------------------------------------------------------


def test_refusals_come_as_their_class(sdk: Client, served: tuple[ZeroStack, str]) -> None:
    with pytest.raises(ModelNotFound) as missing:
        sdk.chat("other", "hi")
    assert missing.value.param == "model"
    with pytest.raises(ContextLengthExceeded):
        sdk.complete("bytes", "x" * 2000)
    with pytest.raises(InvalidRequest) as invalid:
        sdk.chat("bytes", "hi", tools=[{}])
    assert invalid.value.param == "tools"
    assert invalid.value.request_id
    with pytest.raises(InvalidRequest, match="stream_chat"):
        sdk.chat("bytes", "hi", stream=True)
    assert len(served[0].control.asks) == 0


def test_a_key_is_sent_from_arguments_or_environment(make_stack: Callable[..., ZeroStack], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = make_stack(http_settings={"api_keys": (hash_key("the-first-key"),)})
    monkeypatch.delenv("POLYMUX_API_KEY", raising=False)
    with serving(stack.app) as url:
        with Client(url + "/v1/") as stranger, pytest.raises(AuthenticationFailed):
            stranger.models()
        with Client(url, "the-first-key") as client:
            assert client.models()
        monkeypatch.setenv("POLYMUX_BASE_URL", url)
        monkeypatch.setenv("POLYMUX_API_KEY", "the-first-key, the-second-key")
        with Client() as client:
            assert client.models()


def flaky(*failures: Any) -> tuple[httpx.MockTransport, list[float]]:
    """A server that fails in these ways, one a request, and then answers; and when it was asked."""
    asked: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(time.monotonic())
        if len(asked) <= len(failures):
            failure = failures[len(asked) - 1]
            if isinstance(failure, Exception):
                raise failure
            status, headers, code = failure
            error = {"message": "no", "type": "t", "param": None, "code": code}
            return httpx.Response(status, headers=headers, json={"error": error})
        return httpx.Response(200, json={"version": "1"})

    return httpx.MockTransport(answer), asked


@pytest.mark.parametrize(
    "failure", [(429, {}, "rate_limit_exceeded"), (503, {}, "overloaded"), httpx.ConnectError("refused"), httpx.ConnectTimeout("slow")]
)
def test_what_may_pass_is_tried_again(failure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.deploy.sdk_wire.FIRST_DELAY_S", 0.01)
    transport, asked = flaky(failure, failure)
    with Client("http://x", transport=transport) as client:
        assert client.version() == "1"
    assert len(asked) == 3


async def test_the_asynchronous_client_tries_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.deploy.sdk_wire.FIRST_DELAY_S", 0.01)
    transport, asked = flaky((503, {}, "overloaded"), httpx.ConnectError("refused"))
    async with AsyncClient("http://x", transport=transport) as client:
        assert await client.version() == "1"
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((400, {}, None), InvalidRequest),
        ((500, {}, "internal_error"), PolymuxError),
        ((504, {}, "upstream_timeout"), WorkerLost),
        ((408, {}, "request_timeout"), DeadlineExceeded),
        ((503, {"x-should-retry": "false"}, "overloaded"), Overloaded),
        ((503, {"retry-after": "3600"}, "model_loading"), ModelLoading),
        (httpx.ReadTimeout("silent"), DeadlineExceeded),
        (httpx.RemoteProtocolError("broken"), PeerLost),
    ],
)
def test_what_will_not_pass_is_raised_at_once(failure: Any, expected: type[PolymuxError]) -> None:
    transport, asked = flaky(failure)
    with Client("http://x", transport=transport) as client, pytest.raises(expected) as caught:
        client.version()
    assert type(caught.value) is expected
    assert len(asked) == 1


def test_retries_are_bounded_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.deploy.sdk_wire.FIRST_DELAY_S", 0.01)
    transport, asked = flaky(*[(503, {}, "overloaded")] * 10)
    with Client("http://x", transport=transport, max_retries=2) as client, pytest.raises(Overloaded):
        client.version()
    assert len(asked) == 3
    transport, asked = flaky(*[(429, {"retry-after": "5"}, "rate_limit_exceeded")] * 10)
    with Client("http://x", transport=transport, timeout_s=1.0) as client, pytest.raises(RateLimited) as caught:
        client.version()
    assert caught.value.retry_after_s == 5.0
    assert len(asked) == 1


def test_a_servers_wish_to_wait_is_respected() -> None:
    transport, asked = flaky((503, {"retry-after": "0.4"}, "overloaded"))
    with Client("http://x", transport=transport) as client:
        client.version()
    assert asked[1] - asked[0] >= 0.4


def test_delays_grow_to_a_bound_and_are_never_in_step() -> None:
    settings = ClientSettings(base_url="http://x", api_key=None, timeout_s=1e6, connect_timeout_s=1.0, max_retries=12)
    delays = [
        [attempts.delay_after(httpx.ConnectError("no")) or 0.0 for _ in range(12)] for attempts in (Attempts(settings), Attempts(settings))
    ]
    for number, delay in enumerate(delays[0]):
        highest = min(0.25 * 2**number, MAX_DELAY_S)
        assert highest / 2 <= delay <= highest
    assert delays[0] != delays[1]


def test_a_server_that_cannot_be_reached_is_named() -> None:
    with Client("http://127.0.0.1:9", max_retries=0) as client, pytest.raises(PeerLost, match=r"127\.0\.0\.1:9"):
        client.models()


def test_a_servers_deadline_is_the_clients(sdk: Client, served: tuple[ZeroStack, str]) -> None:
    served[0].workers[0].step_s = 0.02
    with Client(served[1], timeout_s=0.3) as hurried:
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            hurried.complete("bytes", "ab", max_tokens=900, ignore_eos=True)
        assert time.monotonic() - started_s < 2.0
    assert served[0].control.asks[0].deadline_s <= 0.3


def test_a_page_that_is_no_error_body_is_still_an_error() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(502, text="<html>Bad Gateway</html>"))
    with Client("http://x", transport=transport) as client, pytest.raises(PolymuxError, match="502"):
        client.models()


@pytest.mark.parametrize(
    "wrong", [{"base_url": "ftp://x"}, {"base_url": "http://x", "timeout_s": 0}, {"base_url": "http://x", "max_retries": -1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Client(**wrong)


# -- what it needs ----------------------------------------------------------------------------------------------------


def test_it_imports_and_works_without_any_server_part(served: tuple[ZeroStack, str]) -> None:
    code = f"""
import sys
for name in ("torch", "ray", "starlette", "uvicorn", "msgpack", "numpy", "tokenizers", "prometheus_client", "jinja2"):
    sys.modules[name] = None
import polymux
with polymux.Client({served[1]!r}) as client:
    assert client.stream_chat("bytes", "hi").read() == {ANSWER!r}
    assert client.chat("bytes", "hi").text == {ANSWER!r}
assert polymux.AsyncClient
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def test_a_client_may_be_shared_by_threads(sdk: Client) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(sdk.chat("bytes", "hi").text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert texts == [ANSWER] * 8
