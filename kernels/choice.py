"""Which implementation serves each operation on each kind of device, and why: decided here, once a process.

`POLYMUX_KERNELS=rms_norm=torch,attend_prefill=torch` overrides it, for one operation or for `all`; `polymux doctor` shows what was chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

VARIABLE = "POLYMUX_KERNELS"
ALL = "all"


# By operation, where each implementation is: module of this package and function. The first that can run on a GPU is chosen there.
OPERATIONS: dict[str, dict[str, str]] = {
    "rms_norm": {"triton": "gpu.rms_norm:rms_norm", "torch": "reference:rms_norm"},
    "add_rms_norm": {"triton": "gpu.rms_norm:add_rms_norm", "torch": "reference:add_rms_norm"},
    "rotate_write": {"triton": "gpu.rotate_write:rotate_write", "torch": "reference:rotate_write"},
    "attend": {"triton": "gpu.attend:attend", "torch": "reference:attend_step"},
    "silu_mul": {"triton": "gpu.silu_mul:silu_mul", "torch": "reference:silu_mul"},
    "gather_blocks": {"triton": "gpu.blocks:gather_blocks", "torch": "reference:gather_blocks"},
    "scatter_blocks": {"triton": "gpu.blocks:scatter_blocks", "torch": "reference:scatter_blocks"},
    "pick": {"triton": "gpu.pick:pick", "torch": "row_sampling:pick"},
    "weight_sums": {"triton": "gpu.pick:weight_sums", "torch": "row_sampling:weight_sums"},
    "edit_": {"triton": "gpu.edit_logits:edit_", "torch": "row_sampling:edit_"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    operation: str
    implementation: str
    reason: str


_overrides: dict[str, str] | None = None  # what the variable says, once read
on_cpu = False  # kernels run on CPU tensors too, in Triton's interpreter: see `override`


def choose(operation: str, device: torch.device) -> Choice:
    """The implementation for a device. Raises ValueError when the variable names an operation or an implementation that is not there."""
    wanted = _wanted(operation)
    if wanted is not None:
        return Choice(operation=operation, implementation=wanted, reason=f"{VARIABLE} says so")
    if device.type != "cuda":
        return Choice(operation=operation, implementation="torch", reason="no GPU")
    if find_spec("triton") is None:
        return Choice(operation=operation, implementation="torch", reason="triton is not installed")
    return Choice(operation=operation, implementation="triton", reason="the fastest here")


@cache
def implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that `choose` names."""
    module, name = OPERATIONS[operation][choose(operation, device).implementation].split(":")
    function: Callable[..., Any] = getattr(import_module(f"polymux.kernels.{module}"), name)
    return function


def choices(device: torch.device) -> list[Choice]:
    return [choose(operation, device) for operation in OPERATIONS]


@contextmanager
def override(text: str) -> Iterator[None]:
    """Choose as if the variable had this value, in this block, and for CPU tensors too: tests run the kernels by Triton's interpreter."""
    global _overrides, on_cpu
    before = _overrides, on_cpu
    _overrides, on_cpu = parse(text), True
    implementation.cache_clear()
    try:
        yield
    finally:
        _overrides, on_cpu = before
        implementation.cache_clear()


def parse(text: str) -> dict[str, str]:
    """`op=impl,op=impl`. Raises ValueError that names what is wrong."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        operation, _, wanted = part.partition("=")
        if operation != ALL and operation not in OPERATIONS:
            raise ValueError(f"{VARIABLE} names the operation {operation!r}; there are {ALL}, {', '.join(OPERATIONS)}")
        there = OPERATIONS[operation] if operation != ALL else {"triton", "torch"}
        if wanted not in there:
            raise ValueError(f"{VARIABLE} wants {part!r}; there are {', '.join(sorted(there))}")
        found[operation] = wanted
    return found


def _wanted(operation: str) -> str | None:
    global _overrides
    if _overrides is None:
        _overrides = parse(os.environ.get(VARIABLE, ""))
    return _overrides.get(operation, _overrides.get(ALL))
