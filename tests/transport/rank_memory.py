"""A rank of an instance that only has memory, in a process of its own: it says by which handle others map it, and ends with its input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nursery import nursery


class RankMemory:
    def __init__(self, nbytes: int, device: str) -> None:
        self.process = nursery().fork("rank_memory", str(nbytes), device)

    @property
    def handle(self) -> str:
        handle: str = json.loads(self.process.stdout.readline())
        return handle


@contextmanager
def rank_memories(nbytes: int, count: int, device: str) -> Iterator[list[RankMemory]]:
    """They start together; whoever asks for a handle waits for it."""
    memories = [RankMemory(nbytes, device) for _ in range(count)]
    try:
        yield memories
    finally:
        for memory in memories:
            memory.process.bury()


def main() -> None:
    nbytes, device = int(sys.argv[1]), sys.argv[2]
    if device == "cuda":
        from polymux.transport.cuda.region import DeviceRegion

        region = DeviceRegion.create(nbytes)
    else:
        import stand_in

        region = stand_in.region(nbytes)
    os.write(1, json.dumps(region.handles()[0].hex()).encode() + b"\n")
    sys.stdin.read()
    region.close()
