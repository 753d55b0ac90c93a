"""The client SDK: `Client` and `AsyncClient`, typed, with retries, streams and cancellation. Needs httpx and pydantic, and no server parts.

    with polymux.Client() as client:
        print(client.chat("llama-small", "What does os.path.join do?").text)
        with client.stream_chat("llama-small", "Explain str.split") as stream:
            for chunk in stream:
                print(chunk.text, end="")

Errors are those of `polymux.transport.errors`: what the server refused by its class (`InvalidRequest`, `Overloaded`, ...), a server that
cannot be reached as `PeerLost`, one that does not answer in time as `DeadlineExceeded`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from polymux.deploy.sdk_stream import AsyncStream, Stream
from polymux.deploy.sdk_types import ChatCompletion, Chunk, Completion, Model, Readiness, Result, Tokens, Usage
from polymux.deploy.sdk_wire import Attempts, ClientSettings, Messages, chat_body, completion_body, drain_path, error_of, transport_error
from polymux.transport.errors import PolymuxError

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "ChatCompletion",
    "Chunk",
    "Client",
    "Completion",
    "Model",
    "PolymuxError",
    "Readiness",
    "Stream",
    "Tokens",
    "Usage",
]

R = TypeVar("R", bound=Result)
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Client:
    """Blocking. Thread-safe as httpx is; a context manager. Closing it ends its streams."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
        max_retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`base_url` and `api_key` default to POLYMUX_BASE_URL and POLYMUX_API_KEY. `timeout_s` is a whole request's, retries included."""
        self._settings = ClientSettings.resolve(base_url, api_key, timeout_s, connect_timeout_s, max_retries)
        self._http = httpx.Client(
            base_url=self._settings.base_url, headers=self._settings.headers(), timeout=self._settings.timeout(), transport=transport
        )

    def chat(self, model: str, messages: Messages, **params: Any) -> ChatCompletion:
        """One answer to a conversation, or to a single message of the user's."""
        return self._post("/v1/chat/completions", chat_body(model, messages, params, is_stream=False), ChatCompletion)

    def complete(self, model: str, prompt: Prompt, **params: Any) -> Completion:
        return self._post("/v1/completions", completion_body(model, prompt, params, is_stream=False), Completion)

    def stream_chat(self, model: str, messages: Messages, **params: Any) -> Stream:
        body = chat_body(model, messages, params, is_stream=True)
        return Stream(partial(self._send, "POST", "/v1/chat/completions", body, is_stream=True))

    def stream_complete(self, model: str, prompt: Prompt, **params: Any) -> Stream:
        body = completion_body(model, prompt, params, is_stream=True)
        return Stream(partial(self._send, "POST", "/v1/completions", body, is_stream=True))

    def models(self) -> list[Model]:
        return [Model.model_validate(one) for one in self._send("GET", "/v1/models").json()["data"]]

    def tokenize(self, model: str, prompt: str | None = None, messages: Messages | None = None, **params: Any) -> Tokens:
        return self._post("/tokenize", _tokenize_body(model, prompt, messages, params), Tokens)

    def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        return str(self._send("POST", "/detokenize", {"model": model, "tokens": list(tokens)}).json()["prompt"])

    def health(self) -> bool:
        """Whether the server answers."""
        return self._send("GET", "/health").is_success

    def ready(self) -> Readiness:
        """Whether it can make tokens now, and why not. Asks once."""
        return Readiness.model_validate(self._once("GET", "/ready").json())

    def version(self) -> str:
        return str(self._send("GET", "/version").json()["version"])

    def topology(self) -> dict[str, Any]:
        """Workers, models and totals, as the controller sees them."""
        return dict(self._send("GET", "/v1/polymux/topology").json())

    def timeline(self, seconds: float = 300.0, limit: int = 4096) -> dict[str, Any]:
        """What every worker did in the last `seconds`, as `polymux timeline` draws it; the newest `limit` spans of each."""
        return dict(self._send("GET", f"/v1/polymux/timeline?format=json&seconds={seconds:g}&limit={limit}").json())

    def drain(self, worker: str, timeout_s: float = 60.0) -> None:
        """Empty a worker, then stop it; its clients notice nothing. Raises InvalidRequest for one that nobody could stand in for."""
        self._send("POST", drain_path(worker, timeout_s))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _post(self, path: str, body: dict[str, Any], kind: type[R]) -> R:
        return kind.model_validate(self._send("POST", path, body).json())

    def _once(self, method: str, path: str) -> httpx.Response:
        try:
            return self._http.request(method, path)
        except httpx.HTTPError as error:
            raise transport_error(error, self._settings.base_url) from error

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None, *, is_stream: bool = False) -> httpx.Response:
        """A successful response, after retries. Raises PolymuxErrors."""
        attempts = Attempts(self._settings)
        while True:
            failure: httpx.Response | httpx.HTTPError
            try:
                request = self._http.build_request(method, path, json=body, headers=attempts.headers())
                response = failure = self._http.send(request, stream=is_stream)
                if response.is_success:
                    return response
                response.read()
            except httpx.HTTPError as error:
                failure = error
            delay_s = attempts.delay_after(failure)
            if delay_s is None:
                raise _raised(failure, self._settings)
            time.sleep(delay_s)


class AsyncClient:
    """The same for asyncio; cancelling a call cancels its request at the server."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
        max_retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`base_url` and `api_key` default to POLYMUX_BASE_URL and POLYMUX_API_KEY. `timeout_s` is a whole request's, retries included."""
        self._settings = ClientSettings.resolve(base_url, api_key, timeout_s, connect_timeout_s, max_retries)
        self._http = httpx.AsyncClient(
            base_url=self._settings.base_url,
            headers=self._settings.headers(),
            timeout=self._settings.timeout(),
            transport=transport,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def chat(self, model: str, messages: Messages, **params: Any) -> ChatCompletion:
        """One answer to a conversation, or to a single message of the user's."""
        return await self._post("/v1/chat/completions", chat_body(model, messages, params, is_stream=False), ChatCompletion)

    async def complete(self, model: str, prompt: Prompt, **params: Any) -> Completion:
        return await self._post("/v1/completions", completion_body(model, prompt, params, is_stream=False), Completion)

    def stream_chat(self, model: str, messages: Messages, **params: Any) -> AsyncStream:
        body = chat_body(model, messages, params, is_stream=True)
        return AsyncStream(partial(self._send, "POST", "/v1/chat/completions", body, is_stream=True))

    def stream_complete(self, model: str, prompt: Prompt, **params: Any) -> AsyncStream:
        body = completion_body(model, prompt, params, is_stream=True)
        return AsyncStream(partial(self._send, "POST", "/v1/completions", body, is_stream=True))

    async def models(self) -> list[Model]:
        return [Model.model_validate(one) for one in (await self._send("GET", "/v1/models")).json()["data"]]

    async def tokenize(self, model: str, prompt: str | None = None, messages: Messages | None = None, **params: Any) -> Tokens:
        return await self._post("/tokenize", _tokenize_body(model, prompt, messages, params), Tokens)

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        return str((await self._send("POST", "/detokenize", {"model": model, "tokens": list(tokens)})).json()["prompt"])

    async def health(self) -> bool:
        """Whether the server answers."""
        return (await self._send("GET", "/health")).is_success

    async def ready(self) -> Readiness:
        """Whether it can make tokens now, and why not. Asks once."""
        try:
            response = await self._http.get("/ready")
        except httpx.HTTPError as error:
            raise transport_error(error, self._settings.base_url) from error
        return Readiness.model_validate(response.json())

    async def version(self) -> str:
        return str((await self._send("GET", "/version")).json()["version"])

    async def topology(self) -> dict[str, Any]:
        """Workers, models and totals, as the controller sees them."""
        return dict((await self._send("GET", "/v1/polymux/topology")).json())

    async def drain(self, worker: str, timeout_s: float = 60.0) -> None:
        """Empty a worker, then stop it; its clients notice nothing. Raises InvalidRequest for one that nobody could stand in for."""
        await self._send("POST", drain_path(worker, timeout_s))

    async def timeline(self, seconds: float = 300.0, limit: int = 4096) -> dict[str, Any]:
        """What every worker did in the last `seconds`, as `polymux timeline` draws it; the newest `limit` spans of each."""
        return dict((await self._send("GET", f"/v1/polymux/timeline?format=json&seconds={seconds:g}&limit={limit}")).json())

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def _post(self, path: str, body: dict[str, Any], kind: type[R]) -> R:
        return kind.model_validate((await self._send("POST", path, body)).json())

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None, *, is_stream: bool = False) -> httpx.Response:
        """A successful response, after retries. Raises PolymuxErrors."""
        attempts = Attempts(self._settings)
        while True:
            failure: httpx.Response | httpx.HTTPError
            try:
                request = self._http.build_request(method, path, json=body, headers=attempts.headers())
                response = failure = await self._http.send(request, stream=is_stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.HTTPError as error:
                failure = error
            delay_s = attempts.delay_after(failure)
            if delay_s is None:
                raise _raised(failure, self._settings)
            await asyncio.sleep(delay_s)


def _tokenize_body(model: str, prompt: str | None, messages: Messages | None, params: dict[str, Any]) -> dict[str, Any]:
    if messages is None:
        return {"model": model, "prompt": prompt, **params}
    return {**chat_body(model, messages, {}, is_stream=False), **params}


def _raised(failure: httpx.Response | httpx.HTTPError, settings: ClientSettings) -> PolymuxError:
    if isinstance(failure, httpx.Response):
        return error_of(failure)
    error = transport_error(failure, settings.base_url)
    error.__cause__ = failure
    return error
