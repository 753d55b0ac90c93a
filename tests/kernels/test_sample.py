"""Draws against a scalar definition, a float reference and a full sort; and the promise that a row never feels its batch."""

import math
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels import sample
from polymux.kernels.sample import Draw, draw, fixed_weights, greedy, log_normalizers, penalize_, top

WORDS = st.integers(0, 2**64 - 1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _logits(seed: int, rows: int, vocab_size: int, spread: float = 2.0, step: float = 0.0) -> Tensor:
    """Normal logits; a `step` rounds them, so that many are equal."""
    values = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    return (values / step).round() * step if step else values


def _draw(logits: Tensor, draws: list[Draw]) -> list[int]:
    tokens = draw(logits, logits.amax(1), dict(enumerate(draws)))
    return [tokens[row] for row in range(len(draws))]


def _scalar_draw(logits: list[float], one: Draw) -> int:
    """The definition in `sample`'s docstring, element by element, in numpy's fp32 scalars and Python's integers."""
    f32 = np.float32
    scale = f32(math.log2(math.e) / float(f32(one.temperature)))
    octaves = [max(f32(f32(f32(x) - f32(max(logits))) * scale), f32(sample.DEAD)) for x in logits]
    if one.min_p > 0:
        octaves = [x if x >= f32(math.log2(one.min_p)) else f32(sample.DEAD) for x in octaves]
    weights = []
    for x in octaves:
        whole = f32(math.floor(x))
        fraction, value = f32(x - whole), f32(sample.EXP2[5])
        for coefficient in sample.EXP2[4::-1]:
            value = f32(f32(value * fraction) + f32(coefficient))
        weights.append(int(math.ldexp(float(value), int(whole) + sample.FIXED_BITS)))
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if one.top_k:
        ranked = ranked[: one.top_k]
    total = sum(weights[i] for i in ranked)
    target = total if one.top_p >= 1 else max(1, min(total, math.ceil(total * one.top_p)))
    kept, reached = [], 0
    for i in ranked:
        if reached < target:
            kept.append(i)
            reached += weights[i]
    mark, running = one.word * reached >> 64, 0
    for i in sorted(kept):
        running += weights[i]
        if running > mark:
            return i
    raise AssertionError("the mark lies past the sum")


def _reference_probabilities(logits: Tensor, one: Draw) -> Tensor:
    """Probabilities by the textbook, in float64 with a full sort; which of equal logits are kept is left to the lower id."""
    p = (logits.double() / one.temperature).softmax(0)
    p = torch.where(p >= one.min_p * p.max(), p, 0.0)
    order = torch.tensor(sorted(range(len(p)), key=lambda i: (-float(logits[i]), i)))
    if one.top_k:
        p[order[one.top_k :]] = 0
    p /= p.sum()
    before = p[order].cumsum(0) - p[order]
    p[order[before >= one.top_p]] = 0
    return p / p.sum()


DRAWS = st.builds(
    Draw,
    word=WORDS,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 40),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-4, 1)),
)


@settings(max_examples=150, deadline=None)
@given(one=DRAWS, seed=st.integers(0, 1000), step=st.sampled_from([0.0, 0.5]), short_top_k=st.sampled_from([1, 1024]))
def test_a_draw_is_the_scalar_definition_to_the_bit(one: Draw, seed: int, step: float, short_top_k: int) -> None:
    logits = _logits(seed, 1, 33, step=step)
    with patch.object(sample, "SHORT_TOP_K", short_top_k):  # 1: count the top k in a histogram
        assert _draw(logits, [one]) == [_scalar_draw(logits[0].tolist(), one)]


@settings(max_examples=60, deadline=None)
@given(draws=st.lists(DRAWS, min_size=2, max_size=6), seed=st.integers(0, 1000), order=st.randoms(use_true_random=False))
def test_a_row_draws_the_same_alone_shuffled_and_in_a_strided_batch(draws: list[Draw], seed: int, order: Random) -> None:
    draws = [replace(one, top_k=one.top_k * 100) if i % 2 else one for i, one in enumerate(draws)]  # past SHORT_TOP_K too
    logits = _logits(seed, len(draws), 3000)
    alone = [_draw(logits[row : row + 1].clone(), [one])[0] for row, one in enumerate(draws)]
    assert _draw(logits, draws) == alone
    places = list(range(len(draws)))
    order.shuffle(places)
    wide = torch.full((len(draws), 3100), 9.0)
    wide[:, :3000] = logits[places]
    assert _draw(wide[:, :3000], [draws[place] for place in places]) == [alone[place] for place in places]


def test_a_row_draws_the_same_with_any_number_of_threads() -> None:
    logits = _logits(5, 3, 100_000)
    draws = [Draw(word=2**63 + 12345), Draw(word=2**62, top_p=0.8, min_p=1e-4), Draw(word=99 << 50, top_k=5000)]
    one_thread = _draw(logits, draws), log_normalizers(logits, logits.amax(1))
    torch.set_num_threads(2)
    try:
        assert (_draw(logits, draws), log_normalizers(logits, logits.amax(1))) == one_thread
    finally:
        torch.set_num_threads(1)


CASES = [
    Draw(word=0),
    Draw(word=0, temperature=0.6),
    Draw(word=0, temperature=3.0),
    Draw(word=0, top_k=7),
    Draw(word=0, top_p=0.8),
    Draw(word=0, min_p=0.1),
    Draw(word=0, temperature=1.5, min_p=0.02, top_k=20, top_p=0.7),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
def test_evenly_spread_words_give_each_token_its_probability_and_no_other_token(case: Draw, step: float) -> None:
    """With words evenly spread over [0, 2**64), each token's share is its probability to within two words: no chance is involved."""
    num_words = 4096
    logits = _logits(3, 1, 48, spread=0.8, step=step)
    words = [(2 * i + 1) * 2**63 // num_words for i in range(num_words)]
    tokens = _draw(logits.expand(num_words, -1), [replace(case, word=word) for word in words])
    counts = torch.bincount(torch.tensor(tokens), minlength=48)
    expected = _reference_probabilities(logits[0], case)
    assert expected[expected > 0].min() > 2 / num_words  # so that every kept token must show
    assert ((counts - expected * num_words).abs() <= 2).all()
    assert ((counts > 0) == (expected > 0)).all()


@pytest.mark.parametrize("case", [Draw(word=0), Draw(word=0, top_p=0.9), Draw(word=0, top_p=0.3, min_p=1e-3), Draw(word=0, top_k=4000)])
def test_draws_from_a_real_vocabulary_follow_its_distribution(case: Draw) -> None:
    logits = _logits(11, 1, 151_936)
    words = [(2 * i + 1) * 2**63 // 64 for i in range(64)]
    tokens = torch.tensor(_draw(logits.expand(64, -1), [replace(case, word=word) for word in words]))
    p = _reference_probabilities(logits[0], case)
    assert (p[tokens] > 0).all()
    after = p.cumsum(0)[tokens]
    u = torch.tensor([word / 2**64 for word in words], dtype=torch.float64)
    assert (u <= after + 1e-6).all()
    assert (u >= after - p[tokens] - 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    step=st.sampled_from([0.0, 0.01, 1.0]),
    vocab_size=st.sampled_from([1, 2, 257, 4000]),
    share=st.floats(0, 1.2),
)
def test_what_a_histogram_keeps_is_what_a_full_sort_keeps(seed: int, step: float, vocab_size: int, share: float) -> None:
    logits = _logits(seed, 3, vocab_size, step=step)
    octaves = sample._octaves(logits, logits.amax(1), torch.ones(3, 1))
    buckets = octaves.mul(-sample.BUCKETS_PER_OCTAVE).to(torch.int64)
    weights = fixed_weights(octaves)
    targets = (weights.sum(1, keepdim=True).double() * share).ceil().to(torch.int64).clamp_(min=1)
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranked = weights.gather(1, order)
    expected = torch.zeros_like(weights).scatter_(1, order, torch.where(ranked.cumsum(1) - ranked < targets, ranked, 0))
    sample._drop_beyond(weights, weights, targets, logits, buckets)
    assert torch.equal(weights, expected)


def test_weights_are_powers_of_two_to_fp32_precision_and_fall_with_the_logit() -> None:
    octaves = torch.linspace(-40.9, 0, 500_001)
    weights = fixed_weights(octaves.clone())
    exact = torch.exp2(octaves.double()) * 2.0**40
    assert ((weights - exact).abs() <= 1 + exact * 3e-7).all()
    assert (weights.diff() >= 0).all()
    assert fixed_weights(torch.tensor([0.0, -1.0, -40.0, -41.0])).tolist() == [2**40, 2**39, 1, 0]


def test_greedy_is_the_first_of_equals_and_shows_a_nan() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, math.nan, 9.0, 1.0], [-math.inf, -math.inf, -5.0, -5.0]])
    assert greedy(logits).tolist() == [1, 1, 2]


def test_top_k_of_one_is_the_greedy_choice_even_on_ties() -> None:
    logits = _logits(1, 64, 500, step=1.0)
    draws = [Draw(word=row * 0x0123456789ABCDEF % 2**64, temperature=5.0, top_k=1) for row in range(64)]
    assert _draw(logits, draws) == greedy(logits).tolist()


def test_the_smallest_nucleus_is_the_greedy_choice() -> None:
    logits = _logits(2, 8, 500)
    assert _draw(logits, [Draw(word=2**64 - 1, top_p=1e-9)] * 8) == greedy(logits).tolist()
    assert _draw(logits, [Draw(word=2**64 - 1, min_p=1.0)] * 8) == greedy(logits).tolist()


@pytest.mark.parametrize("k", [1, 5, 20, 300])
def test_top_ranks_equals_by_id(k: int) -> None:
    logits = _logits(4, 5, 300, step=0.5)
    values, ids = top(logits, k)
    for row in range(5):
        ranked = sorted(range(300), key=lambda i: (-float(logits[row, i]), i))[:k]
        assert ids[row].tolist() == ranked
        assert values[row].tolist() == logits[row, ranked].tolist()


def test_top_of_a_small_vocabulary_is_all_of_it() -> None:
    assert top(torch.tensor([[1.0, 2.0]]), 20)[1].tolist() == [[1, 0]]


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = -math.inf
    words = [i << 58 for i in range(64)]
    assert set(_draw(logits.expand(64, -1), [Draw(word=word) for word in words])) == {0, 1, 3}


def test_log_normalizers_are_logsumexp() -> None:
    logits = torch.cat([_logits(6, 3, 5000), _logits(7, 1, 5000, spread=30.0), torch.full((1, 5000), -80.0)])
    expected = logits.double().logsumexp(1)
    assert log_normalizers(logits, logits.amax(1)) == pytest.approx(expected.tolist(), abs=1e-6)


def test_penalties_match_the_formula_element_by_element() -> None:
    logits = _logits(8, 1, 50)[0]
    ids, counts = torch.tensor([3, 9, 10, 49]), torch.tensor([0.0, 1.0, 4.0, 2.0])
    expected = logits.tolist()
    for token_id, count in zip(ids.tolist(), counts.tolist(), strict=True):
        value = expected[token_id]
        value = value / 1.3 if value > 0 else value * 1.3
        expected[token_id] = value - 0.5 * count - (0.7 if count else 0.0)
    penalize_(logits, ids, counts, repetition=1.3, frequency=0.5, presence=0.7)
    assert logits.tolist() == pytest.approx(expected, abs=1e-6)
