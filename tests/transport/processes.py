"""Scripted peers in processes of their own (`kv_peer.py`), to be killed and frozen."""

from __future__ import annotations

import json
import select
import signal
import time
from pathlib import Path
from typing import Any

from nursery import Forked

from polymux.transport.messages import Peer
from polymux.transport.units import Epoch, WorkerId


class Child:
    """A peer in a process of its own."""

    def __init__(self, process: Forked, config: dict[str, Any]) -> None:
        self.process = process
        self.say(config)
        self.hello = self.hear()

    def say(self, line: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, within_s: float = 60.0) -> dict[str, Any]:
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
