"""What clients get: the bodies of both generation endpoints, whole and in chunks.

A chunk is built from text that is ready when its stream begins; per token only the content is escaped. Both endpoints answer to the
same four questions: `opening`, `chunk`, `usage_chunk` for streams, `response` for the whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring
from typing import Any, Protocol

from polymux.deploy.http.choice import Choice, Delta, OffsetLogprobs
from polymux.deploy.http.openai import ChatCompletionRequest, CompletionRequest, StreamOptions
from polymux.deploy.http.request import OpenRequest

MIN_LOGPROB = -9999.0  # JSON has no infinity; what the OpenAI API says for it


class Vocabulary(Protocol):
    """Names of single tokens."""

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


# JSON leaves these as they are, but many clients split a stream wherever their language sees a line end.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def quote(text: str) -> str:
    """A JSON string on one line, whatever one takes for a line."""
    quoted = encode_basestring(text)
    return quoted if text.isascii() else quoted.translate(_LINE_ENDS)


def dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def usage(request: OpenRequest) -> dict[str, Any]:
    """Tokens so far. Each prompt counts once, however many choices it has; what one of them computed was not cached for the request."""
    num_prompt, num_output = request.generation.num_prompt_tokens, request.num_output_tokens
    counts, per_prompt = [choice.num_cached_tokens for choice in request.choices], request.generation.choices_per_prompt
    cached = sum(min(counts[first : first + per_prompt]) for first in range(0, len(counts), per_prompt))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class Format:
    """Fields that both endpoints share. `tail` closes a chunk; with continuous usage it is made anew for each."""

    def __init__(self, response_id: str, kind: str, model: str, created: int, options: StreamOptions | None, extra: dict[str, str]) -> None:
        self._head = {"id": response_id, "object": kind, "created": created, "model": model, **extra}
        self._chunk_head = f'data: {dumps(self._head)[:-1]},"choices":['
        self._options = options or StreamOptions()
        self._tail = '],"usage":null}\n\n' if self._options.include_usage else "]}\n\n"

    def _chunk_tail(self, request: OpenRequest) -> str:
        if self._options.include_usage and self._options.continuous_usage_stats:
            return f'],"usage":{dumps(usage(request))}}}\n\n'
        return self._tail

    def usage_chunk(self, request: OpenRequest) -> str:
        """The chunk before the last line, where the client asked for it."""
        if not self._options.include_usage:
            return ""
        return f'{self._chunk_head}],"usage":{dumps(usage(request))}}}\n\n'

    def _whole(self, choices: list[dict[str, Any]], request: OpenRequest) -> bytes:
        return dumps({**self._head, "choices": choices, "usage": usage(request)}).encode()


class ChatFormat(Format):
    """/v1/chat/completions."""

    def __init__(self, body: ChatCompletionRequest, response_id: str, created: int, vocabulary: Vocabulary) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        extra = {} if body.service_tier is None else {"service_tier": "default"}
        super().__init__(f"chatcmpl-{response_id}", kind, body.model, created, body.stream_options, extra)
        self._has_logprobs = body.logprobs
        self._vocabulary = vocabulary

    def opening(self, request: OpenRequest) -> str:
        """Each choice says its role before anything else."""
        tail = self._chunk_tail(request)
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return "".join(f'{self._chunk_head}{{"index":{choice.index},{delta}{tail}' for choice in request.choices)

    def chunk(self, delta: Delta, request: OpenRequest) -> str:
        tail = self._chunk_tail(request)
        index = delta.choice
        text = ""
        if delta.text or delta.logprobs:
            logprobs = dumps(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
            text = (
                f'{self._chunk_head}{{"index":{index},"delta":{{"content":{quote(delta.text)}}},'
                f'"logprobs":{logprobs},"finish_reason":null}}{tail}'
            )
        if delta.finish_reason is not None:
            text += f'{self._chunk_head}{{"index":{index},"delta":{{}},"logprobs":null,"finish_reason":"{delta.finish_reason}"}}{tail}'
        return text

    def response(self, request: OpenRequest, texts: Sequence[str], logprobs: Sequence[Sequence[OffsetLogprobs]]) -> bytes:
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": texts[choice.index], "refusal": None},
                "logprobs": self._logprobs(logprobs[choice.index]) if self._has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in request.choices
        ]
        return self._whole(choices, request)

    def _logprobs(self, tokens: Sequence[OffsetLogprobs]) -> dict[str, Any]:
        content = [
            {**self._entry(one.token.token_id, one.token.logprob), "top_logprobs": [self._entry(*top) for top in one.token.top]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._vocabulary.token_text(token_id), self._vocabulary.token_bytes(token_id)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


class CompletionFormat(Format):
    """/v1/completions. With echo, each choice's text begins with its prompt."""

    def __init__(
        self, body: CompletionRequest, response_id: str, created: int, vocabulary: Vocabulary, echoes: Sequence[str] | None
    ) -> None:
        super().__init__(f"cmpl-{response_id}", "text_completion", body.model, created, body.stream_options, {})
        self._has_logprobs = body.logprobs is not None
        self._has_top = bool(body.logprobs)
        self._vocabulary = vocabulary
        self._echoes = echoes

    def _echo(self, choice: Choice, request: OpenRequest) -> str:
        return self._echoes[choice.index // request.generation.choices_per_prompt] if self._echoes is not None else ""

    def opening(self, request: OpenRequest) -> str:
        if self._echoes is None:
            return ""
        tail = self._chunk_tail(request)
        return "".join(self._chunk(choice.index, self._echo(choice, request), "null", "null", tail) for choice in request.choices)

    def chunk(self, delta: Delta, request: OpenRequest) -> str:
        logprobs = dumps(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
        reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        return self._chunk(delta.choice, delta.text, logprobs, reason, self._chunk_tail(request))

    def _chunk(self, index: int, text: str, logprobs: str, reason: str, tail: str) -> str:
        content = quote(text)
        return f'{self._chunk_head}{{"index":{index},"text":{content},"logprobs":{logprobs},"finish_reason":{reason}}}{tail}'

    def response(self, request: OpenRequest, texts: Sequence[str], logprobs: Sequence[Sequence[OffsetLogprobs]]) -> bytes:
        choices = [
            {
                "index": choice.index,
                "text": self._echo(choice, request) + texts[choice.index],
                "logprobs": self._logprobs(logprobs[choice.index]) if self._has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice in request.choices
        ]
        return self._whole(choices, request)

    def _logprobs(self, tokens: Sequence[OffsetLogprobs]) -> dict[str, Any]:
        return {
            "text_offset": [one.offset for one in tokens],
            "token_logprobs": [max(one.token.logprob, MIN_LOGPROB) for one in tokens],
            "tokens": [self._name(one.token.token_id) for one in tokens],
            "top_logprobs": [self._top(one) for one in tokens] if self._has_top else None,
        }

    def _top(self, one: OffsetLogprobs) -> dict[str, float]:
        """By token, the likelier where two tokens have one name; the drawn one is among them."""
        found: dict[str, float] = {}
        for token_id, logprob in (*one.token.top, (one.token.token_id, one.token.logprob)):
            name = self._name(token_id)
            found[name] = max(found.get(name, MIN_LOGPROB), logprob)
        return found

    def _name(self, token_id: int) -> str:
        """A token that is no whole character goes by its bytes, as in the OpenAI API: "bytes:\\xe2\\x80"."""
        raw = self._vocabulary.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
