"""The two generation endpoints, from body to last byte."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polymux.deploy.http.choice import OffsetLogprobs
from polymux.deploy.http.exchange import Exchange, envelope, read_body
from polymux.deploy.http.formats import ChatFormat, CompletionFormat
from polymux.deploy.http.frontdoor import FrontDoor, LoadedModel
from polymux.deploy.http.generation import Defaults, Envelope, Generation, plan
from polymux.deploy.http.openai import ChatCompletionRequest, ChatMessage, CompletionRequest, GenerationRequest, parse
from polymux.deploy.http.request import OpenRequest
from polymux.deploy.http.settings import HttpSettings
from polymux.deploy.http.sse import stream
from polymux.transport.errors import Cancelled, ContextLengthExceeded

log = logging.getLogger("polymux.http")

LONG_TEXT = 8192  # characters; longer texts are tokenized in a thread, so that streams go on meanwhile
SEND_GRACE_S = 5.0  # after a request's deadline, for its client to take the rest


async def encode(model: LoadedModel, text: str, add_special_tokens: bool = True) -> list[int]:
    """Raises ContextLengthExceeded, before any work, for a text that no tokenization could make short enough."""
    _check_length(model, len(text), "prompt")
    if len(text) < LONG_TEXT:
        return model.tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens)


async def encode_chat(model: LoadedModel, messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> list[int]:
    """By the model's chat template. Raises as `encode` does."""
    num_chars = sum(len(part.text) for one in messages for part in one.content)
    _check_length(model, num_chars, "messages")
    render = partial(model.tokenizer.encode_chat, [one.plain() for one in messages], add_generation_prompt=add_generation_prompt)
    if num_chars < LONG_TEXT:
        return render()
    return await asyncio.to_thread(render)


def _check_length(model: LoadedModel, num_chars: int, param: str) -> None:
    if num_chars > model.max_chars:
        raise ContextLengthExceeded(
            f"{param} has {num_chars} characters, more than {model.spec.model} could hold in {model.spec.max_model_len} tokens", param=param
        )


class GenerateEndpoint:
    """What the two have in common: plan, open, stream or reply, and stop at once when the client goes away."""

    def __init__(self, frontdoor: FrontDoor, settings: HttpSettings) -> None:
        self._frontdoor = frontdoor
        self._settings = settings

    def _plan(self, body: GenerationRequest, prompts: Sequence[Sequence[int]], model: LoadedModel, beside: Envelope) -> Generation:
        return plan(
            body,
            prompts,
            spec=model.spec,
            defaults=model.defaults if self._settings.use_generation_config else Defaults(),
            settings=self._settings,
            envelope=beside,
            seed=secrets.randbits(63),
        )

    async def _serve(
        self, generation: Generation, model: LoadedModel, form: ChatFormat | CompletionFormat, is_stream: bool, receive: Receive, send: Send
    ) -> None:
        """Everything after the plan. A client that neither reads nor leaves is left at its deadline."""
        async with asyncio.timeout(generation.envelope.timeout_s + SEND_GRACE_S):
            async with self._frontdoor.open(generation, model.tokenizer) as request:
                watch = asyncio.get_running_loop().create_task(_watch(receive, request))
                try:
                    if is_stream:
                        await stream(request, form, self._settings, send)
                    else:
                        await _reply(request, form, send)
                finally:
                    watch.cancel()


class ChatEndpoint(GenerateEndpoint):
    """POST /v1/chat/completions."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, exchange = Headers(scope=scope), Exchange.of(scope)
        body = parse(ChatCompletionRequest, await read_body(receive, headers, self._settings))
        beside = envelope(exchange, headers, self._frontdoor.settings.request_timeout_s, body.request_id)
        exchange.user = body.safety_identifier or body.user
        model = await self._frontdoor.model(body.model)
        prompt = await encode_chat(model, body.messages)
        generation = self._plan(body, [prompt], model, beside)
        form = ChatFormat(body, beside.public_id, int(time.time()), model.tokenizer)
        await self._serve(generation, model, form, body.stream, receive, send)


class CompletionEndpoint(GenerateEndpoint):
    """POST /v1/completions."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, exchange = Headers(scope=scope), Exchange.of(scope)
        body = parse(CompletionRequest, await read_body(receive, headers, self._settings))
        beside = envelope(exchange, headers, self._frontdoor.settings.request_timeout_s, body.request_id)
        exchange.user = body.user
        model = await self._frontdoor.model(body.model)
        prompts = [await encode(model, one) if isinstance(one, str) else one for one in body.prompt]
        generation = self._plan(body, prompts, model, beside)
        echoes = [one if isinstance(one, str) else model.tokenizer.decode(one) for one in body.prompt] if body.echo else None
        form = CompletionFormat(body, beside.public_id, int(time.time()), model.tokenizer, echoes)
        await self._serve(generation, model, form, body.stream, receive, send)


async def _watch(receive: Receive, request: OpenRequest) -> None:
    """The body has been read, so all that can still come is the client's leaving."""
    while (await receive())["type"] != "http.disconnect":
        pass
    request.fail(Cancelled("the client went away"))


async def _reply(request: OpenRequest, form: ChatFormat | CompletionFormat, send: Send) -> None:
    """The whole response at once."""
    texts = [""] * len(request.choices)
    logprobs: list[list[OffsetLogprobs]] = [[] for _ in request.choices]
    while not request.is_finished:
        for delta in await request.news():
            texts[delta.choice] += delta.text
            logprobs[delta.choice] += delta.logprobs
    response = Response(form.response(request, texts, logprobs), media_type="application/json")
    await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
