"""Instances whose ranks plan their steps and sum over NCCL, each rank a process: the tokens of one rank, and the end of a lost one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import rank_gpus
import stand_in
import torch
from backends import eventually
from instances import is_running
from planned_batches import KINDS, NAMES, Batch, tokens_of
from rank_gpus import PROGRAM, RankGpu

from polymux.actors.engine import Engine
from polymux.actors.kv_blocks import kv_view
from polymux.actors.model_runner import ForwardBatch, SequenceSlice
from polymux.kernels import choice
from polymux.transport.errors import RankLost
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName

from .rank_engines import RankStore, rank_engine

pytestmark = pytest.mark.skipif(stand_in.compiler() is None, reason="no C compiler for the GPU's stand-in")


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    with choice.override("all=torch"):
        yield


@pytest.fixture(scope="module")
def store() -> Iterator[RankStore]:
    made = RankStore((1, 2, 4))
    yield made
    made.server.close()


def instance(
    store: RankStore, num_ranks: int, *, device: RankGpu | None = None, timeout_s: float = 20.0, **engine: Any
) -> AbstractContextManager[Engine]:
    """An engine of so many ranks; of one, a plain CPU's."""
    return rank_engine(store, num_ranks, device or RankGpu(), PROGRAM, timeout_s=timeout_s, **engine)


def answers(engine: Engine, name: ModelName, kind: str, num_steps: int = 8, num_seqs: int = 3) -> list[list[int]]:
    params = [replace(KINDS[kind], seed=i) for i in range(num_seqs)]
    spec: ModelSpec = engine.specs[name]
    return tokens_of(Batch(engine, spec, params, runs_ahead=kind != "penalized").run(num_steps))


@pytest.fixture(scope="module")
def alone(store: RankStore) -> dict[tuple[ModelName, str], list[list[int]]]:
    """What one rank says."""
    with choice.override("all=torch"), instance(store, 1) as engine:
        return {(name, kind): answers(engine, name, kind) for name in NAMES for kind in ("greedy", "sampled", "penalized")}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_say_what_one_says_with_steps_that_run_ahead(num_ranks: int, store: RankStore, alone: dict[Any, Any]) -> None:
    device, comms = RankGpu(), stand_in.count("comms")
    with instance(store, num_ranks, device=device) as engine:
        found = {(name, kind): answers(engine, name, kind) for name in NAMES for kind in ("greedy", "sampled", "penalized")}
    assert found == alone
    assert device.graphs.num_replayed > 20
    assert eventually(lambda: stand_in.count("comms") == comms)


@pytest.mark.parametrize("num_ranks", [4])
def test_tokens_are_the_same_when_blocks_went_to_the_host_and_to_other_blocks_in_the_middle(
    num_ranks: int, store: RankStore, alone: dict[Any, Any]
) -> None:
    """By rank 0 alone, in memory that it has mapped; four ranks hold each head twice."""
    name = NAMES[0]
    with instance(store, num_ranks) as engine:
        spec, pool = engine.specs[name], engine.pool(name)
        whole = replace(spec.kv, num_ranks=1)
        host = kv_view(torch.zeros(32 * whole.block_bytes, dtype=torch.uint8), whole)
        batch = Batch(engine, spec, [replace(KINDS["greedy"], seed=i) for i in range(3)], runs_ahead=True)
        for turn in range(8):
            batch.step()
            if turn not in (2, 5):
                continue
            batch.settle()
            away = [block_id for blocks in batch.blocks for block_id in blocks]
            list(engine.device.copy_blocks(pool.kv, away, host, range(len(away))))
            other = pool.allocate(len(away))
            scribbled = [kv_view(memory, spec.kv) for memory in (engine.arena.memory, *engine._ranks.memories)]
            for kv in scribbled:
                kv[away] = torch.nan
            pool.free(away)
            list(engine.device.copy_blocks(host, range(len(away)), pool.kv, other))
            batch.blocks = [other[i : i + len(blocks)] for i, blocks in zip(range(0, len(away), 6), batch.blocks, strict=True)]
            copied = pool.allocate(1)  # and one of them once more, within every rank
            engine.copy_kv(name, [other[0]], copied, range(spec.kv.num_layers))
            batch.blocks[0][0] = copied[0]
            pool.free(other[:1])
            del scribbled, kv
        batch.settle()
        assert tokens_of(batch.outputs) == alone[name, "greedy"]
    assert stand_in.count("maps") == 0  # the others' memory was let go before they ended


def test_replayed_steps_of_every_rank_read_the_inputs_of_their_own_step(store: RankStore, alone: dict[Any, Any], monkeypatch: Any) -> None:
    kernels = "all=torch,attend=triton"
    monkeypatch.setenv(rank_gpus.KERNELS, kernels)
    device = RankGpu(captures=True)
    with choice.override(kernels), instance(store, 2, device=device) as engine:
        found = answers(engine, NAMES[1], "greedy", num_steps=5, num_seqs=2)
    assert found == [tokens[:6] for tokens in alone[NAMES[1], "greedy"][:2]]
    assert device.graphs.num_replayed == 3


def test_under_batch_invariant_four_ranks_give_a_sequence_the_same_bits_alone_and_in_company(store: RankStore) -> None:
    spec = store.specs[NAMES[1]].on_ranks(4)

    def logits(engine: Engine, *prompts: range) -> torch.Tensor:
        """Of the last prompt's last token."""
        engine.activate(spec.model)
        blocks = [engine.pool(spec.model).allocate(3) for _ in prompts]
        starts = [sum(map(len, prompts[:i])) for i in range(len(prompts))]
        slices = tuple(
            SequenceSlice(start=start, num_tokens=len(prompt), context_len=0, block_ids=ids)
            for start, prompt, ids in zip(starts, prompts, blocks, strict=True)
        )
        found = engine.forward(ForwardBatch(token_ids=torch.tensor([*chain(*prompts)]), slices=slices, logits_rows=None))
        for ids in blocks:
            engine.pool(spec.model).free(ids)
        return found[-1]

    with instance(store, 4, batch_invariant=True) as engine:
        alone = logits(engine, range(30, 50))
        assert torch.equal(logits(engine, range(100, 113), range(9, 18), range(30, 50)), alone)


def pids(engine: Engine) -> tuple[int, ...]:
    assert engine._ranks is not None
    return engine._ranks.pids


@pytest.mark.parametrize(("rank", "strike", "timeout_s", "within_s"), [(1, signal.SIGSTOP, 1.5, 6.0), (3, signal.SIGKILL, 20.0, 5.0)])
def test_a_rank_lost_between_steps_that_run_ahead_is_a_typed_error_and_leaves_nothing(
    strike: signal.Signals, timeout_s: float, within_s: float, rank: int, store: RankStore
) -> None:
    """A death is seen long before the deadline, which only one that hangs needs."""
    stand_in.turn(peer_hangs=1)  # as over NVLink
    threads, comms = own_threads(), stand_in.count("comms")
    with instance(store, 4, timeout_s=timeout_s) as engine:
        batch = Batch(engine, engine.specs[NAMES[0]], [replace(KINDS["greedy"])] * 2, runs_ahead=True)
        batch.step()
        batch.step()
        processes = pids(engine)
        os.kill(processes[rank - 1], strike)
        began_s = time.monotonic()
        with pytest.raises(RankLost, match="worker w lost a rank"):
            while True:
                batch.step()
        assert time.monotonic() - began_s < within_s and engine.lost is not None
        with pytest.raises(RankLost):
            batch.settle()
        with pytest.raises(RankLost):
            batch.step()
        assert eventually(lambda: not any(map(is_running, processes)))
    stand_in.turn(**stand_in.RESTED)
    assert eventually(lambda: stand_in.count("comms") == comms)
    assert eventually(lambda: len(own_threads()) <= len(threads)), own_threads()


def own_threads() -> list[str]:
    """But for those that fetch images, which stay once there are some."""
    return [thread.name for thread in threading.enumerate() if not thread.name.startswith("polymux-images")]
