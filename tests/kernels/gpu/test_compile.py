"""Attention compiles for the chips that it is meant for, within their shared memory and without spilling to slow memory. No GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.timeout(300)  # compilers on shared machines

HOPPER, ADA = 90, 89
SHARED_BYTES = {HOPPER: 227 << 10, ADA: 99 << 10}


def compile_all(arch: int, cases: list[tuple[int, str, int, str, bool]]) -> list[dict[str, int]]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compiled.py"), str(arch), str(SHARED_BYTES[arch])],
        input=json.dumps(cases),
        env=environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, int]] = json.loads(done.stdout)
    return found


def test_attention_fits_hopper_without_spilling() -> None:
    decode, prefill = compile_all(HOPPER, [(128, "bf16", 4, "decode", False), (128, "bf16", 7, "prefill", False)])
    assert max(decode["shared_bytes"], prefill["shared_bytes"]) <= SHARED_BYTES[HOPPER]
    assert not decode["stack_bytes"] and not prefill["stack_bytes"]
    # Three thread blocks of decode run on a multiprocessor at a time.
    assert 3 * (decode["shared_bytes"] + 1024) <= 228 << 10 and 3 * 128 * decode["registers"] <= 65536


def test_prefill_fits_a_chip_of_less_shared_memory() -> None:
    (found,) = compile_all(ADA, [(128, "fp16", 4, "prefill", True)])
    assert found["shared_bytes"] <= SHARED_BYTES[ADA]
