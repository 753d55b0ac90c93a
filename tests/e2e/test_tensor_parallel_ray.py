"""Ranks on a real Ray: one prefill worker of one process, one decode worker of two, the very command line's configuration."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

import harness
from polymux.cluster.bootstrap import find_controller, start_local_ray
from polymux.cluster.config import ClusterConfig
from polymux.deploy.app import DEMO_CONFIG, start_serving, stop_serving

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

MAX_TOKENS = 24
ONE_AND_TWO = ("name=polymux-ranks", "serve.port=18126", "pools.decode.workers=1", "pools.decode.tensor_parallel=2")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    config = ClusterConfig.load(DEMO_CONFIG, overrides=list(ONE_AND_TWO))
    with tempfile.TemporaryDirectory(prefix="pmx-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start_local_ray(config.pools.num_ranks, folder)
        try:
            base = start_serving(config)
            yield base
            followers = psutil.Process(worker_of(base, "decode")["pid"]).children()
            stop_serving(config)
            assert find_controller(config) is None, "the controller outlived its cluster"
            assert len(followers) == 1 and not psutil.wait_procs(followers, timeout=10)[1], "a rank outlived its worker"
        finally:
            ray.shutdown()


def worker_of(url: str, role: str) -> dict[str, Any]:
    (worker,) = [worker for worker in asyncio.run(harness.topology(url))["workers"] if worker["role"] == role]
    return dict(worker)


def test_a_worker_of_two_ranks_gives_the_tokens_of_transformers_and_says_how_kv_comes_to_it(url: str) -> None:
    answers = asyncio.run(harness.mixed_load(url, 16, MAX_TOKENS))
    assert harness.wrong_answers(answers, MAX_TOKENS) == []
    until_s = time.monotonic() + 10.0
    while not (decode := worker_of(url, "decode"))["edges"] and time.monotonic() < until_s:
        time.sleep(0.2)  # it says so in its next report
    prefill = worker_of(url, "prefill")
    assert (prefill["num_ranks"], decode["num_ranks"]) == (1, 2)
    assert [edge["peer"] for edge in decode["edges"]] == [prefill["worker_id"]]
    assert decode["edges"][0]["backend"] in ("shm", "tcp") and decode["edges"][0]["reason"]
