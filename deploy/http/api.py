"""The HTTP application: routes to handlers, over a FrontDoor. Runs under any ASGI server."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import polymux
from polymux.deploy import metrics
from polymux.deploy.http.auth import ApiKeys
from polymux.deploy.http.errors import status_response
from polymux.deploy.http.exchange import read_body
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.gate import Gate
from polymux.deploy.http.generate import ChatEndpoint, CompletionEndpoint, encode, encode_chat
from polymux.deploy.http.openai import DetokenizeRequest, TokenizeRequest, parse
from polymux.deploy.http.openapi import document
from polymux.deploy.http.settings import HttpSettings
from polymux.deploy.http.timeline import TimelineEndpoint
from polymux.deploy.http.workers import WorkersEndpoint
from polymux.transport.errors import InvalidRequest
from polymux.transport.messages import ModelSpec


def build_asgi(frontdoor: FrontDoor, settings: HttpSettings | None = None) -> Starlette:
    """The application. Its lifespan starts the front door, and closes it after draining."""
    settings = settings or HttpSettings()
    api = Api(frontdoor, settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await frontdoor.start()
        try:
            yield
        finally:
            await frontdoor.aclose()

    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{model:path}", api.model),
            Route("/v1/chat/completions", ChatEndpoint(frontdoor, settings), methods=["POST"]),
            Route("/v1/completions", CompletionEndpoint(frontdoor, settings), methods=["POST"]),
            Route("/v1/polymux/topology", api.topology),
            Route("/v1/polymux/timeline", TimelineEndpoint(frontdoor).get),
            Route("/v1/polymux/workers/{id}/drain", WorkersEndpoint(frontdoor).drain, methods=["POST"]),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/health", api.health),
            Route("/ready", api.ready),
            Route("/metrics", api.metrics),
            Route("/version", api.version),
            Route("/openapi.json", api.openapi),
        ],
        middleware=[Middleware(Gate, keys=ApiKeys(settings.api_keys), metrics=frontdoor.metrics)],
        exception_handlers={HTTPException: _refused_by_framework},
        lifespan=lifespan,
    )


async def _refused_by_framework(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    said = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not for {request.url.path[:200]}"}
    return status_response(error.status_code, said.get(error.status_code, error.detail), headers)


class Api:
    """Everything but generation."""

    def __init__(self, frontdoor: FrontDoor, settings: HttpSettings) -> None:
        self._frontdoor = frontdoor
        self._settings = settings

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_described(spec) for spec in await self._frontdoor.models()]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(_described(await self._frontdoor.spec(request.path_params["model"])))

    async def tokenize(self, request: Request) -> Response:
        body = parse(TokenizeRequest, await self._body(request))
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("send prompt or messages, one of them", param="prompt")
        model = await self._frontdoor.model(body.model)
        if body.messages is not None:
            tokens = await encode_chat(model, body.messages, body.add_generation_prompt)
        else:
            tokens = await encode(model, body.prompt or "", body.add_special_tokens)
        names = [model.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        return JSONResponse({"count": len(tokens), "max_model_len": model.spec.max_model_len, "tokens": tokens, "token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeRequest, await self._body(request))
        model = await self._frontdoor.model(body.model)
        for i, token in enumerate(body.tokens):
            if token >= model.spec.vocab_size:
                raise InvalidRequest(f"tokens[{i}]={token} is not a token of {model.spec.model}", param=f"tokens[{i}]")
        return JSONResponse({"prompt": model.tokenizer.decode(body.tokens)})

    async def health(self, _: Request) -> Response:
        """This process answers. Asks nobody else: a lost peer lowers capacity, never liveness."""
        return Response()

    async def ready(self, _: Request) -> Response:
        reasons = await self._frontdoor.unready()
        status = 503 if reasons else 200
        return JSONResponse({"ready": not reasons, "reasons": list(reasons)}, status, {"Retry-After": "1"} if reasons else None)

    async def metrics(self, _: Request) -> Response:
        return Response(self._frontdoor.metrics.render(await self._frontdoor.topology()), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": polymux.__version__})

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document())

    async def topology(self, _: Request) -> Response:
        return JSONResponse(_finite(await self._frontdoor.topology() or {}))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request.receive, Headers(scope=request.scope), self._settings)


def _finite(value: Any) -> Any:
    """Plain data as JSON can say it: null for an infinity, such as the age of what never happened."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _described(spec: ModelSpec) -> dict[str, Any]:
    return {
        "id": spec.model,
        "object": "model",
        "created": spec.created,
        "owned_by": "polymux",
        "root": spec.model,
        "parent": None,
        "max_model_len": spec.max_model_len,
        "dtype": spec.dtype,
    }
