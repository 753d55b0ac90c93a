"""Costs learned online: they converge, stay possible, and shrug off what happens once."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.cost import (
    DECODE_ANCHORS,
    PREFILL_ANCHORS,
    SWITCH_ANCHORS,
    Fit,
    Roofline,
    decode_features,
    dot,
    guess_decode,
    guess_prefill,
    guess_switch,
    prefill_features,
    switch_features,
)
from polymux.transport.errors import ConfigError
from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.units import ModelName

TRUE_PREFILL = (4e-3, 3e-5, 2e-9)
Observation = tuple[tuple[float, ...], float]
SPEC = ModelSpec(
    model=ModelName("qwen"),
    path="",
    digest="",
    config_json='{"num_attention_heads": 14}',
    dtype="bfloat16",
    kv=KVLayout(num_layers=24, num_kv_heads=2, head_dim=64, dtype="bfloat16"),
    weight_bytes=988_000_000,
    vocab_size=151_936,
    max_model_len=32_768,
    eos_token_ids=(0,),
)


def prefills(
    seed: int, count: int, true: tuple[float, float, float] = TRUE_PREFILL, noise: float = 0.1
) -> list[tuple[tuple[float, ...], float]]:
    rng = random.Random(seed)
    steps = [prefill_features([(rng.choice((0, 512)), rng.randint(8, 512))]) for _ in range(count)]
    return [(x, dot(true, x) * rng.lognormvariate(0, noise)) for x in steps]


def learned(fit: Fit, observations: list[Observation]) -> Fit:
    for x, seconds in observations:
        fit = fit.observe(x, seconds)
    return fit


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    level=st.floats(-2, 2),
    off=st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1)),
)
def test_a_fit_converges_to_the_true_cost_under_noise_from_a_guess_that_is_far_off(
    seed: int, level: float, off: tuple[float, float, float]
) -> None:
    guess = tuple(c * 10 ** (level + d) for c, d in zip(TRUE_PREFILL, off, strict=True))
    fit = learned(Fit.guessed(guess, PREFILL_ANCHORS), prefills(seed, 400))
    for num_tokens in (32, 128, 512):
        x = prefill_features([(0, num_tokens)])
        assert fit.predict(x) == pytest.approx(dot(TRUE_PREFILL, x), rel=0.15)


def test_without_noise_the_coefficients_are_found() -> None:
    fit = learned(Fit.guessed((1e-3, 1e-4, 1e-8), PREFILL_ANCHORS), prefills(1, 600, noise=0.0))
    assert fit.coefficients == pytest.approx(TRUE_PREFILL, rel=0.05)


positive = st.floats(1e-7, 1e2, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 10**6), positive), max_size=60))
def test_predictions_are_positive_and_never_fall_when_work_is_added(steps: list[tuple[int, int, float]]) -> None:
    fit = Fit.guessed((1e-2, 1e-4, 1e-7), DECODE_ANCHORS)
    for num_seqs, kv_tokens, seconds in steps:
        fit = fit.observe(decode_features(num_seqs, kv_tokens), seconds)
    assert all(0 <= c < math.inf for c in fit.coefficients)
    grid = [fit.predict(decode_features(n, kv)) for n, kv in ((1, 16), (1, 500), (4, 500), (4, 9000), (64, 9000), (64, 10**6))]
    assert grid[0] > 0
    assert all(less <= more for less, more in pairwise(grid))


def test_one_step_that_took_a_hundred_times_as_long_hardly_moves_the_fit() -> None:
    fit = learned(Fit.guessed(TRUE_PREFILL, PREFILL_ANCHORS), prefills(2, 100))
    x = prefill_features([(0, 256)])
    before = fit.predict(x)
    assert fit.observe(x, 100 * before).predict(x) == pytest.approx(before, rel=0.05)


def test_a_lasting_change_is_followed() -> None:
    fit = learned(Fit.guessed(TRUE_PREFILL, PREFILL_ANCHORS), prefills(3, 200))
    first, second, third = (5 * c for c in TRUE_PREFILL)
    slower = prefills(4, 300, (first, second, third))
    x = prefill_features([(0, 256)])
    assert learned(fit, slower[:80]).predict(x) == pytest.approx(5 * dot(TRUE_PREFILL, x), rel=0.25)
    assert learned(fit, slower).predict(x) == pytest.approx(5 * dot(TRUE_PREFILL, x), rel=0.1)


@pytest.mark.parametrize("factor", [1e-3, 1e-2, 1e2])
def test_a_guess_that_is_far_off_is_left_behind_within_forty_steps(factor: float) -> None:
    """One far too low would weigh its own first errors most, were they not divided by the time that was seen."""
    fit = learned(Fit.guessed(tuple(c * factor for c in TRUE_PREFILL), PREFILL_ANCHORS), prefills(6, 40))
    x = prefill_features([(0, 256)])
    assert fit.predict(x) == pytest.approx(dot(TRUE_PREFILL, x), rel=0.15)


def test_the_first_step_sets_the_level_and_keeps_the_proportions_of_the_guess() -> None:
    fit = Fit.guessed((1e-2, 1e-4, 1e-7), DECODE_ANCHORS)
    x, other = decode_features(1, 64), decode_features(32, 20_000)
    seen = fit.observe(x, 2 * fit.predict(x))
    assert seen.predict(x) == pytest.approx(2 * fit.predict(x), rel=0.05)
    assert seen.predict(other) == pytest.approx(2 * fit.predict(other), rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_times_that_cannot_be_are_ignored(seconds: float) -> None:
    fit = Fit.guessed((1e-2, 1e-4, 1e-7), DECODE_ANCHORS)
    assert fit.observe(decode_features(1, 1), seconds) is fit


def test_observing_leaves_the_old_value_as_it_was() -> None:
    fit = Fit.guessed((1e-2, 1e-4, 1e-7), DECODE_ANCHORS)
    copy = Fit.from_dict(fit.to_dict())
    fit.observe(decode_features(3, 100), 0.5)
    assert fit == copy


def test_a_saved_fit_goes_on_where_it_stopped() -> None:
    observations = prefills(5, 80)
    fit = learned(Fit.guessed((1e-3, 1e-4, 1e-8), PREFILL_ANCHORS), observations[:40])
    loaded = Fit.from_dict(json.loads(json.dumps(fit.to_dict())))
    assert loaded == fit
    assert learned(loaded, observations[40:]) == learned(fit, observations[40:])


@pytest.mark.parametrize(
    "damage",
    [
        {"coefficients": [1.0]},
        {"gram": [math.nan] * 6},
        {"cross": [-1.0, 0.0, 0.0]},
        {"anchors": [[1.0]]},
        {"spread": -1},
        {"guess": [0, 0, 0]},
        {"num_observed": "many"},
    ],
)
def test_a_damaged_saved_fit_is_refused_with_the_remedy(damage: dict[str, object]) -> None:
    saved = Fit.guessed((1e-2, 1e-4, 1e-7), DECODE_ANCHORS).to_dict()
    with pytest.raises(ConfigError, match="delete the file"):
        Fit.from_dict(saved | damage)


def test_a_saved_fit_without_a_field_is_refused() -> None:
    saved = Fit.guessed((1e-2, 1e-4, 1e-7), DECODE_ANCHORS).to_dict()
    del saved["weight"]
    with pytest.raises(ConfigError, match="weight"):
        Fit.from_dict(saved)


@pytest.mark.parametrize("guess", [(-1.0, 0.0), (0.0, 0.0), (math.inf, 1.0), (1.0, 1.0, 1.0)])
def test_a_guess_that_cannot_be_a_cost_is_refused(guess: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="guess"):
        Fit.guessed(guess, SWITCH_ANCHORS)


@settings(deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=12))
def test_the_chunks_of_a_prompt_have_the_features_of_the_whole_prompt(chunks: list[int]) -> None:
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    parts = [prefill_features([(start, size)]) for start, size in zip(starts, chunks, strict=True)]
    whole = prefill_features([(0, sum(chunks))])
    assert sum(part[1] for part in parts) == whole[1]
    assert sum(part[2] for part in parts) == whole[2]


def test_the_roofline_guess_of_a_known_model_is_of_the_right_size() -> None:
    """Qwen2.5-0.5B in bf16: about 1 GB a step and 0.5 G weights; a core reads 15 GB/s and multiplies at 100 GFLOP/s."""
    device = Roofline()
    assert guess_decode(SPEC, device).predict(decode_features(1, 128)) == pytest.approx(0.077, rel=0.1)
    assert guess_prefill(SPEC, device).predict(prefill_features([(0, 512)])) == pytest.approx(5.3, rel=0.1)
    assert guess_switch(device).predict(switch_features(SPEC.weight_bytes)) == pytest.approx(0.1245, rel=0.01)
