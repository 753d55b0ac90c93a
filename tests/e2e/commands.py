"""polymux's commands as a newcomer types them: processes with a home and temporary files of their own, and no cluster to join."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
START_S = 180.0


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    log: Path
    url: str


@contextmanager
def home() -> Iterator[Path]:
    """Near the root: Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="pmx-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def environ(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POLYMUX_"))}
    return kept | {"TMPDIR": str(folder), "HOME": str(folder), "COLUMNS": "200"}


def polymux(folder: Path, *arguments: str, extra: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
    """What a command that must end well prints."""
    command, variables = [str(BIN / "polymux"), *arguments], environ(folder) | dict(extra or {})
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(folder: Path, *arguments: str, extra: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`polymux serve` on a free port, once it is ready; killed at the end if it still runs."""
    log, command = folder / "serve.log", [str(BIN / "polymux"), "serve", "--port", "0", *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environ(folder) | dict(extra or {}), stdout=out, stderr=out)
    try:
        yield Server(process, log, _ready_url(process, log))
    finally:
        process.kill()
        process.wait(30)


def _ready_url(process: subprocess.Popen[bytes], log: Path) -> str:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        ready = [line for line in log.read_text().splitlines() if "serve.ready" in line]
        if ready:
            return next(word for word in ready[0].split() if word.startswith("url=")).removeprefix("url=")
        time.sleep(0.2)
    raise AssertionError(f"not ready; exit code {process.poll()}\n{log.read_text()}")
