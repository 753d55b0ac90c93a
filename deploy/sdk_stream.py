"""Streams of the client SDK: events as they come, and what they add up to. Closing one before its end cancels it at the server."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from types import TracebackType
from typing import Any, Self

import httpx

from polymux.deploy.sdk_types import Chunk, Usage
from polymux.deploy.sdk_wire import error_of_body, transport_error
from polymux.transport.errors import PeerLost, PolymuxError

MAX_EVENT_BYTES = 16 << 20


class _Events:
    """Bytes to the data of server-sent events; comments and other fields are left out."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise PeerLost(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data = []


class StreamState:
    """What a stream has said so far."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.request_id: str | None = None
        self.texts: list[str] = []  # by choice
        self.finish_reasons: list[str | None] = []  # by choice
        self.usage: Usage | None = None
        self.is_done = False
        self._events = _Events()
        self._started_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._num_texts = 0

    @property
    def text(self) -> str:
        """Of the first choice, so far."""
        return self.texts[0] if self.texts else ""

    @property
    def finish_reason(self) -> str | None:
        return self.finish_reasons[0] if self.finish_reasons else None

    @property
    def ttft_s(self) -> float | None:
        """Call to first text, measured here."""
        return None if self._first_s is None else self._first_s - self._started_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first, measured here; tokens by the usage, else by the chunks."""
        count = (self.usage.completion_tokens if self.usage else self._num_texts) - max(len(self.texts), 1)
        if self._first_s is None or self._last_s is None or count < 1:
            return None
        return (self._last_s - self._first_s) * max(len(self.texts), 1) / count

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """Raises the error that the server put into the stream."""
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self.is_done = True
                return
            yield from self._take(event)

    def _take(self, event: bytes) -> Iterator[Chunk]:
        try:
            body: dict[str, Any] = json.loads(event)
        except ValueError as error:
            raise PeerLost(f"the server sent an event that is not JSON: {event[:80]!r}") from error
        if "error" in body:
            raise error_of_body(body["error"], None, request_id=self.request_id)
        self.id = body.get("id")
        if body.get("usage"):
            self.usage = Usage.model_validate(body["usage"])
        for choice in body.get("choices", ()):
            yield self._choice(choice, body)

    def _choice(self, choice: dict[str, Any], body: dict[str, Any]) -> Chunk:
        index = choice["index"]
        while len(self.texts) <= index:
            self.texts.append("")
            self.finish_reasons.append(None)
        text = choice["text"] if "text" in choice else choice.get("delta", {}).get("content")
        if text:
            self.texts[index] += text
            self._num_texts += 1
            self._last_s = time.monotonic()
            if self._first_s is None:
                self._first_s = self._last_s
        self.finish_reasons[index] = choice.get("finish_reason") or self.finish_reasons[index]
        return Chunk(index, text or "", choice.get("finish_reason"), body)

    def check_end(self) -> None:
        """The connection ended. Raises PeerLost if the stream had not."""
        if not self.is_done:
            raise PeerLost("the connection ended before the stream did", request_id=self.request_id)


class Stream(StreamState):
    """An iterator of chunks and a context manager. Sent at its first use; leaving it early cancels the request."""

    def __init__(self, open_response: Callable[[], httpx.Response]) -> None:
        super().__init__()
        self._open_response = open_response
        self._response: httpx.Response | None = None
        self._chunks = self._run()

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it now. May be called twice."""
        self._chunks.close()
        if self._response is not None:
            self._response.close()

    def read(self) -> str:
        """Wait for the end; the whole text of the first choice."""
        for _ in self:
            pass
        return self.text

    def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = self._open_response()
            self.request_id = self._response.headers.get("x-request-id")
        return self._response

    def _run(self) -> Generator[Chunk, None, None]:
        response = self._open()
        try:
            for data in response.iter_bytes():
                yield from self.feed(data)
                if self.is_done:
                    break
            self.check_end()
        except httpx.HTTPError as error:
            raise _with_id(transport_error(error, str(response.url)), self.request_id) from error
        finally:
            response.close()


class AsyncStream(StreamState):
    """An asynchronous iterator of chunks and a context manager. Sent at its first use; leaving it early cancels the request."""

    def __init__(self, open_response: Callable[[], Coroutine[Any, Any, httpx.Response]]) -> None:
        super().__init__()
        self._open_response = open_response
        self._response: httpx.Response | None = None
        self._chunks = self._run()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it now. May be called twice."""
        await self._chunks.aclose()
        if self._response is not None:
            await self._response.aclose()

    async def read(self) -> str:
        """Wait for the end; the whole text of the first choice."""
        async for _ in self:
            pass
        return self.text

    async def _open(self) -> httpx.Response:
        if self._response is None:
            self._response = await self._open_response()
            self.request_id = self._response.headers.get("x-request-id")
        return self._response

    async def _run(self) -> AsyncGenerator[Chunk, None]:
        response = await self._open()
        try:
            async for data in response.aiter_bytes():
                for chunk in self.feed(data):
                    yield chunk
                if self.is_done:
                    break
            self.check_end()
        except httpx.HTTPError as error:
            raise _with_id(transport_error(error, str(response.url)), self.request_id) from error
        finally:
            await response.aclose()


def _with_id(error: PolymuxError, request_id: str | None) -> PolymuxError:
    error.request_id = request_id
    return error
