"""A checked body and token ids to a plan: every field reaches the workers' parameters, and what can never fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from zero_stack import VOCAB_SIZE, byte_spec, write_checkpoint

from polymux.deploy.http.generation import Defaults, Envelope, Generation, choice_seed, plan
from polymux.deploy.http.openai import ChatCompletionRequest, CompletionRequest, parse
from polymux.deploy.http.settings import HttpSettings
from polymux.transport.errors import CheckpointError, ContextLengthExceeded, InvalidRequest
from polymux.transport.messages import SamplingParams

ENVELOPE = Envelope(request_id="r", public_id="r", timeout_s=10.0)


def planned(body: dict[str, Any], prompts: list[list[int]], defaults: Defaults | None = None, **settings: Any) -> Generation:
    kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    return plan(
        parse(kind, json.dumps({"model": "m", **body}).encode()),
        prompts,
        spec=byte_spec("m", Path("nowhere"), max_model_len=100),
        defaults=defaults or Defaults(),
        settings=HttpSettings(**settings),
        envelope=ENVELOPE,
        seed=77,
    )


CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_every_sampling_field_reaches_the_workers() -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {"9": -1.0, "3": 2.0},
        "seed": 5,
        "stop_token_ids": [8],
        "ignore_eos": True,
        "logprobs": 3,
        "stop": ["a", "b"],
    }
    generation = planned({"prompt": "x", **fields}, [[1, 2]])
    assert generation.sequences[0].sampling == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.5,
        top_p=0.6,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logit_bias=((3, 2.0), (9, -1.0)),
        seed=5,
        stop_token_ids=(8,),
        ignore_eos=True,
        logprobs=3,
    )
    assert generation.stop == ("a", "b")


def test_defaults_are_the_models_where_the_request_names_none() -> None:
    defaults = Defaults(temperature=0.7, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_new_tokens=30)
    sampling = planned(CHAT, [[1]], defaults).sequences[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 20, 0.05)
    assert (sampling.repetition_penalty, sampling.max_tokens, sampling.seed) == (1.1, 30, 77)
    named = planned({**CHAT, "temperature": 0, "top_k": -1, "top_p": 1}, [[1]], defaults).sequences[0].sampling
    assert (named.temperature, named.top_k, named.top_p) == (0.0, 0, 1.0)


def test_top_p_of_0_leaves_the_likeliest_token() -> None:
    assert 0 < planned({**CHAT, "top_p": 0}, [[1]]).sequences[0].sampling.top_p < 1e-6


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, Defaults()),
        ({}, Defaults()),
        ({"temperature": 0.6, "top_k": 20, "eos_token_id": 1}, Defaults(temperature=0.6, top_k=20)),
        ({"do_sample": False, "temperature": 0.6}, Defaults(temperature=0.0)),
        ({"max_new_tokens": 64}, Defaults(max_new_tokens=64)),
    ],
)
def test_defaults_are_read_from_the_checkpoint(tmp_path: Path, file: dict[str, Any] | None, expected: Defaults) -> None:
    assert Defaults.read(str(write_checkpoint(tmp_path, file))) == expected


@pytest.mark.parametrize("file", [{"top_p": "high"}, {"temperature": -1}, {"max_new_tokens": 0}])
def test_a_wrong_default_names_file_and_key(tmp_path: Path, file: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json: `{next(iter(file))}`"):
        Defaults.read(str(write_checkpoint(tmp_path, file)))


def test_max_tokens_is_what_the_context_leaves_in_chat_and_16_in_completions() -> None:
    assert planned(CHAT, [[1] * 40]).sequences[0].sampling.max_tokens == 60
    assert planned({"prompt": "x"}, [[1] * 40]).sequences[0].sampling.max_tokens == 16
    assert planned({"prompt": "x"}, [[1] * 90]).sequences[0].sampling.max_tokens == 10
    assert planned({**CHAT, "max_completion_tokens": 7}, [[1]]).sequences[0].sampling.max_tokens == 7


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(ContextLengthExceeded, match="101 tokens") as caught:
        planned({"prompt": "x", "max_tokens": 1}, [[1] * 101])
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(ContextLengthExceeded, match="at most 10") as caught:
        planned({"prompt": "x", "max_tokens": 11}, [[1] * 90])
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("body", "prompts", "param"),
    [
        ({"prompt": "x"}, [[]], "prompt"),
        ({"prompt": ["x", "y"]}, [[1], []], "prompt[1]"),
        ({"prompt": [1, VOCAB_SIZE]}, [[1, VOCAB_SIZE]], "prompt[1]"),
        ({"prompt": [[1], [VOCAB_SIZE]]}, [[1], [VOCAB_SIZE]], "prompt[1][0]"),
        ({"prompt": "x", "n": 17}, [[1]], "n"),
        ({"prompt": ["x"] * 200, "n": 2}, [[1]] * 200, "prompt"),
        ({"prompt": "x", "best_of": 2}, [[1]], "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 0}, [[1]], "echo"),
        ({"prompt": "x", "logprobs": 21}, [[1]], "logprobs"),
        ({"prompt": "x", "stream_options": {}}, [[1]], "stream_options"),
        ({"prompt": "x", "logit_bias": {str(VOCAB_SIZE): 1}}, [[1]], "logit_bias"),
        ({"prompt": "x", "stop_token_ids": [1, VOCAB_SIZE]}, [[1]], "stop_token_ids[1]"),
        ({"prompt": "x", "min_tokens": 17}, [[1]], "min_tokens"),
        ({**CHAT, "top_logprobs": 2}, [[1]], "top_logprobs"),
        ({**CHAT, "logprobs": True, "top_logprobs": 21}, [[1]], "top_logprobs"),
        ({**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, [[1]], "max_tokens"),
    ],
)
def test_fields_that_contradict_each_other_or_the_model_are_refused_by_name(
    body: dict[str, Any], prompts: list[list[int]], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        planned(body, prompts)
    assert caught.value.param == param


def test_choices_of_a_prompt_differ_in_their_seed_alone() -> None:
    generation = planned({"prompt": ["x", "y"], "n": 3, "seed": 5}, [[1], [2]])
    seeds = [one.sampling.seed for one in generation.sequences]
    assert seeds[:3] == seeds[3:], "the same seed gives a prompt the same answers wherever it stands"
    assert seeds[0] == 5
    assert len(set(seeds[:3])) == 3
    assert (generation.choices_per_prompt, generation.num_prompt_tokens) == (3, 2)


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1])
def test_every_seed_becomes_one_that_travels(seed: int) -> None:
    assert all(0 <= choice_seed(seed, i) < 2**63 for i in range(4))


def test_logprobs_of_chat_are_none_or_count_the_alternatives() -> None:
    assert planned(CHAT, [[1]]).sequences[0].sampling.logprobs is None
    assert planned({**CHAT, "logprobs": True}, [[1]]).sequences[0].sampling.logprobs == 0
    assert planned({**CHAT, "logprobs": True, "top_logprobs": 4}, [[1]]).sequences[0].sampling.logprobs == 4
