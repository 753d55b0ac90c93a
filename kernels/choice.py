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


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`triton` and `torch` are modules of this package with a function of the operation's name."""

    name: str
    triton: str
    torch: str = "reference"


OPERATIONS = {
    one.name: one
    for one in (
        Operation(name="rms_norm", triton="gpu.rms_norm"),
        Operation(name="add_rms_norm", triton="gpu.rms_norm"),
        Operation(name="rotate_write", triton="gpu.rotate_write"),
        Operation(name="silu_mul", triton="gpu.silu_mul"),
        Operation(name="gather_blocks", triton="gpu.blocks"),
        Operation(name="scatter_blocks", triton="gpu.blocks"),
        Operation(name="pick", triton="gpu.pick", torch="row_sampling"),
        Operation(name="weight_sums", triton="gpu.pick", torch="row_sampling"),
        Operation(name="edit_", triton="gpu.edit_logits", torch="row_sampling"),
    )
}
IMPLEMENTATIONS = ("triton", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    operation: str
    implementation: str
    reason: str


_overrides: dict[str, str] | None = None  # what the variable says, once read


def choose(operation: str, device: torch.device) -> Choice:
    """The implementation for a device. Raises ValueError when the variable names an operation or an implementation that is not there."""
    wanted = _wanted(operation)
    if wanted is not None:
        return Choice(operation=operation, implementation=wanted, reason=f"{VARIABLE} says so")
    if device.type != "cuda":
        return Choice(operation=operation, implementation="torch", reason="a CPU has no Triton kernels")
    if find_spec("triton") is None:
        return Choice(operation=operation, implementation="torch", reason="triton is not installed")
    return Choice(operation=operation, implementation="triton", reason="the fastest here")


@cache
def implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that `choose` names."""
    one = OPERATIONS[operation]
    module = one.triton if choose(operation, device).implementation == "triton" else one.torch
    function: Callable[..., Any] = getattr(import_module(f"polymux.kernels.{module}"), operation)
    return function


def choices(device: torch.device) -> list[Choice]:
    return [choose(operation, device) for operation in OPERATIONS]


@contextmanager
def override(text: str) -> Iterator[None]:
    """Choose as if the variable had this value, in this block."""
    global _overrides
    before, _overrides = _overrides, parse(text)
    implementation.cache_clear()
    try:
        yield
    finally:
        _overrides = before
        implementation.cache_clear()


def parse(text: str) -> dict[str, str]:
    """`op=impl,op=impl`. Raises ValueError that names what is wrong."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        operation, _, wanted = part.partition("=")
        if operation != ALL and operation not in OPERATIONS:
            raise ValueError(f"{VARIABLE} names the operation {operation!r}; there are {ALL}, {', '.join(OPERATIONS)}")
        if wanted not in IMPLEMENTATIONS:
            raise ValueError(f"{VARIABLE} wants {part!r}; an implementation is one of {', '.join(IMPLEMENTATIONS)}")
        found[operation] = wanted
    return found


def _wanted(operation: str) -> str | None:
    global _overrides
    if _overrides is None:
        _overrides = parse(os.environ.get(VARIABLE, ""))
    return _overrides.get(operation, _overrides.get(ALL))
