"""The GPU's pass with all of its kernels, interpreted on the CPU: what is claimed of the CPU's holds, transformers' tokens first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import pytest
import torch

from polymux.actors.model_runner import PagedCache
from polymux.actors.weights.checkpoint import Checkpoint

from ..kernels.gpu.planned import PlannedModel
from .conftest import make_runner
from .test_model_runner import test_no_logits_are_computed_when_no_row_is_wanted as test_no_logits_are_computed_when_no_row_is_wanted
from .test_model_runner import test_on_layer_finds_that_layers_kv_in_the_cache as test_on_layer_finds_that_layers_kv_in_the_cache
from .test_model_runner import test_only_a_sequences_own_slots_are_written as test_only_a_sequences_own_slots_are_written
from .test_models import NAMES, error, reference_greedy, reference_logits, run_in_chunks, token_ids

CheckpointOf = Callable[..., Path]
RunnerFor = Callable[..., Any]
CHUNKS = (5, 17, 1, 12)  # a step takes the interpreter seconds
LENGTH = sum(CHUNKS)  # longer than every sliding window


@pytest.fixture
def runner_for() -> RunnerFor:
    def make(checkpoint: Checkpoint, dtype: str, *, batch_invariant: bool = False) -> Any:
        runner = make_runner(checkpoint, dtype, batch_invariant=batch_invariant, layout="plain")
        bound = runner.model
        assert isinstance(bound._cache, PagedCache)
        runner.model = PlannedModel(bound._skeleton, bound._weights, runner.kv)  # type: ignore[assignment]
        return runner

    return make


@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_are_transformers_in_chunks(name: str, checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    path, ids = checkpoint_of(name), token_ids(LENGTH)
    expected = reference_logits(path, "float32", ids)
    found = run_in_chunks(runner_for(Checkpoint.open(path), "float32"), ids, CHUNKS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_half_precision_is_as_close_to_the_exact_logits_as_transformers_is(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    path, ids = checkpoint_of("qwen3", "float16"), token_ids(LENGTH)
    exact = reference_logits(path, "float32", ids)
    theirs = error(reference_logits(path, "float16", ids), exact)
    ours = error(run_in_chunks(runner_for(Checkpoint.open(path), "float16"), ids, CHUNKS), exact)
    assert ours < 1.3 * theirs, f"relative error {ours:.2e}, transformers' {theirs:.2e}"


def test_greedy_tokens_are_transformers_in_one_batch(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    path, prompts = checkpoint_of("qwen2-windows"), {"a": token_ids(12, 12), "b": token_ids(5, 5)}
    expected = {key: reference_greedy(path, prompt, 4) for key, prompt in prompts.items()}
    assert runner_for(Checkpoint.open(path), "float32").greedy(prompts, 4) == expected


def test_under_batch_invariant_a_sequence_has_the_same_bits_alone_and_in_company(
    checkpoint_of: CheckpointOf, runner_for: RunnerFor
) -> None:
    checkpoint, ids = Checkpoint.open(checkpoint_of("qwen3")), token_ids(9)
    alone = run_in_chunks(runner_for(checkpoint, "float32", batch_invariant=True), ids, (8, 1))
    runner = runner_for(checkpoint, "float32", batch_invariant=True)
    runner.step({"other": token_ids(4, 1), "s": ids[:3]})
    runner.step({"s": ids[3:8]})
    last = runner.step({"other": [5], "s": ids[8:]})["s"]
    assert torch.equal(last[0], alone[-1])
