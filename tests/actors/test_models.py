"""Every architecture against transformers on a random checkpoint: logits, chunked prefill, token by token, greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.models.rope import RotaryTable, inverse_frequencies
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import DTYPES

NAMES = ("llama", "llama-tied", "mistral", "qwen2-tied", "qwen2-windows", "qwen3", "qwen3-tied")
LENGTH = 100  # longer than every sliding window, and than the length that llama3 scaling stretches
CHUNKS = (5, 33, 1, 1, 30, 1, 29)
PROMPTS = {"a": 40, "b": 7, "c": 21}

CheckpointOf = Callable[..., Path]
RunnerFor = Callable[..., Any]


def token_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(515, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@cache
def reference(path: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="eager").eval()


def reference_logits(path: Path, dtype: str, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return reference(path, dtype)(torch.tensor([ids])).logits[0].float()


def reference_greedy(path: Path, ids: list[int], num_tokens: int) -> list[int]:
    prompt = torch.tensor([ids])
    out = reference(path, "float32").generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def run_in_chunks(runner: Any, ids: list[int], chunks: tuple[int, ...]) -> Tensor:
    parts, start = [], 0
    for size in chunks:
        parts.append(runner.step({"s": ids[start : start + size]})["s"])
        start += size
    return torch.cat(parts)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", ["onednn", "plain"])
@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_are_transformers_in_one_prefill_in_chunks_and_token_by_token(
    name: str, layout: str, pack_all: None, checkpoint_of: CheckpointOf, runner_for: RunnerFor
) -> None:
    path, ids = checkpoint_of(name), token_ids(LENGTH)
    expected = reference_logits(path, "float32", ids)
    for chunks in ((LENGTH,), CHUNKS, (1,) * LENGTH):
        found = run_in_chunks(runner_for(Checkpoint.open(path), "float32", layout=layout), ids, chunks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_close_to_the_exact_logits_as_transformers_is(
    name: str, dtype: str, checkpoint_of: CheckpointOf, runner_for: RunnerFor
) -> None:
    path, ids = checkpoint_of(name, dtype), token_ids(LENGTH)
    exact = reference_logits(path, "float32", ids)
    theirs = error(reference_logits(path, dtype, ids), exact)
    for chunks in ((LENGTH,), CHUNKS):
        ours = error(run_in_chunks(runner_for(Checkpoint.open(path), dtype), ids, chunks), exact)
        assert ours < 1.3 * theirs, f"relative error {ours:.2e}, transformers' {theirs:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_64_greedy_tokens_are_transformers_alone_and_in_a_mixed_batch(
    name: str, checkpoint_of: CheckpointOf, runner_for: RunnerFor
) -> None:
    path = checkpoint_of(name)
    prompts = {key: token_ids(length, seed=length) for key, length in PROMPTS.items()}
    expected = {key: reference_greedy(path, prompt, 64) for key, prompt in prompts.items()}
    checkpoint = Checkpoint.open(path)
    assert runner_for(checkpoint, "float32").greedy(prompts, 64) == expected
    assert runner_for(checkpoint, "float32").greedy({"a": prompts["a"]}, 64) == {"a": expected["a"]}


def test_a_decode_batch_may_hold_a_prompt_in_the_middle(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    path, ids = checkpoint_of("mistral"), token_ids(LENGTH)
    expected = reference_logits(path, "float32", ids)
    runner = runner_for(Checkpoint.open(path), "float32")
    runner.step({"short": ids[:3]})
    runner.step({"long": ids[:90]})
    found = runner.step({"short": ids[3:4], "new": ids[:50], "long": ids[90:91]})
    for name, rows in (("short", slice(3, 4)), ("new", slice(0, 50)), ("long", slice(90, 91))):
        torch.testing.assert_close(found[name], expected[rows], rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_sharded_checkpoint_makes_the_same_image(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    whole, sharded = checkpoint_of("qwen3"), checkpoint_of("qwen3", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    left, right = (runner_for(Checkpoint.open(path), "float32") for path in (whole, sharded))
    assert left.manifest.entries == right.manifest.entries
    assert torch.equal(left.weights, right.weights)


def test_llama3_scaling_is_transformers_and_meets_all_three_bands(checkpoint_of: CheckpointOf) -> None:
    path = checkpoint_of("llama")
    config = ArchConfig.from_json((path / "config.json").read_text(), "config.json")
    found = inverse_frequencies(config)
    torch.testing.assert_close(found, reference(path, "float32").model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    unscaled = 1.0 / 10000.0 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    ratios = unscaled / found
    assert ratios[0] == 1
    assert 1.1 < ratios[2] < 7.9
    assert ratios[-1] == 8


def test_a_rotary_table_does_not_depend_on_how_it_grew(checkpoint_of: CheckpointOf) -> None:
    config = ArchConfig.from_json((checkpoint_of("qwen3") / "config.json").read_text(), "config.json")
    at_once, in_steps = (RotaryTable(config, torch.float32, torch.device("cpu")) for _ in range(2))
    positions = torch.tensor([0, 5, 1023, 1024, 3000])
    for position in positions.tolist():
        in_steps.at(torch.tensor([position]), position)
    for left, right in zip(at_once.at(positions, 3000), in_steps.at(positions, 3000), strict=True):
        assert torch.equal(left, right)
