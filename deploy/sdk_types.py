"""What the client SDK returns: pydantic models of the responses, with the parts that people want at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """Fields that a newer server adds are kept in `model_extra`, not refused."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class PromptTokensDetails(Result):
    cached_tokens: int = 0


class Usage(Result):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(Result):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(Result):
    content: list[TokenLogprob] | None = None


class CompletionLogprobs(Result):
    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None = None


class Message(Result):
    role: str = "assistant"
    content: str | None = None


class ChatChoice(Result):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return self.message.content or ""


class CompletionChoice(Result):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Result):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


class Completion(Result):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason


class Model(Result):
    id: str
    created: int
    owned_by: str
    max_model_len: int | None = None


class Tokens(Result):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Readiness(Result):
    ready: bool
    reasons: list[str] = []

    def __bool__(self) -> bool:
        return self.ready


@dataclass(frozen=True, slots=True)
class Chunk:
    """New text of one choice of a stream; `raw` is the event as it came."""

    index: int
    text: str
    finish_reason: str | None
    raw: dict[str, Any]
