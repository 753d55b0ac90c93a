"""The official `openai` package, unchanged, against the server on a real socket; its own types check what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from zero_stack import ZeroStack, serving

from polymux.deploy.http.auth import hash_key
from polymux.transport.errors import Overloaded, PolymuxError

KEY = "an-api-key"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
ANSWER = "user: hi\nassistant: "


@pytest.fixture
def served(make_stack: Callable[..., ZeroStack]) -> Iterator[tuple[ZeroStack, str]]:
    stack = make_stack(http_settings={"api_keys": (hash_key(KEY),)})
    with serving(stack.app) as url:
        yield stack, f"{url}/v1"


@pytest.fixture
def official(served: tuple[ZeroStack, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served[1], api_key=KEY) as client:
        yield client


def strict(result: BaseModel) -> BaseModel:
    """The client builds its types without checking; check them. A field that the type does not declare would be an extra."""
    checked = type(result).model_validate_json(result.model_dump_json(), strict=True)
    assert not checked.model_extra, f"{type(result).__name__} has no {checked.model_extra}"
    return checked


def test_models(official: openai.OpenAI) -> None:
    models = official.models.list().data
    assert [one.id for one in models] == ["bytes"]
    one = official.models.retrieve("bytes")
    assert Model.model_validate(one.model_dump(), strict=True).owned_by == "polymux"


def test_a_chat(official: openai.OpenAI) -> None:
    result = official.chat.completions.create(
        model="bytes", messages=MESSAGES, logprobs=True, top_logprobs=3, seed=1, temperature=0.5, n=2, service_tier="auto"
    )
    assert isinstance(strict(result), ChatCompletion)
    assert [choice.message.content for choice in result.choices] == [ANSWER, ANSWER]
    content = result.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert bytes(byte for token in content for byte in token.bytes or ()).decode() == ANSWER
    assert all(len(token.top_logprobs) == 3 for token in content)


def test_a_streamed_chat(official: openai.OpenAI) -> None:
    stream = official.chat.completions.create(
        model="bytes", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2
    )
    chunks = list(stream)
    assert all(isinstance(strict(chunk), ChatCompletionChunk) for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 41


def test_the_clients_own_helper_accumulates_our_stream(official: openai.OpenAI) -> None:
    with official.chat.completions.stream(model="bytes", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER


def test_a_completion(official: openai.OpenAI) -> None:
    result = official.completions.create(model="bytes", prompt=["ab", "cd"], max_tokens=9, logprobs=2, n=2, best_of=2)
    assert isinstance(strict(result), Completion)
    assert [choice.text for choice in result.choices] == ["ab", "ab", "cd", "cd"]
    assert result.choices[0].logprobs is not None
    assert result.choices[0].logprobs.tokens == ["a", "b"]


def test_a_streamed_completion(official: openai.OpenAI) -> None:
    chunks = list(official.completions.create(model="bytes", prompt="ab", echo=True, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abab"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    for chunk in chunks:
        for choice in chunk.choices:
            choice.finish_reason = choice.finish_reason or "stop"  # the type lacks the null that the API itself sends before the end
        assert isinstance(strict(chunk), Completion)
    assert chunks[-1].usage is not None


def test_our_extensions_go_by_extra_body(official: openai.OpenAI, served: tuple[ZeroStack, str]) -> None:
    official.completions.create(model="bytes", prompt="ab", extra_body={"top_k": 3, "min_tokens": 1, "ignore_eos": True}, max_tokens=4)
    sampling = served[0].workers[0].commands[0].sampling
    assert (sampling.top_k, sampling.min_tokens, sampling.ignore_eos) == (3, 1, True)


def test_errors_are_the_clients_own(official: openai.OpenAI, served: tuple[ZeroStack, str]) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        official.chat.completions.create(model="bytes", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (bad.value.param, bad.value.type) == ("tools", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        official.completions.create(model="bytes", prompt="x" * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        official.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=served[1], api_key="wrong") as stranger:
        stranger.models.list()


def test_the_client_tries_again_after_a_refusal(official: openai.OpenAI, served: tuple[ZeroStack, str]) -> None:
    control = served[0].control
    admit = control.admit

    async def refuse_once(ask: Any) -> Any:
        control.admit = admit  # type: ignore[method-assign]
        raise Overloaded("full", retry_after_s=0.01)

    control.admit = refuse_once  # type: ignore[method-assign]
    assert official.completions.create(model="bytes", prompt="ab").choices[0].text == "ab"


def test_an_error_inside_a_stream_is_raised(served: tuple[ZeroStack, str], official: openai.OpenAI) -> None:
    stack, _ = served
    stack.workers[0].step_s = 0.01
    stack.workers[0].failures[1] = PolymuxError("bug")
    with pytest.raises(openai.APIError) as caught:
        for _ in official.completions.create(model="bytes", prompt="abcdef", stream=True):
            pass
    assert caught.value.type == "server_error"


async def test_leaving_a_stream_cancels_it(served: tuple[ZeroStack, str]) -> None:
    stack, url = served
    stack.workers[0].step_s = 0.01
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:
        stream = await client.completions.create(model="bytes", prompt="ab", max_tokens=500, extra_body={"ignore_eos": True}, stream=True)
        async for _ in stream:
            break
        await stream.close()
        async with asyncio.timeout(1.0):
            while stack.num_running:
                await asyncio.sleep(0.005)
    assert len(stack.workers[0].cancelled) == 1
