"""A rank other than the first, on a GPU that it may share with the first one: each of them then says that it is another host."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    if "NCCL_HOSTID" in os.environ:
        os.environ["NCCL_HOSTID"] = f"polymux-rank-{os.getpid()}"
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    from gpu.hash_stand_in import install

    install()
    from polymux.actors.parallel import follower

    follower.main()


if __name__ == "__main__":
    main()
