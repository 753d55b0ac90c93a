"""Every field of the two generation endpoints is honoured or refused by name; nothing is ignored."""

from __future__ import annotations

import json
import time
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from polymux.deploy.http.openai import (
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse,
)
from polymux.transport.errors import InvalidRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
KINDS: dict[str, tuple[type[GenerationRequest], dict[str, Any]]] = {
    "chat": (ChatCompletionRequest, CHAT),
    "completion": (CompletionRequest, COMPLETION),
}


def parsed(kind: str, **fields: Any) -> Any:
    body, base = KINDS[kind]
    return parse(body, json.dumps({**base, **fields}).encode())


def refusal(kind: str, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parsed(kind, **fields)
    return caught.value


HONOURED = [
    ("temperature", 0.0, 0.0),
    ("temperature", 2, 2.0),
    ("top_p", 0, 0.0),
    ("top_p", 1.0, 1.0),
    ("top_k", -1, -1),
    ("top_k", 40, 40),
    ("min_p", 0.1, 0.1),
    ("repetition_penalty", 1.1, 1.1),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 2.0, 2.0),
    ("logit_bias", {"5": -100, "7": 1.5}, {5: -100.0, 7: 1.5}),
    ("seed", -(2**63), -(2**63)),
    ("seed", 2**63 - 1, 2**63 - 1),
    ("n", 3, 3),
    ("max_tokens", 1, 1),
    ("min_tokens", 4, 4),
    ("stop", "end", ["end"]),
    ("stop", ["a", "b"], ["a", "b"]),
    ("stop", [], []),
    ("stop_token_ids", [1, 2], [1, 2]),
    ("ignore_eos", True, True),
    ("stream", True, True),
    ("user", "someone", "someone"),
    ("request_id", "job-7", "job-7"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value", "kept"), HONOURED)
def test_a_shared_field_is_kept(kind: str, name: str, value: Any, kept: Any) -> None:
    assert getattr(parsed(kind, **{name: value}), name) == kept


@pytest.mark.parametrize(
    ("kind", "name", "value", "kept"),
    [
        ("chat", "max_completion_tokens", 5, 5),
        ("chat", "logprobs", True, True),
        ("chat", "top_logprobs", 20, 20),
        ("chat", "safety_identifier", "x", "x"),
        ("chat", "service_tier", "auto", "auto"),
        ("completion", "logprobs", 5, 5),
        ("completion", "echo", True, True),
        ("completion", "best_of", 1, 1),
        ("completion", "prompt", "text", ["text"]),
        ("completion", "prompt", ["a", "b"], ["a", "b"]),
        ("completion", "prompt", [1, 2], [[1, 2]]),
        ("completion", "prompt", [[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_field_of_one_endpoint_is_kept(kind: str, name: str, value: Any, kept: Any) -> None:
    assert getattr(parsed(kind, **{name: value}), name) == kept


REFUSED = [
    ("chat", {"tools": [{"type": "function"}]}, "tools"),
    ("chat", {"tool_choice": "auto"}, "tool_choice"),
    ("chat", {"functions": [{"name": "f"}]}, "functions"),
    ("chat", {"function_call": "auto"}, "function_call"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat", {"modalities": ["text", "audio"]}, "modalities"),
    ("chat", {"audio": {"voice": "a"}}, "audio"),
    ("chat", {"prediction": {"type": "content"}}, "prediction"),
    ("chat", {"reasoning_effort": "low"}, "reasoning_effort"),
    ("chat", {"verbosity": "high"}, "verbosity"),
    ("chat", {"web_search_options": {}}, "web_search_options"),
    ("chat", {"moderation": {}}, "moderation"),
    ("chat", {"prompt_cache_key": "k"}, "prompt_cache_key"),
    ("chat", {"prompt_cache_options": {}}, "prompt_cache_options"),
    ("chat", {"prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    ("chat", {"store": True}, "store"),
    ("chat", {"metadata": {"a": "b"}}, "metadata"),
    ("chat", {"priority": 1}, "priority"),
    ("chat", {"priority": False}, "priority"),
    ("chat", {"service_tier": "flex"}, "service_tier"),
    ("chat", {"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ("chat", {"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ("chat", {"stream_options": {"unknown": 1}}, "stream_options.unknown"),
    ("chat", {"prompt": "x"}, "prompt"),
    ("chat", {"guided_json": {}}, "guided_json"),
    ("completion", {"suffix": "x"}, "suffix"),
    ("completion", {"messages": []}, "messages"),
    ("completion", {"max_completion_tokens": 5}, "max_completion_tokens"),
    ("completion", {"prompt": []}, "prompt"),
    ("completion", {"prompt": [True]}, "prompt"),
    ("completion", {"prompt": [-1]}, "prompt"),
    ("completion", {"prompt": ["a", 1]}, "prompt"),
    ("completion", {"prompt": None}, "prompt"),
    ("completion", {"prompt": ["a"] * 257}, "prompt"),
    ("chat", {"model": ""}, "model"),
    ("chat", {"model": None}, "model"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ("chat", {"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
    ("chat", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ("chat", {"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    (
        "chat",
        {"messages": [CHAT["messages"][0], {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages[1].content[1]",
    ),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content[0]"),
]


@pytest.mark.parametrize(("kind", "fields", "param"), REFUSED)
def test_what_is_not_done_is_refused_by_name(kind: str, fields: dict[str, Any], param: str) -> None:
    error = refusal(kind, **fields)
    assert (error.status, error.param) == (400, param)
    assert param in error.message


OUT_OF_RANGE: list[tuple[str, list[Any]]] = [
    ("temperature", [-0.1, 2.1, "1", True, []]),
    ("top_p", [-0.1, 1.1, "x"]),
    ("top_k", [-2, 1.5, 2**21]),
    ("min_p", [-0.1, 1.1]),
    ("repetition_penalty", [0, -1, 11]),
    ("presence_penalty", [-2.1, 2.1]),
    ("frequency_penalty", [-2.1, 2.1]),
    ("logit_bias", [[], {"x": 1}, {"-1": 1}, {"1.5": 1}, {str(2**40): 1}]),
    ("seed", [2**63, -(2**63) - 1, 1.5]),
    ("n", [0, 129, True, 1.0]),
    ("max_tokens", [0, -1, 1.0, 2**31]),
    ("min_tokens", [-1]),
    ("stop", [5, ["a"] * 17, {}]),
    ("stop_token_ids", ["x", [0] * 257]),
    ("ignore_eos", ["true", 1]),
    ("stream", ["true", 1]),
    ("user", [5, "x" * 513]),
    ("request_id", ["has space", "", "x" * 129]),
    ("stream_options", [[], True]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUT_OF_RANGE for value in values])
def test_a_value_out_of_range_is_refused_by_name(kind: str, name: str, value: Any) -> None:
    error = refusal(kind, **{name: value})
    assert error.param is not None
    assert error.param.startswith(name)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("chat", name, value) for name, values in NEUTRAL_CHAT.items() for value in (None, *values)]
    + [("completion", name, value) for name, values in NEUTRAL_COMPLETION.items() for value in (None, *values)],
)
def test_a_neutral_value_of_a_refused_field_is_accepted(kind: str, name: str, value: Any) -> None:
    assert parsed(kind, **{name: value}) == parsed(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_null_means_the_default(kind: str) -> None:
    body, base = KINDS[kind]
    optional = {name: None for name in body.model_fields if name not in base}
    assert parsed(kind, **optional) == parsed(kind)


@pytest.mark.parametrize(
    ("kind", "params", "neutral"),
    [
        ("chat", chat_create_params, NEUTRAL_CHAT),
        ("completion", completion_create_params, NEUTRAL_COMPLETION),
    ],
)
def test_every_field_of_the_official_client_is_known(kind: str, params: Any, neutral: dict[str, Any]) -> None:
    """Neither missing from the tables, nor in both."""
    body, _ = KINDS[kind]
    known = set(get_type_hints(params.CompletionCreateParamsStreaming)) | set(get_type_hints(params.CompletionCreateParamsNonStreaming))
    assert known - set(body.model_fields) - set(neutral) == set()
    assert not set(body.model_fields) & set(neutral)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b'"x"',
        b"{",
        b'{"model": NaN}',
        b"[" * 5000,
        b'{"model": "\\ud800"}',
        b'{"seed": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    for kind in (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest):
        with pytest.raises(InvalidRequest):
            parse(kind, body)


ITEMS = 400_000
FLOODS: dict[str, tuple[type[Body], bytes]] = {
    "prompts": (CompletionRequest, b'{"model":"m","prompt":[' + b",".join([b"{}"] * ITEMS) + b"]}"),
    "ids": (CompletionRequest, b'{"model":"m","prompt":[[' + b",".join([b"{}"] * ITEMS) + b"]]}"),
    "messages": (ChatCompletionRequest, b'{"model":"m","messages":[' + b",".join([b"{}"] * ITEMS) + b"]}"),
    "parts": (ChatCompletionRequest, b'{"model":"m","messages":[{"role":"user","content":[' + b",".join([b"{}"] * ITEMS) + b"]}]}"),
    "stops": (ChatCompletionRequest, b'{"model":"m","stop":[' + b",".join([b"1"] * ITEMS) + b"]}"),
    "tokens": (DetokenizeRequest, b'{"model":"m","tokens":[' + b",".join([b'""'] * ITEMS) + b"]}"),
    "fields": (ChatCompletionRequest, b"{" + b",".join(b'"%d":1' % i for i in range(ITEMS // 4)) + b"}"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_body_full_of_errors_ends_at_the_first(name: str) -> None:
    """Collecting an error for each item would hold up everybody else's streams for many seconds."""
    kind, body = FLOODS[name]
    started_s = time.thread_time()
    with pytest.raises(InvalidRequest):
        parse(kind, body)
    assert time.thread_time() - started_s < 0.5


def test_a_developer_speaks_as_the_system_and_parts_stay_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parsed("chat", messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    assert [one.plain() for one in body.messages] == [{"role": "system", "content": "x"}, {"role": "user", "content": parts}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    fields=st.dictionaries(
        st.sampled_from(sorted(set(ChatCompletionRequest.model_fields) | set(CompletionRequest.model_fields) | set(NEUTRAL_CHAT)))
        | st.text(max_size=5),
        JSON,
        max_size=4,
    ),
)
def test_whatever_a_body_holds_it_is_taken_or_refused_by_name(kind: str, fields: dict[str, Any]) -> None:
    try:
        parsed(kind, **fields)
    except InvalidRequest as error:
        assert error.param is not None
        assert len(error.message) < 1000
