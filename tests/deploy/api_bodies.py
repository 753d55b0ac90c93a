"""What tests of the HTTP application share: the smallest bodies, and the one shape of errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
from zero_stack import ZeroStack

MakeStack = Callable[..., ZeroStack]
Connect = Callable[[ZeroStack], Any]
CHAT: dict[str, Any] = {"model": "bytes", "messages": [{"role": "user", "content": "hi"}]}
PROMPT: dict[str, Any] = {"model": "bytes", "prompt": "hello", "max_tokens": 64}


def error_in(response: httpx.Response) -> dict[str, Any]:
    """The error object, which has its four keys and nothing else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert response.headers["content-type"] == "application/json"
    return dict(body["error"])
