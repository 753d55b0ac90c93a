"""What the compiler makes of the operations' kernels for a Hopper: no product fused into a sum where bits count, wide loads and stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(300)  # compilers on shared machines

HOPPER = "90"
EXACT = {"_sum", "_collect", "_narrow", "_finish", "_edit"}
MOVERS = {"_rms_norm", "_silu_mul", "_rotate_write", "_copy_blocks"}


@cache
def compiled() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compiled_ops.py")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, script, HOPPER], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts: list[dict[str, Any]] = json.loads(done.stdout)
    return facts


def test_what_must_be_exact_is_rounded_step_by_step() -> None:
    assert {one["kernel"] for one in compiled()} >= EXACT
    assert not EXACT & {one["kernel"] for one in compiled() if one["fma"]}


def test_what_moves_memory_moves_16_bytes_at_a_time() -> None:
    found = [one for one in compiled() if one["kernel"] in MOVERS]
    assert {one["kernel"] for one in found} == MOVERS
    assert all(one["wide_loads"] and one["wide_stores"] for one in found)
