"""A rank of an instance that only has memory, in a process of its own: it says by which handle others map it, and ends with its input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import NAMESPACE, bury

SCRIPT = Path(__file__)


class RankMemory:
    def __init__(self, nbytes: int, device: str) -> None:
        env = os.environ | {"PYTHONPATH": str(NAMESPACE), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), str(nbytes), device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)

    @property
    def handle(self) -> str:
        assert self.process.stdout is not None
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
            bury(memory.process)


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


if __name__ == "__main__":
    main()
