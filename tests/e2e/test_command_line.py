"""The commands that a newcomer types, as processes: `polymux serve` until a signal, and the whole of `polymux demo`."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import commands
import httpx
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
    with serving(folder, "--dtype", "float32", "--set", "name=polymux-cli", *SMALL) as server:
        yield server


def test_serve_answers_the_other_commands_and_drains_at_a_signal(folder: Path, server: Server) -> None:
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
