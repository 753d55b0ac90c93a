"""Workers of several ranks on GPUs, whole: prompts computed by one instance, moved to another of any degree, swapped, and said as by one.

On the stand-in of CUDA and NCCL: every rank is a process, rank 0 maps the others' memory by its handle, sums are on streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import stand_in
from instances import answers, ending, kill, lost, pids
from rank_gpus import PROGRAM, RankGpu
from swaps import tight_bytes
from worker_pair import GREEDY, NAMES, Pair, counter, prompt_of, running_pair

from polymux.actors import worker
from polymux.actors.parallel.leader import Ranks
from polymux.kernels import choice
from polymux.transport.kv import KVSettings
from polymux.transport.units import MIB

GREEDY_LONG = replace(GREEDY, max_tokens=80)

pytestmark = pytest.mark.skipif(stand_in.compiler() is None, reason="no C compiler for the GPU's stand-in")


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every worker of this process, and of its ranks, computes on one."""
    stand_in.turn(**stand_in.RESTED)
    monkeypatch.setattr(worker, "open_device", lambda _name: RankGpu())
    monkeypatch.setattr(worker, "Ranks", partial(Ranks, program=PROGRAM))
    with choice.override("all=torch"):
        yield
    assert stand_in.count("maps") == 0


def on_gpus(backend: str = "auto", **settings: Any) -> AbstractAsyncContextManager[Pair]:
    return running_pair(layout="plain", kv=KVSettings(backend=backend, checksum_every=1), **settings)


@asynccontextmanager
async def between(backend: str, ranks: tuple[int, int]) -> AsyncIterator[Pair]:
    async with on_gpus(backend, ranks=ranks) as pair:
        yield pair
        assert {edge.backend for edge in pair.decode.report().edges} == {backend}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    """What one rank says, kept from the first test that asks."""
    return {}


@pytest.mark.parametrize(("ranks", "backend"), [((2, 1), "cuda_ipc"), ((1, 2), "nccl"), ((4, 2), "local")], ids=str)
async def test_instances_of_any_degree_say_what_one_rank_says(ranks: tuple[int, int], backend: str, one_rank: dict[str, Any]) -> None:
    if not one_rank:
        async with on_gpus() as pair:
            one_rank["tokens"] = await answers(pair)
    async with between(backend, ranks) as pair:
        assert await answers(pair) == one_rank["tokens"]


async def test_sequences_are_swapped_out_of_every_rank_and_back() -> None:
    async with on_gpus(ranks=(1, 2), batch_invariant=True) as roomy:
        asks = [(spec, prompt_of(spec, 40, i), GREEDY_LONG) for i, spec in enumerate([*roomy.specs.values()] * 3)]
        expected = await asyncio.gather(*(roomy.generate(*ask) for ask in asks))
        kv_bytes = tight_bytes(roomy, 2)
    async with on_gpus(ranks=(1, 2), batch_invariant=True, decode_kv_bytes=kv_bytes, host_kv_bytes=8 * MIB) as tight:
        assert await asyncio.gather(*(tight.generate(*ask) for ask in asks)) == expected
        assert counter(tight.decode, "swap_ins") > 0


async def test_a_rank_that_dies_ends_its_instance_and_leaves_the_other_s_blocks_whole() -> None:
    async with on_gpus(ranks=(2, 2), rank_timeout_s=2.0) as pair:
        spec = pair.specs[NAMES[0]]
        before = await pair.generate(spec, prompt_of(spec, 60))
        assert len(before) == GREEDY.max_tokens
        sequence_id = await pair.send(spec, prompt_of(spec, 170), GREEDY)
        kill(pids(pair.prefill)[0])
        last = await ending(pair, sequence_id)
        assert last.finish_reason is not None or last.error is not None
        await lost(pair.prefill, 5.0)
        here = (pair.decode, pair.decode)
        tokens, last = await pair.collect(await pair.send(spec, prompt_of(spec, 60), GREEDY, roles=here))
        assert (tokens, last.error) == (before, None)
