"""The commands that a newcomer types, as processes: `polymux serve` until a signal, and the whole of `polymux demo`."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import httpx
import psutil
import pytest
from commands import Server, polymux, serving

import harness

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

MAX_TOKENS = 400
SMALL = [word for model in harness.MODELS[:2] for word in ("--model", f"{model}={harness.DEMO / 'models' / model}")]


@pytest.fixture
def folder() -> Iterator[Path]:
    with commands.home() as path:
        yield path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """One prefill worker of one process, one decode worker of two."""
    with serving(folder, "--dtype", "float32", "--set", "name=polymux-cli", "--set", "pools.decode.tensor_parallel=2", *SMALL) as server:
        yield server


def worker_of(url: str, role: str) -> dict[str, Any]:
    (worker,) = [worker for worker in asyncio.run(harness.topology(url))["workers"] if worker["role"] == role]
    return dict(worker)


def test_serve_answers_the_other_commands_and_drains_at_a_signal(folder: Path, server: Server) -> None:
    answers = asyncio.run(harness.mixed_load(server.url, 16, 24, models=harness.MODELS[:2]))
    assert harness.wrong_answers(answers, 24) == []
    until_s = time.monotonic() + 10.0
    while not (decode := worker_of(server.url, "decode"))["edges"] and time.monotonic() < until_s:
        time.sleep(0.2)  # it says so in its next report
    prefill = worker_of(server.url, "prefill")
    assert (prefill["num_ranks"], decode["num_ranks"]) == (1, 2)
    assert [edge["peer"] for edge in decode["edges"]] == [prefill["worker_id"]]
    assert decode["edges"][0]["backend"] in ("shm", "tcp") and decode["edges"][0]["reason"]
    ranks = psutil.Process(decode["pid"]).children()

    at = ("--base-url", server.url)
    assert all(model in polymux(folder, "models", *at) for model in harness.MODELS[:2])
    question = harness.QUESTIONS[0]
    said = polymux(folder, "chat", question, "-m", "llama-small", "--temperature", "0", "--max-tokens", "24", *at)
    assert said == harness.greedy_answer("llama-small", question, 24) + "\n"

    body = {"model": "llama-large", "prompt": "def f(", "max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line and not lines:
                server.process.send_signal(signal.SIGTERM)
            lines += [line] if line else []
    assert lines[-1] == "data: [DONE]", "a stream that was open when the signal came is finished"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0
    assert len(ranks) == 1 and not psutil.wait_procs(ranks, timeout=10)[1], "a rank outlived its worker"
    log = server.log.read_text()
    assert "serve.draining signal=SIGTERM" in log and "serve.stopped" in log and "Traceback" not in log
    assert [path.name for path in folder.iterdir()] == ["serve.log"], "Ray's files are gone with it"


def test_the_demo_ends_well_and_says_what_transformers_says(folder: Path) -> None:
    summary = folder / "summary.json"
    command = [str(commands.BIN / "polymux"), "demo", "--requests", "24", "--seconds", "4", "--check", "--json", str(summary)]
    done = subprocess.run(command, env=commands.environ(folder), capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(summary.read_text())
    assert figures["transformers"] == {"identical": 24, "different": 0}
    assert figures["switches"] >= 10 and figures["transfers_committed"] >= 24
    assert (figures["num_failed"], figures["transfers_failed"], figures["blocks_out"], figures["faults"]) == (0, 0, 0, [])
    assert all(model in done.stdout for model in harness.MODELS) and "SLO attainment" in done.stdout
    assert done.stderr == ""
