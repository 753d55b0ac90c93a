"""A checked body becomes a plan: token ids, sampling parameters of each sequence, stop strings. Pure; nothing waits in here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polymux.actors.weights.generation import generation_defaults
from polymux.actors.weights.json_file import read_object
from polymux.deploy.http.openai import INT64, ChatCompletionRequest, CompletionRequest, GenerationRequest, SloTarget
from polymux.deploy.http.settings import HttpSettings
from polymux.transport.errors import CheckpointError, ContextLengthExceeded, InvalidRequest
from polymux.transport.messages import ModelSpec, SamplingParams
from polymux.transport.prefix import marks_of, salt_of
from polymux.transport.units import NO_IDS, ModelName, PackedIds, pack_ids

COMPLETION_MAX_TOKENS = 16  # the OpenAI default of /v1/completions
MIN_TOP_P = 1e-9  # what 0 means: the likeliest token alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Sampling where a request names none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def read(cls, checkpoint: str) -> Defaults:
        """From a checkpoint's generation_config.json, if there is one. Raises CheckpointError naming the wrong key."""
        path = Path(checkpoint) / "generation_config.json"
        if not path.is_file():
            return cls()
        data = read_object(path)
        found: dict[str, Any] = generation_defaults(path.parent, data)
        if data.get("do_sample") is False:
            found["temperature"] = 0.0
        limit = data.get("max_new_tokens")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise CheckpointError(f"{path}: `max_new_tokens` is {limit!r}, not a number from 1 on; correct or remove it")
        return cls(**found, max_new_tokens=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What comes beside the body: who asks, under which id, and how long they will wait."""

    request_id: str  # unique; ours
    public_id: str  # the client's own, echoed; not necessarily unique
    tenant: str = ""
    timeout_s: float
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePlan:
    prompt_ids: PackedIds
    num_prompt_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One request as the front door runs it. Sequences are in choice order: all choices of the first prompt, then of the next."""

    envelope: Envelope
    model: ModelName
    sequences: tuple[SequencePlan, ...]
    choices_per_prompt: int
    num_prompt_tokens: int  # each prompt once, whatever n is
    stop: tuple[str, ...] = ()
    cache_salt: str = ""  # of the tenant and the request
    prefix_hashes: PackedIds = NO_IDS  # of what all its prompts begin with


def plan(
    body: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    *,
    spec: ModelSpec,
    defaults: Defaults,
    settings: HttpSettings,
    envelope: Envelope,
    seed: int,
) -> Generation:
    """`seed` serves where the client sent none.

    Raises InvalidRequest or ContextLengthExceeded, naming the field, for what no worker could ever serve.
    """
    _check_limits(body, len(prompts), settings)
    base = _sampling(body, spec, defaults, settings)
    sequences = []
    for i, prompt in enumerate(prompts):
        where = f"prompt[{i}]" if len(prompts) > 1 else "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
        _check_ids(prompt, spec, where)
        sampling = replace(base, max_tokens=_max_tokens(body, len(prompt), spec, defaults, where))
        if sampling.min_tokens > sampling.max_tokens:
            raise InvalidRequest(f"min_tokens={sampling.min_tokens} is above max_tokens={sampling.max_tokens}", param="min_tokens")
        packed = pack_ids(prompt)
        for choice in range(body.n):
            seeded = replace(sampling, seed=choice_seed(seed if body.seed is None else body.seed, choice))
            sequences.append(SequencePlan(prompt_ids=packed, num_prompt_tokens=len(prompt), sampling=seeded))
    salt = salt_of(envelope.tenant, body.cache_salt or "")
    return Generation(
        envelope=_with_slo(envelope, body.slo),
        model=spec.model,
        sequences=tuple(sequences),
        choices_per_prompt=body.n,
        num_prompt_tokens=sum(map(len, prompts)),
        stop=tuple(body.stop),
        cache_salt=salt,
        prefix_hashes=marks_of(spec, salt, (one.prompt_ids for one in sequences)),
    )


def _with_slo(envelope: Envelope, slo: SloTarget | None) -> Envelope:
    """What the body says of deadlines, where no header does."""
    if slo is None:
        return envelope
    return replace(
        envelope,
        ttft_slo_s=envelope.ttft_slo_s or (slo.ttft_ms and slo.ttft_ms / 1e3),
        tpot_slo_s=envelope.tpot_slo_s or (slo.tpot_ms and slo.tpot_ms / 1e3),
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed itself for the first choice, independent ones for the others; in [0, 2**63)."""
    if choice == 0:
        return seed % INT64
    digest = hashlib.blake2b(f"{seed % INT64}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % INT64


def _check_limits(body: GenerationRequest, num_prompts: int, settings: HttpSettings) -> None:
    if body.n > settings.max_choices:
        raise InvalidRequest(f"n={body.n} is above this server's limit of {settings.max_choices}", param="n")
    if body.n * num_prompts > settings.max_sequences:
        raise InvalidRequest(
            f"{num_prompts} prompts with n={body.n} are above this server's limit of {settings.max_sequences} sequences", param="prompt"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only for stream=true", param="stream_options")
    if isinstance(body, CompletionRequest):
        if body.best_of is not None and body.best_of != body.n:
            raise InvalidRequest(f"best_of={body.best_of} is not supported beside n={body.n}; leave it out", param="best_of")
        if body.echo and body.logprobs is not None:
            raise InvalidRequest("echo with logprobs is not supported: the prompt's tokens have none; leave one of them out", param="echo")


def _sampling(body: GenerationRequest, spec: ModelSpec, defaults: Defaults, settings: HttpSettings) -> SamplingParams:
    """What all sequences share. Its max_tokens and its seed are replaced in each."""
    for token_id in body.logit_bias:
        if token_id >= spec.vocab_size:
            raise InvalidRequest(f"logit_bias names token {token_id}; {spec.model} has {spec.vocab_size}", param="logit_bias")
    for i, token_id in enumerate(body.stop_token_ids):
        if token_id >= spec.vocab_size:
            where = f"stop_token_ids[{i}]"
            raise InvalidRequest(f"{where}={token_id} is not a token of {spec.model}, which has {spec.vocab_size}", param=where)
    top_p = defaults.top_p if body.top_p is None else body.top_p
    top_k = defaults.top_k if body.top_k is None else body.top_k
    return SamplingParams(
        max_tokens=1,
        min_tokens=body.min_tokens,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=max(top_p, MIN_TOP_P),
        top_k=max(top_k, 0),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        repetition_penalty=defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple(sorted(body.logit_bias.items())),
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logprobs=_num_logprobs(body, settings),
    )


def _num_logprobs(body: GenerationRequest, settings: HttpSettings) -> int | None:
    """None: no logprobs; k: the drawn token's, and the k likeliest."""
    if isinstance(body, ChatCompletionRequest):
        name, asked = "top_logprobs", body.top_logprobs
        if asked and not body.logprobs:
            raise InvalidRequest(f"top_logprobs={asked} needs logprobs=true", param="top_logprobs")
        wanted = asked if body.logprobs else None
    else:
        assert isinstance(body, CompletionRequest)
        name, wanted = "logprobs", body.logprobs
    if wanted is not None and wanted > settings.max_logprobs:
        raise InvalidRequest(f"{name}={wanted} is above this server's limit of {settings.max_logprobs}", param=name)
    return wanted


def _check_ids(prompt: Sequence[int], spec: ModelSpec, where: str) -> None:
    if not prompt:
        raise InvalidRequest(f"{where} is empty: there is no token to begin from", param=where)
    worst = max(prompt)
    if worst >= spec.vocab_size:
        at = f"{where}[{list(prompt).index(worst)}]"
        raise InvalidRequest(f"{at}={worst} is not a token of {spec.model}, which has {spec.vocab_size}", param=at)


def _max_tokens(body: GenerationRequest, num_prompt_tokens: int, spec: ModelSpec, defaults: Defaults, where: str) -> int:
    """How many tokens this sequence may have. Raises ContextLengthExceeded when prompt and output can never fit."""
    room = spec.max_model_len - num_prompt_tokens
    name, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        if asked is not None and asked != body.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"{where} has {num_prompt_tokens} tokens; {spec.model} holds {spec.max_model_len}, prompt and output together", param=where
        )
    if asked is None:
        limit = COMPLETION_MAX_TOKENS if isinstance(body, CompletionRequest) else defaults.max_new_tokens or room
        return min(limit, room)
    if asked > room:
        raise ContextLengthExceeded(
            f"{where} has {num_prompt_tokens} tokens and {name} is {asked}, together {num_prompt_tokens + asked}; "
            f"{spec.model} holds {spec.max_model_len}; shorten the prompt or ask for at most {room}",
            param=name,
        )
    return asked
