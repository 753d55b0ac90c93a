"""The commands that a newcomer types, as processes: `polymux serve` until a signal, and the whole of `polymux demo`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import harness

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BIN = Path(sys.executable).parent
START_S = 180.0
MAX_TOKENS = 400


def environ(folder: Path) -> dict[str, str]:
    """No cluster to join, and a home and temporary files of the test's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POLYMUX_"))}
    return kept | {"TMPDIR": str(folder), "HOME": str(folder), "COLUMNS": "200"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Near the root: Ray's sockets lie below it."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="pmx-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    log: Path
    url: str


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    log = folder / "serve.log"
    command = [str(BIN / "polymux"), "serve", "--port", "0", "--dtype", "float32", "--set", "name=polymux-cli"]
    for model in harness.MODELS[:2]:
        command += ["--model", f"{model}={harness.DEMO / 'models' / model}"]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environ(folder), stdout=out, stderr=out)
    try:
        yield Server(process, log, ready_url(process, log))
    finally:
        process.kill()
        process.wait(30)


def ready_url(process: subprocess.Popen[bytes], log: Path) -> str:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        ready = [line for line in log.read_text().splitlines() if "serve.ready" in line]
        if ready:
            return next(word for word in ready[0].split() if word.startswith("url=")).removeprefix("url=")
        time.sleep(0.2)
    raise AssertionError(f"not ready; exit code {process.poll()}\n{log.read_text()}")


def polymux(folder: Path, *arguments: str, url: str, timeout_s: float = 60.0) -> str:
    command = [str(BIN / "polymux"), *arguments, "--base-url", url]
    done = subprocess.run(command, env=environ(folder), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serve_answers_the_other_commands_and_drains_at_a_signal(folder: Path, server: Server) -> None:
    assert all(model in polymux(folder, "models", url=server.url) for model in harness.MODELS[:2])
    question = harness.QUESTIONS[0]
    said = polymux(folder, "chat", question, "-m", "llama-small", "--temperature", "0", "--max-tokens", "24", url=server.url)
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
    command = [str(BIN / "polymux"), "demo", "--requests", "24", "--seconds", "4", "--check", "--json", str(summary)]
    done = subprocess.run(command, env=environ(folder), capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(summary.read_text())
    assert figures["transformers"] == {"identical": 24, "different": 0}
    assert figures["switches"] >= 10 and figures["transfers_committed"] >= 24
    assert (figures["num_failed"], figures["transfers_failed"], figures["blocks_out"], figures["faults"]) == (0, 0, 0, [])
    assert all(model in done.stdout for model in harness.MODELS) and "SLO attainment" in done.stdout
    assert done.stderr == ""
