"""Sampling by sequence: parameters, endings, reproducible streams, logprobs."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.actors.sampler import SampledToken, SamplerState, sample, sample_each
from polymux.transport.errors import InvalidRequest, NonFiniteLogits
from polymux.transport.messages import FinishReason, SamplingParams

VOCAB_SIZE = 40
EOS = (2, 7)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _state(prompt: tuple[int, ...] = (1, 5), output: tuple[int, ...] = (), **params: Any) -> SamplerState:
    settings_ = {"max_tokens": 100, **params}
    return SamplerState(SamplingParams(**settings_), prompt, output, EOS, VOCAB_SIZE)


def _logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def _token(logits: Tensor, state: SamplerState) -> int:
    return sample(logits, [state])[0].token_id


# -- streams ----------------------------------------------------------------------------------------------------------


def test_temperature_zero_is_greedy() -> None:
    logits = _logits(8)
    states = [_state(temperature=0.0, seed=row) for row in range(8)]
    assert [t.token_id for t in sample(logits, states)] == logits.argmax(1).tolist()


def test_frequencies_of_a_stream_match_the_probabilities() -> None:
    """One sequence's draws over 4000 steps of equal logits: chi-square of a fixed seed, at p = 0.001."""
    logits = _logits(seed=3) / 2
    state = _state(seed=1234)
    counts = torch.zeros(VOCAB_SIZE)
    for _ in range(4000):
        token_id = _token(logits, state)
        state.append(token_id)
        counts[token_id] += 1
    expected = logits[0].softmax(0) * 4000
    common = expected >= 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum())
    assert chi_square < degrees + 3.1 * math.sqrt(2 * degrees) + 4


def test_a_seed_repeats_its_stream_and_another_seed_does_not() -> None:
    def stream(seed: int) -> list[int]:
        state = _state(seed=seed)
        tokens = []
        for step in range(40):
            tokens.append(_token(_logits(seed=step), state))
            state.append(tokens[-1])
        return tokens

    assert stream(5) == stream(5)
    assert stream(5) != stream(6)


def test_a_replayed_sequence_draws_what_it_would_have_drawn() -> None:
    params: dict[str, Any] = {"seed": 9, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2, "top_p": 0.9}
    state = _state(**params)
    tokens: list[int] = []
    for step in range(20):
        replayed = _state(output=tuple(tokens), **params)
        token_id = _token(_logits(seed=step), state)
        assert _token(_logits(seed=step), replayed) == token_id
        state.append(token_id)
        tokens.append(token_id)


STATES = st.builds(
    lambda **kw: kw,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (4, -100.0))]),
    min_tokens=st.sampled_from([0, 50]),
    logprobs=st.sampled_from([None, 0, 3]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=80, deadline=None)
@given(params=st.lists(STATES, min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_a_sequence_gets_the_same_token_and_logprobs_alone_and_in_any_batch(params: list[dict[str, Any]], seed: int) -> None:
    logits = _logits(len(params), seed)
    states = [_state(output=(3, 3, 9)[: i % 4], **one) for i, one in enumerate(params)]
    alone = [sample(logits[row : row + 1].clone(), [state])[0] for row, state in enumerate(states)]
    assert sample(logits, states) == alone
    assert sample(logits.flip(0), states[::-1]) == alone[::-1]


def test_sampling_leaves_the_logits_as_they_were() -> None:
    logits = _logits(2)
    before = logits.clone()
    sample(logits, [_state(repetition_penalty=1.5, logit_bias=((1, 5.0),), logprobs=2), _state(min_p=0.2)])
    assert torch.equal(logits, before)


# -- edits ------------------------------------------------------------------------------------------------------------


def _edited_reference(logits: list[float], prompt: tuple[int, ...], output: tuple[int, ...], params: SamplingParams) -> list[float]:
    """The order of vLLM: min_tokens, bias, repetition, frequency, presence; each plain."""
    values = list(logits)
    if len(output) < params.min_tokens:
        for i in {*EOS, *params.stop_token_ids}:
            values[i] = -math.inf
    for i, bias in params.logit_bias:
        values[i] += bias
    for i in range(len(values)):
        if i in prompt or i in output:
            values[i] = values[i] / params.repetition_penalty if values[i] > 0 else values[i] * params.repetition_penalty
        values[i] -= params.frequency_penalty * output.count(i)
        values[i] -= params.presence_penalty * (i in output)
    return values


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12).map(tuple),
    output=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=90).map(tuple),
    params=st.builds(
        SamplingParams,
        max_tokens=st.just(200),
        repetition_penalty=st.sampled_from([0.8, 1.0, 1.7]),
        frequency_penalty=st.sampled_from([-1.0, 0.0, 0.4]),
        presence_penalty=st.sampled_from([-0.5, 0.0, 1.5]),
        logit_bias=st.sampled_from([(), ((7, 3.0), (0, -100.0), (31, 0.5))]),
        min_tokens=st.sampled_from([0, 60]),
        stop_token_ids=st.sampled_from([(), (11, 12)]),
    ),
    seed=st.integers(0, 100),
)
def test_edited_logits_match_a_plain_reference(prompt: tuple[int, ...], output: tuple[int, ...], params: SamplingParams, seed: int) -> None:
    state = SamplerState(params, prompt, (), EOS, VOCAB_SIZE)
    for token_id in output:
        state.append(token_id)
    logits = _logits(seed=seed)[0]
    expected = _edited_reference(logits.tolist(), prompt, output, params)
    state.edit_(logits)
    assert logits.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_a_bias_can_force_and_forbid_a_token() -> None:
    logits = _logits(50)
    states = [_state(seed=row, logit_bias=((30, 100.0),)) for row in range(50)]
    assert {t.token_id for t in sample(logits, states)} == {30}
    best = int(logits[0].argmax())
    assert _token(logits[:1], _state(temperature=0.0, logit_bias=((best, -100.0),))) == int(logits[0].topk(2).indices[1])


def test_no_end_token_is_chosen_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [2, 7, 11]] = 50.0
    state = _state(temperature=0.0, min_tokens=2, stop_token_ids=(11,))
    for _ in range(2):
        token_id = _token(logits, state)
        assert token_id not in (2, 7, 11)
        state.append(token_id)
    assert _token(logits, state) == 2


def test_min_tokens_does_not_forbid_an_ignored_eos() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 2] = 50.0
    assert _token(logits, _state(temperature=0.0, min_tokens=5, ignore_eos=True)) == 2


# -- endings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "params", "is_full", "reason"),
    [
        ((5, 2), {}, False, FinishReason.STOP),
        ((5, 7), {}, False, FinishReason.STOP),
        ((5, 2), {"ignore_eos": True}, False, None),
        ((5, 9), {"stop_token_ids": (9,)}, False, FinishReason.STOP),
        ((5, 9), {"stop_token_ids": (9,), "ignore_eos": True}, False, FinishReason.STOP),
        ((2, 5), {}, False, None),
        ((5, 6), {"max_tokens": 2}, False, FinishReason.LENGTH),
        ((5, 6), {"max_tokens": 3}, False, None),
        ((5, 2), {"max_tokens": 2}, False, FinishReason.STOP),
        ((5, 6), {}, True, FinishReason.LENGTH),
        ((5, 2), {}, True, FinishReason.STOP),
        ((), {}, False, None),
    ],
)
def test_a_sequence_ends_for_one_reason(
    output: tuple[int, ...], params: dict[str, Any], is_full: bool, reason: FinishReason | None
) -> None:
    appended = _state(**params)
    for token_id in output:
        appended.append(token_id)
    assert appended.finish_reason(is_full) is reason
    assert _state(output=output, **params).finish_reason(is_full) is reason


# -- logprobs ---------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_whatever_was_done_to_choose() -> None:
    logits = _logits(4, seed=8)
    states = [
        _state(logprobs=5, temperature=0.3, top_k=2, seed=1),
        _state(logprobs=0, repetition_penalty=1.8, seed=2),
        _state(seed=3),
        _state(logprobs=20, temperature=0.0, logit_bias=((4, 100.0),)),
    ]
    expected = logits.double().log_softmax(1)
    tokens = sample(logits, states)
    for row in (0, 1, 3):
        assert tokens[row].logprob == pytest.approx(float(expected[row, tokens[row].token_id]), abs=2e-6)
    assert [len(token.top) for token in tokens] == [5, 0, 0, 20]
    for row in (0, 3):
        ranked = expected[row].topk(len(tokens[row].top))
        assert [i for i, _ in tokens[row].top] == ranked.indices.tolist()
        assert [p for _, p in tokens[row].top] == pytest.approx(ranked.values.tolist(), abs=2e-6)
    assert tokens[2] == SampledToken(token_id=tokens[2].token_id)


def test_the_most_likely_tokens_logprob_is_never_positive() -> None:
    logits = torch.full((1, VOCAB_SIZE), -60.0)
    logits[0, 4] = 60.0
    token = sample(logits, [_state(temperature=0.0, logprobs=1)])[0]
    assert token.logprob == 0.0
    assert token.top == ((4, 0.0),)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "presence_penalty": 1.0}])
def test_a_damaged_row_is_an_error_that_names_it(damage: float, params: dict[str, Any]) -> None:
    logits = _logits(3)
    logits[1, 6] = damage
    with pytest.raises(NonFiniteLogits) as caught:
        sample(logits, [_state(**params) for _ in range(3)])
    assert caught.value.rows == (1,)


def test_a_row_of_impossible_tokens_is_an_error() -> None:
    with pytest.raises(NonFiniteLogits):
        sample(torch.full((1, VOCAB_SIZE), -math.inf), [_state()])


def test_edits_that_leave_no_token_are_an_error_that_names_the_row() -> None:
    only_ends = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=(0, 1))
    states = [SamplerState(SamplingParams(max_tokens=9), (), (), (), 2), SamplerState(only_ends, (), (), (), 2)]
    with pytest.raises(NonFiniteLogits) as caught:
        sample(torch.zeros(2, 2), states)
    assert caught.value.rows == (1,)


@pytest.mark.parametrize("prompt", [(1, VOCAB_SIZE), (-1,)])
def test_a_prompt_outside_the_vocabulary_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _state(prompt=prompt)
    assert caught.value.param == "prompt"


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        _state(logit_bias=((VOCAB_SIZE, 1.0),))
    assert caught.value.param == "logit_bias"


def test_a_stop_id_outside_the_vocabulary_is_harmless() -> None:
    assert 0 <= _token(_logits(), _state(stop_token_ids=(10**6,), min_tokens=3)) < VOCAB_SIZE


def test_a_row_without_finite_logits_costs_the_others_nothing() -> None:
    logits = torch.linspace(-1, 1, 4 * 32).view(4, 32)
    logits[1], logits[3] = torch.nan, -torch.inf
    params = SamplingParams(max_tokens=4, temperature=0.8, seed=3)
    states = [SamplerState(params, [1], [], (0,), 32) for _ in range(4)]
    results = sample_each(logits, states)
    assert [isinstance(result, NonFiniteLogits) for result in results] == [False, True, False, True]
    assert results[::2] == sample(logits[::2], states[::2])
