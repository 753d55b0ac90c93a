"""What tests of instances of several ranks ask, and how they strike a rank and see that it is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from worker_pair import GREEDY, NAMES, Pair, prompt_of

from polymux.actors.worker import Worker
from polymux.transport.errors import WorkerLost
from polymux.transport.messages import SequenceUpdate

LENGTHS = (5, 40, 93)
LONG = replace(GREEDY, max_tokens=90)


async def answers(pair: Pair) -> list[list[int]]:
    """Greedy tokens of both models, the prompts of each together."""
    found = []
    for name in NAMES:
        spec = pair.specs[name]
        found += await asyncio.gather(*(pair.generate(spec, prompt_of(spec, length, i)) for i, length in enumerate(LENGTHS)))
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


async def ending(pair: Pair, sequence_id: str) -> SequenceUpdate:
    """The update that ends a sequence."""
    async with asyncio.timeout(30):
        while True:
            update = await pair._received[sequence_id].get()
            if update.error or update.finish_reason:
                return update


async def lost(worker: Worker, within_s: float) -> float:
    """The seconds until its report says so."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < within_s:
        try:
            worker.report()
        except WorkerLost:
            return time.monotonic() - began_s
        await asyncio.sleep(0.02)
    raise AssertionError("the instance did not notice")


def pids(worker: Worker) -> tuple[int, ...]:
    assert worker._ranks is not None
    return worker._ranks.pids


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
