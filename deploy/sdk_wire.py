"""What both clients do to requests and responses, without doing any I/O: addresses, bodies, errors, and when to try again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import httpx

from polymux.transport.errors import (
    ERRORS_BY_NAME,
    AuthenticationFailed,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PeerLost,
    PermissionDenied,
    PolymuxError,
    RateLimited,
    RequestTooLarge,
    WorkerLost,
)

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
RETRIED = (429, 503)
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 8.0
MAX_RETRY_AFTER_S = 60.0  # a server that asks for more is not waited for

_BY_CODE = {cls.code: cls for cls in ERRORS_BY_NAME.values() if cls.code is not None and "code" in vars(cls)}
_BY_CODE[Overloaded.code] = Overloaded  # which inherits its code
_BY_STATUS: dict[int, type[PolymuxError]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: InvalidRequest,
    405: InvalidRequest,
    408: DeadlineExceeded,
    413: RequestTooLarge,
    429: RateLimited,
    503: Overloaded,
    504: WorkerLost,
}

Messages = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    base_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float
    connect_timeout_s: float
    max_retries: int

    @classmethod
    def resolve(
        cls, base_url: str | None, api_key: str | None, timeout_s: float, connect_timeout_s: float, max_retries: int
    ) -> ClientSettings:
        """Arguments, else POLYMUX_BASE_URL and POLYMUX_API_KEY (the first of several). Raises ConfigError."""
        url = (base_url or os.environ.get("POLYMUX_BASE_URL") or DEFAULT_BASE_URL).rstrip("/").removesuffix("/v1")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url={url!r} must begin with http:// or https://", param="base_url")
        if timeout_s <= 0 or connect_timeout_s <= 0 or max_retries < 0:
            raise ConfigError(f"{timeout_s=}, {connect_timeout_s=} must be above 0 and {max_retries=} not below", param="timeout_s")
        key = api_key or os.environ.get("POLYMUX_API_KEY", "").split(",")[0].strip() or None
        return cls(base_url=url, api_key=key, timeout_s=timeout_s, connect_timeout_s=connect_timeout_s, max_retries=max_retries)

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.timeout_s, connect=self.connect_timeout_s)


def drain_path(worker: str, timeout_s: float) -> str:
    return f"/v1/polymux/workers/{quote(worker, safe='')}/drain?timeout_s={timeout_s:g}"


def chat_body(model: str, messages: Messages, params: dict[str, Any], *, is_stream: bool) -> dict[str, Any]:
    """A string is one message of the user's."""
    plain = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _body({"model": model, "messages": plain}, params, is_stream)


def completion_body(model: str, prompt: Any, params: dict[str, Any], *, is_stream: bool) -> dict[str, Any]:
    return _body({"model": model, "prompt": prompt}, params, is_stream)


def _body(own: dict[str, Any], params: dict[str, Any], is_stream: bool) -> dict[str, Any]:
    if "stream" in params:
        raise InvalidRequest("stream is chosen by the method: stream_chat and stream_complete", param="stream")
    if is_stream:
        own |= {"stream": True, "stream_options": {"include_usage": True}}
    return own | params


def error_of(response: httpx.Response) -> PolymuxError:
    """The error in a response that has been read: its class by code, else by status."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if not isinstance(error, dict):
        error = {"message": f"{response.status_code} {response.reason_phrase}: {response.text[:200]}"}
    return error_of_body(
        error, response.status_code, request_id=response.headers.get("x-request-id"), retry_after_s=retry_after_s(response)
    )


def error_of_body(
    error: Mapping[str, Any], status: int | None, *, request_id: str | None = None, retry_after_s: float | None = None
) -> PolymuxError:
    """`error` is the object inside `{"error": ...}`."""
    cls = _BY_CODE.get(str(error.get("code"))) or _BY_STATUS.get(status or 0)
    if cls is None:
        cls = InvalidRequest if error.get("type") == "invalid_request_error" else PolymuxError
    return cls(str(error.get("message")), param=error.get("param"), request_id=request_id, retry_after_s=retry_after_s)


def retry_after_s(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def transport_error(error: httpx.HTTPError, base_url: str) -> PolymuxError:
    """A connection that could not be made or broke; a server that fell silent."""
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout):
        return DeadlineExceeded(f"{base_url} did not answer in time ({type(error).__name__})")
    return PeerLost(f"{base_url} cannot be reached or closed the connection: {error or type(error).__name__}")


class Attempts:
    """One call's retries: at most so many, within its time-out, longer apart each time and never in step with other clients."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._until_s = time.monotonic() + settings.timeout_s
        self._number = 0

    def headers(self) -> dict[str, str]:
        """Tells the server when this client stops waiting."""
        return {"x-request-timeout-s": f"{max(self._until_s - time.monotonic(), 0.001):.3f}"}

    def delay_after(self, failure: httpx.Response | httpx.HTTPError) -> float | None:
        """Seconds to wait before the next attempt; None when there is to be none."""
        if isinstance(failure, httpx.Response):
            if failure.status_code not in RETRIED or failure.headers.get("x-should-retry", "").lower() == "false":
                return None
            asked_s = retry_after_s(failure)
        elif isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout):
            asked_s = None
        else:
            return None
        if self._number >= self._settings.max_retries or (asked_s or 0.0) > MAX_RETRY_AFTER_S:
            return None
        backoff_s = min(FIRST_DELAY_S * 2**self._number, MAX_DELAY_S) * random.uniform(0.5, 1.0)
        self._number += 1
        delay_s = max(backoff_s, asked_s or 0.0)
        return delay_s if time.monotonic() + delay_s < self._until_s else None
