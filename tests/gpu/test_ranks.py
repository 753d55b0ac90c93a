"""An instance of two ranks on real GPUs: the tokens of one rank, in graphs that hold its sums; and the end of a rank that was killed.

On a machine with one GPU both ranks are on it and sum over loopback sockets, which is for tests only.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpu.edges import SOCKETS
from polymux.actors.engine import Engine
from polymux.actors.gpu.device import CudaDevice
from polymux.actors.gpu.graphs import CudaGraphs
from polymux.transport.errors import RankLost

from ..actors.planned_batches import KINDS, NAMES, Batch, tokens_of
from ..actors.rank_engines import RankStore, rank_engine

pytestmark = pytest.mark.gpu
PROGRAM = (str(Path(__file__).with_name("rank.py")),)


@pytest.fixture(scope="module", autouse=True)
def a_gpu_of_each_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() < 2:
            torch.cuda.init()
            assert torch.cuda.device_count() == 1  # torch keeps it, so from here on the variable is for the other rank
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            for name, value in (SOCKETS | {"CUDA_VISIBLE_DEVICES": f"{first},{first}", "NCCL_HOSTID": "polymux-rank-0"}).items():
                patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def store() -> Iterator[RankStore]:
    made = RankStore((1, 2))
    yield made
    made.server.close()


def instance(store: RankStore, num_ranks: int, graphs: CudaGraphs, timeout_s: float = 60.0) -> AbstractContextManager[Engine]:
    return rank_engine(store, num_ranks, CudaDevice(graphs=graphs), PROGRAM, timeout_s=timeout_s, device="cuda")


def answers(engine: Engine, num_steps: int = 6) -> list[list[list[int]]]:
    params = [replace(KINDS[kind], seed=i) for i, kind in enumerate(("greedy", "sampled"))]
    return [tokens_of(Batch(engine, engine.specs[name], params, runs_ahead=True).run(num_steps)) for name in NAMES]


def test_two_ranks_say_what_one_says(store: RankStore) -> None:
    with instance(store, 1, CudaGraphs()) as engine:
        alone = answers(engine)
    graphs = CudaGraphs()
    with instance(store, 2, graphs) as engine:
        assert answers(engine) == alone
        assert graphs.num_captured == 2 and graphs.num_replayed >= 6, "the sums are in the graphs"


def test_a_rank_that_is_killed_is_a_typed_error_and_the_device_is_let_go(store: RankStore) -> None:
    with instance(store, 2, CudaGraphs(), timeout_s=10.0) as engine:
        batch = Batch(engine, engine.specs[NAMES[0]], [KINDS["greedy"]], runs_ahead=True)
        for _ in range(4):
            batch.step()
        assert engine._ranks is not None
        os.kill(engine._ranks.pids[0], signal.SIGKILL)
        began_s = time.monotonic()
        with pytest.raises(RankLost):
            while True:
                batch.step()
        assert time.monotonic() - began_s < 15.0
        torch.cuda.synchronize()
