"""`polymux serve` and `polymux doctor` on a host with GPUs: the commands as they are, the hardware as `gpu_host/sitecustomize.py` stands in
for it. Two pairs of GPUs, each joined by a bridge."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import psutil
import pytest
import stand_in
from commands import Server

import harness
from polymux.deploy.app import DEMO_CONFIG
from polymux.transport.nccl.api import LIBRARY_VARIABLE

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(stand_in.compiler() is None, reason="no C compiler for the stand-in of CUDA and NCCL"),
]
TESTS = Path(__file__).parent.parent
PLACES = ("e2e/gpu_host", "cluster/fake_nvml", "actors", "transport")
ONE_AND_TWO = ("name=polymux-gpus", "pools.decode.workers=1", "pools.decode.tensor_parallel=2")
ARGUMENTS = ("--config", str(DEMO_CONFIG), *(word for one in ONE_AND_TWO for word in ("--set", one)))
MAX_TOKENS = 24


@pytest.fixture
def folder() -> Iterator[Path]:
    with commands.home() as path:
        yield path


@pytest.fixture
def gpus() -> dict[str, str]:
    """The environment of a host with four."""
    folders = [*(str(TESTS / place) for place in PLACES), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "POLYMUX_NVML_RECORDING": "bridged-4",
        "RAY_OVERRIDE_RESOURCES": '{"GPU": 4}',
        "GPU_HOST_SEES": "0,1,2,3",
        LIBRARY_VARIABLE: stand_in.library(),
    }


def test_the_doctor_says_what_it_would_choose_and_why(folder: Path, gpus: dict[str, str]) -> None:
    said = " ".join(commands.polymux(folder, "doctor", *ARGUMENTS, extra=gpus).split())
    assert "4 x NVIDIA A100 80GB PCIe, 86 GB each, NVLink joins 0-2 and 1-3" in said
    assert "prefill on cuda, 1 GPU a worker (4 usable GPUs)" in said
    assert "decode on cuda, 2 GPUs a worker (2 GPUs of one host for the ranks of each worker)" in said
    assert "local, cuda_ipc, nccl: the first that joins two workers" in said


def test_serve_computes_on_the_gpus_and_outlives_one_of_its_ranks(folder: Path, gpus: dict[str, str]) -> None:
    with commands.serving(folder, *ARGUMENTS, extra=gpus) as server:
        assert_right(server)
        seen = asyncio.run(harness.topology(server.url))
        prefill, decode = (seen["devices"]["workers"][worker_id] for worker_id in ("prefill-0", "decode-0"))
        assert {pool["device"] for pool in seen["devices"]["pools"].values()} == {"cuda"}
        assert (prefill["joined_by"], decode["joined_by"]) == (None, "nvlink")
        assert len({*prefill["gpus"], *decode["gpus"]}) == 3

        (rank,) = psutil.Process(decode_worker(seen)["pid"]).children()
        assert rank.environ()["CUDA_VISIBLE_DEVICES"] == str(decode["gpus"][1])
        rank.kill()
        again = wait_restarted(server.url, decode_worker(seen)["epoch"])
        assert_right(server)
        assert again["devices"] == seen["devices"]

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    log = server.log.read_text()
    assert "devices.chosen prefill on cuda, 1 GPU a worker" in log and "Traceback" not in log
    assert "kv.edge worker=decode-0 peer=prefill-0 backend=cuda_ipc" in log


def assert_right(server: Server) -> None:
    """Transformers' tokens, and all KV given back."""
    assert harness.wrong_answers(asyncio.run(harness.mixed_load(server.url, 16, MAX_TOKENS)), MAX_TOKENS) == []
    assert asyncio.run(harness.wait_counted(server.url, "kv_transfers_committed", 16))["kv_transfers_failed"] == 0


def wait_restarted(url: str, epoch: int, deadline_s: float = 60.0) -> dict[str, Any]:
    """The topology once the decode worker is another than that of this epoch."""
    until_s = time.monotonic() + deadline_s
    while time.monotonic() < until_s:
        seen = asyncio.run(harness.topology(url))
        if any(one["worker_id"] == "decode-0" and one["state"] == "alive" and one["epoch"] > epoch for one in seen["workers"]):
            return seen
        time.sleep(0.2)
    raise AssertionError(f"not restarted within {deadline_s} s")


def decode_worker(seen: dict[str, Any]) -> dict[str, Any]:
    (worker,) = [worker for worker in seen["workers"] if worker["worker_id"] == "decode-0" and worker["state"] != "lost"]
    return dict(worker)
