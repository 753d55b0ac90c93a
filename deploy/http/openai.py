"""What clients may send: the bodies of the generation endpoints, field by field. Honoured or refused by name, never ignored.

A field that polymux honours is an attribute here. One that it does not is in a table of neutral values below: leaving it out, null
and its neutral values are accepted, anything else is 400 with the field's name. A field in neither is 400 too. Null means the default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from polymux.disagg.slo import CLASSES
from polymux.transport.errors import InvalidRequest

Neutral = dict[str, tuple[Any, ...]]

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_PROMPTS = 256
MAX_MESSAGES = 4096
MAX_DETOKENIZED = 1 << 18
INT64 = 1 << 63
MAX_SLO_MS = 86_400_000.0  # a day

# Fields of the OpenAI specification (and of vLLM's extensions) that are refused, with the values that ask for nothing.
NEUTRAL_SHARED: Neutral = {"metadata": ({},), "priority": (0,), "store": (False,)}
NEUTRAL_CHAT: Neutral = NEUTRAL_SHARED | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # without tools both mean the same
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
NEUTRAL_COMPLETION: Neutral = NEUTRAL_SHARED | {"suffix": ("",)}
NEUTRAL_MESSAGE: Neutral = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
NEUTRAL_STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}
NEUTRAL_NONE: Neutral = {}


def without_neutral(data: Mapping[str, Any], neutral: Neutral, where: str = "") -> dict[str, Any]:
    """`data` less its nulls and its neutral fields. Raises InvalidRequest for a refused field that asks for something."""
    kept = {}
    for name, value in data.items():
        if value is None:
            continue
        if name not in neutral:
            kept[name] = value
        elif not any(type(value) is type(one) and value == one for one in neutral[name]):
            accepted = " or ".join(["null", *(json.dumps(one) for one in neutral[name])])
            raise InvalidRequest(f"{where}{name} is not supported; leave it out or send {accepted}", param=f"{where}{name}")
    return kept


def _at_most(limit: int, value: Any) -> Any:
    """Refuse a long list or object before anybody looks at each of its items."""
    if isinstance(value, list | dict) and len(value) > limit:
        raise ValueError(f"has {len(value)} items; at most {limit} are allowed")
    return value


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else _at_most(MAX_STOPS, value)


def _stream_options(value: Any) -> Any:
    return without_neutral(value, NEUTRAL_STREAM_OPTIONS, "stream_options.") if isinstance(value, dict) else value


def _messages(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    _at_most(MAX_MESSAGES, value)
    return [without_neutral(one, NEUTRAL_MESSAGE, f"messages[{i}].") if isinstance(one, dict) else one for i, one in enumerate(value)]


def _content(value: Any) -> Any:
    """A message's content as its list of text parts."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _logit_bias(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    _at_most(MAX_LOGIT_BIAS, value)
    if any(not key.isascii() or not key.isdigit() for key in value):
        raise ValueError("every key must be a token id in decimal digits")
    return {int(key[:20]): bias for key, bias in value.items()}


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt in any of its four shapes, as a list of strings or a list of lists of ids."""
    if isinstance(value, str) or (isinstance(value, list) and set(map(type, value)) == {int}):
        value = [value]
    if isinstance(value, list) and value:
        _at_most(MAX_PROMPTS, value)
        kinds = set(map(type, value))
        if kinds == {str} or (kinds == {list} and all(map(_are_ids, value))):
            return value
    raise ValueError("must be a string, a list of strings, a list of ids or a list of lists of ids")


def _are_ids(value: list[Any]) -> bool:
    return set(map(type, value)) <= {int} and (not value or (min(value) >= 0 and max(value) < 1 << 32))


class Body(BaseModel):
    """A JSON object from outside: exact types, no unknown fields, no infinities. The first error in a long list ends it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Neutral] = NEUTRAL_NONE

    @model_validator(mode="before")
    @classmethod
    def _knows_all(cls, data: Any) -> Any:
        if isinstance(data, dict) and (unknown := data.keys() - cls.model_fields.keys()):
            raise PydanticCustomError("unknown_field", "{name} is not a known field", {"name": min(unknown)})
        return data


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class TextPart(Body):
    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type", "text") != "text":
            raise ValueError("is not text; this server reads only parts of type text")
        return data


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_content),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "additionalProperties": False,
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                ]
            }
        ),
    ]

    def plain(self) -> dict[str, Any]:
        """As chat templates take it; a developer's message is a system's."""
        content = self.content[0].text if len(self.content) == 1 else [part.model_dump() for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True), BeforeValidator(_messages)]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
                {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]


class SloTarget(Body):
    """Milliseconds, as in the headers; what is left out is the model's."""

    ttft_ms: float | None = Field(default=None, gt=0, le=MAX_SLO_MS)
    tpot_ms: float | None = Field(default=None, gt=0, le=MAX_SLO_MS)


def _slo(value: Any) -> Any:
    """A class as its numbers."""
    if not isinstance(value, str):
        return value
    if value not in CLASSES:
        raise ValueError(f"{value[:40]!r} is no class; there are {', '.join(sorted(CLASSES))}")
    return {"ttft_ms": CLASSES[value].ttft_s * 1e3, "tpot_ms": CLASSES[value].tpot_s * 1e3}


Slo = Annotated[
    SloTarget,
    BeforeValidator(_slo),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": sorted(CLASSES)},
                {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {name: {"type": "number", "exclusiveMinimum": 0} for name in ("ttft_ms", "tpot_ms")},
                },
            ]
        }
    ),
]


class GenerationRequest(Body):
    """What both generation endpoints share."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1 << 20, description="draw from the k likeliest tokens; 0 and -1 mean all")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_logit_bias),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
    ] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    n: int = Field(default=1, ge=1, le=128)
    max_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    min_tokens: int = Field(default=0, ge=0, lt=1 << 31)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        BeforeValidator(_stops),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}),
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[TokenIds, BeforeValidator(partial(_at_most, MAX_STOP_TOKEN_IDS))] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_stream_options)] | None = None
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=512, description="only requests of one API key and one salt share cached prompts"
    )
    slo: Slo | None = Field(
        default=None, description="interactive, batch, or an object of ttft_ms and tpot_ms, in place of the model's; headers outrank it"
    )
    user: str | None = Field(default=None, max_length=512, description="written to the access log")
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:-]{1,128}$", description="becomes part of the response's id")


class ChatCompletionRequest(GenerationRequest):
    neutral: ClassVar[Neutral] = NEUTRAL_CHAT

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=1 << 31)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=100)
    safety_identifier: str | None = Field(default=None, max_length=512, description="written to the access log")
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(GenerationRequest):
    neutral: ClassVar[Neutral] = NEUTRAL_COMPLETION

    prompt: Prompts
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=128, description="must equal n")
    logprobs: int | None = Field(default=None, ge=0, le=100)


class TokenizeRequest(Body):
    """Either `prompt` or `messages`."""

    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = Field(default=True, description="for prompt; a chat template writes its own")
    add_generation_prompt: bool = Field(default=True, description="for messages")
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    model: str = Field(min_length=1, max_length=256)
    tokens: Annotated[TokenIds, BeforeValidator(partial(_at_most, MAX_DETOKENIZED))]


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: bytes) -> B:
    """The body as a request of this kind. Raises InvalidRequest naming the first wrong field, and nothing else."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_json_type(data)}")
    try:
        return kind.model_validate(without_neutral(data, kind.neutral))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from None


def _explain(detail: ErrorDetails) -> InvalidRequest:
    """pydantic's first finding in the words of the API: the field as a client writes it, what is wrong, what would be right."""
    param = _path(detail["loc"])
    if detail["type"] == "unknown_field":
        param = ".".join(filter(None, (param, detail["ctx"]["name"][:100])))
        return InvalidRequest(f"{param or '(empty name)'} is not a known field; leave it out", param=param)
    if detail["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")
    return InvalidRequest(f"{param}{_shown(detail['input'])}: {message}", param=param or None)


def _shown(value: object) -> str:
    """A wrong value, if it is short."""
    if isinstance(value, bool | float | None):
        return f"={json.dumps(value)}"
    if isinstance(value, int):
        return f"={value}" if abs(value) < INT64 else ""
    return f"={json.dumps(value[:60], ensure_ascii=False)}" if isinstance(value, str) else ""


def _path(loc: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content", 1)` as `messages[0].content[1]`; pydantic's own marks (`list[str]`, `[key]`) are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or not text:
            text += f".{part[:100]}"
    return text.removeprefix(".")


def _json_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), type(value).__name__)
