"""The model runner: any batch in any order, writes to a sequence's own slots only, bits that ignore the company under batch_invariant."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polymux.actors.model_runner import MAX_BOUND, ForwardBatch, ModelRunner, SequenceSlice
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.kernels import few_rows
from polymux.transport.errors import ConfigError

CheckpointOf = Callable[..., Path]
RunnerFor = Callable[..., Any]


def token_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(515, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_rows_come_back_in_the_order_they_were_given(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32")
    lengths = {"a": 3, "b": 40, "c": 17, "d": 39}
    for name, length in lengths.items():
        runner.step({name: token_ids(length, length)})
    alone = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32")
    expected = {name: alone.step({name: [*token_ids(length, length), 7]})[name][-1] for name, length in lengths.items()}
    slices = tuple(runner.slice(name, row, 1) for row, name in enumerate(lengths))
    last_rows = runner.model.forward(ForwardBatch(token_ids=torch.full((4,), 7), slices=slices, logits_rows=None))
    chosen = runner.model.forward(ForwardBatch(token_ids=torch.full((4,), 7), slices=slices, logits_rows=torch.tensor([2, 0])))
    assert last_rows.dtype == torch.float32
    torch.testing.assert_close(last_rows, torch.stack(list(expected.values())), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chosen, last_rows[[2, 0]], rtol=1e-4, atol=1e-4)


def test_no_logits_are_computed_when_no_row_is_wanted(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("llama")), "float32")
    batch = ForwardBatch(
        token_ids=torch.tensor([1, 2, 3]), slices=(runner.slice("s", 0, 3),), logits_rows=torch.empty(0, dtype=torch.int64)
    )
    assert runner.model.forward(batch).shape == (0, 515)


def test_on_layer_finds_that_layers_kv_in_the_cache(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("llama")), "float32")
    seen: list[int] = []

    def on_layer(layer: int) -> None:
        slots = runner.kv[runner.tables["s"], layer]  # [blocks, 2, Hkv, S, D]
        assert torch.isfinite(slots).all()
        assert not torch.isfinite(runner.kv[runner.tables["s"], layer + 1 :]).any()
        seen.append(layer)

    runner.step({"s": token_ids(21)}, on_layer)
    assert seen == [0, 1, 2]


def test_only_a_sequences_own_slots_are_written(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("mistral")), "float32")
    runner.step({"a": token_ids(20), "b": token_ids(7)})
    before = runner.kv.clone()
    runner.step({"a": token_ids(1), "b": token_ids(3)})
    changed = (before != runner.kv) & ~(before.isnan() & runner.kv.isnan())
    block_and_slot = {tuple(index) for index in changed.any(-1).any(3).any(2).any(1).nonzero().tolist()}
    (_, last_of_a), (first_of_b,) = runner.tables["a"], runner.tables["b"]
    assert block_and_slot == {(last_of_a, 4), (first_of_b, 7), (first_of_b, 8), (first_of_b, 9)}


def test_stale_nan_in_a_reused_block_is_never_met(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("qwen2-tied")), "bfloat16")
    runner.step({"a": token_ids(33), "b": token_ids(2)})
    for _ in range(20):
        assert all(torch.isfinite(rows).all() for rows in runner.step({"b": [3], "a": [5]}).values())


@pytest.mark.parametrize(
    "kv",
    [
        torch.zeros(4, 3, 2, 2, 16, 32, dtype=torch.bfloat16),
        torch.zeros(4, 3, 2, 2, 16, 16),
        torch.zeros(4, 2, 2, 2, 16, 32),
        torch.zeros(4, 3, 2, 2, 32, 16).transpose(4, 5),
    ],
)
def test_a_cache_of_another_shape_is_refused(kv: torch.Tensor, checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32")
    with pytest.raises(ConfigError, match="kv of shape"):
        ModelRunner().bind(runner.manifest, runner.weights, kv)


def test_models_of_one_shape_share_a_skeleton(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    left = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32")
    shared = ModelRunner()
    models = [shared.bind(left.manifest, left.weights.clone(), left.kv) for _ in range(2)]
    assert models[0]._skeleton is models[1]._skeleton


LENGTHS = {"a": 70, "b": 33, "c": 20}
NAMES = ("mistral", "qwen3-tied")


def test_a_model_that_returns_to_its_place_is_not_bound_again(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    left, shared = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32"), ModelRunner()
    weights, elsewhere = left.weights, left.weights.clone()
    first = shared.bind(left.manifest, weights, left.kv)
    assert shared.bind(left.manifest, elsewhere, left.kv) is not first
    assert shared.bind(left.manifest, weights, left.kv.clone()) is not first
    assert shared.bind(replace(left.manifest, digest="f" * 64), weights, left.kv) is not first
    assert shared.bind(left.manifest, weights.view(-1), left.kv) is first
    shared.forget()
    assert shared.bind(left.manifest, weights, left.kv) is not first


def test_no_more_models_stay_bound_than_are_worth_their_memory(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    left, shared = runner_for(Checkpoint.open(checkpoint_of("qwen3")), "float32"), ModelRunner()
    digests = [f"{number:064x}" for number in range(MAX_BOUND + 1)]
    bound = [shared.bind(replace(left.manifest, digest=digest), left.weights, left.kv) for digest in digests]
    again = [shared.bind(replace(left.manifest, digest=digest), left.weights, left.kv) for digest in reversed(digests)]
    assert [one is other for one, other in zip(again, reversed(bound), strict=True)] == [True] * MAX_BOUND + [False]


def schedule(data: st.DataObject) -> list[dict[str, int]]:
    """Steps that feed every sequence all of its tokens: any subset in any order, any number of tokens each."""
    left, steps = dict(LENGTHS), []
    while left:
        order = data.draw(st.permutations(sorted(left)))
        names = order[: data.draw(st.integers(1, len(order)))]
        step = {name: data.draw(st.sampled_from([1, 1, 2, 9, 16, 17, 40, 70])) for name in names}
        steps.append({name: min(size, left[name]) for name, size in step.items()})
        left = {name: rest for name in left if (rest := left[name] - steps[-1].get(name, 0))}
    return steps


@pytest.mark.skipif(not few_rows.is_available(), reason="numba, or packed bf16, is not here")
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
def test_compiled_decode_steps_give_the_logits_of_the_operations(
    name: str, checkpoint_of: CheckpointOf, runner_for: RunnerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(checkpoint_of(name))
    compiled = runner_for(checkpoint, "bfloat16")
    monkeypatch.setattr(few_rows, "is_available", lambda: False)
    plain = runner_for(checkpoint, "bfloat16")
    tokens = {key: token_ids(length, length) for key, length in {"a": 40, "b": 7, "c": 20}.items()}
    for runner in (compiled, plain):
        for key, ids in tokens.items():
            runner.step({key: ids[:-4]})
    written: list[int] = []
    for i in range(-4, 0):
        step = {key: ids[i : len(ids) + i + 1] for key, ids in tokens.items()}
        found, expected = compiled.step(step, written.append), plain.step(step)
        for key in tokens:
            torch.testing.assert_close(found[key], expected[key], rtol=0.05, atol=0.05 * float(expected[key].abs().max()))
    assert written == list(range(checkpoint.config.num_layers)) * 4


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("layout", ["onednn", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_logits_ignore_neighbours_order_chunks_and_blocks_to_the_bit(
    dtype: str, layout: str, num_threads: int, pack_all: None, checkpoint_of: CheckpointOf, runner_for: RunnerFor
) -> None:
    torch.set_num_threads(num_threads)
    name = NAMES[num_threads - 1]
    checkpoint = Checkpoint.open(checkpoint_of(name))
    tokens = {key: token_ids(length, length) for key, length in LENGTHS.items()}
    options = {"batch_invariant": True, "layout": layout}
    alone = runner_for(checkpoint, dtype, **options)
    expected = {key: alone.step({key: ids})[key] for key, ids in tokens.items()}

    @settings(max_examples=20 if num_threads == 1 else 5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        runner = runner_for(checkpoint, dtype, seed=data.draw(st.integers(0, 9)), **options)
        done = dict.fromkeys(LENGTHS, 0)
        for step in schedule(data):
            found = runner.step({key: tokens[key][done[key] : done[key] + size] for key, size in step.items()})
            for key, rows in found.items():
                assert torch.equal(rows, expected[key][done[key] : done[key] + step[key]]), (key, done, step)
                done[key] += step[key]

    check()


def test_batch_invariant_decode_replays_as_a_prefill_past_one_split_of_the_keys(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    checkpoint = Checkpoint.open(checkpoint_of("llama"))
    ids = token_ids(500)
    first = runner_for(checkpoint, "bfloat16", batch_invariant=True)
    logits = [first.step({"s": ids})["s"][-1]]
    for _ in range(11):
        logits.append(first.step({"s": [int(logits[-1].argmax())], "other": [1]})["s"][-1])
    replay = runner_for(checkpoint, "bfloat16", batch_invariant=True, seed=1)
    again = replay.step({"s": ids + [int(row.argmax()) for row in logits[:-1]]})["s"]
    assert torch.equal(again[499:], torch.stack(logits))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_long_context_in_several_tiles_is_that_in_one(
    batch_invariant: bool, checkpoint_of: CheckpointOf, runner_for: RunnerFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(checkpoint_of("qwen2-windows"))
    ids, rng = token_ids(200), random.Random(0)
    chunks = [rng.choice([1, 1, 30]) for _ in range(20)]
    found = []
    for tile_bytes in (1 << 21, 3000):
        monkeypatch.setattr("polymux.kernels.attend_plan.TILE_BYTES", tile_bytes)
        runner, start = runner_for(checkpoint, "float32", batch_invariant=batch_invariant), 0
        for size in chunks:
            last = runner.step({"s": ids[start : start + size], "t": [size]})["s"][-1]
            start += size
        found.append(last)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_slice_may_give_its_blocks_as_any_sequence(checkpoint_of: CheckpointOf, runner_for: RunnerFor) -> None:
    runner = runner_for(Checkpoint.open(checkpoint_of("llama")), "float32")
    cut = SequenceSlice(start=0, num_tokens=2, context_len=0, block_ids=range(3, 5))
    assert runner.model.forward(ForwardBatch(token_ids=torch.tensor([1, 2]), slices=(cut,), logits_rows=None)).shape == (1, 515)
