"""Scripted peers in processes of their own (`kv_peer.py`), to be killed and frozen."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from polymux.transport.messages import Peer
from polymux.transport.units import Epoch, WorkerId

SCRIPT = Path(__file__).with_name("kv_peer.py")
NAMESPACE = Path(__file__).parents[2] / ".namespace"


def spawn() -> subprocess.Popen[bytes]:
    """A peer that waits for its configuration."""
    env = os.environ | {"PYTHONPATH": str(NAMESPACE), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


def bury(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


class Child:
    """A peer in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], config: dict[str, Any]) -> None:
        self.process = process
        self.say(config)
        self.hello = self.hear()

    def say(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, within_s: float = 60.0) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], within_s)
        assert ready, "the child said nothing"
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        self.say(question)
        return self.hear()

    def until(self, key: str, value: Any, within_s: float = 8.0) -> dict[str, Any]:
        until_s = time.monotonic() + within_s
        while (report := self.ask())[key] != value and time.monotonic() < until_s:
            time.sleep(0.02)
        return report

    def is_frozen(self) -> bool:
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state == "T"

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def address_of(peer: Child) -> Peer:
    hello = peer.hello
    return Peer(worker_id=WorkerId("prefill-0"), epoch=Epoch(hello["epoch"]), address=hello["address"], host_id=hello["host_id"])


def until(claim: Any, within_s: float = 8.0) -> bool:
    until_s = time.monotonic() + within_s
    while not claim() and time.monotonic() < until_s:
        time.sleep(0.005)
    return bool(claim())
