"""Which implementation serves each operation on each kind of device, and why: decided here, once a process.

`POLYMUX_KERNELS=rms_norm=torch,attend=flashinfer` overrides it, for one operation or for `all`; `polymux doctor` shows what was chosen. A
library serves only where it is asked for by name: what is fastest, GPUs' figures say (docs/results), and they are owed.
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

from polymux.kernels.libraries import LIBRARIES, UNSUITED, Unavailable, installed, why_not

VARIABLE = "POLYMUX_KERNELS"
ALL = "all"


# By operation, where each implementation is: module of this package and function.
OPERATIONS: dict[str, dict[str, str]] = {
    "rms_norm": {"triton": "gpu.rms_norm:rms_norm", "torch": "reference:rms_norm"},
    "add_rms_norm": {"triton": "gpu.rms_norm:add_rms_norm", "torch": "reference:add_rms_norm"},
    "rotate_write": {"triton": "gpu.rotate_write:rotate_write", "torch": "reference:rotate_write"},
    "attend": {"triton": "gpu.attend:attend", "torch": "reference:attend_step", "flashinfer": "gpu.flashinfer_attend:attend"},
    "silu_mul": {"triton": "gpu.silu_mul:silu_mul", "torch": "reference:silu_mul"},
    "gather_blocks": {"triton": "gpu.blocks:gather_blocks", "torch": "reference:gather_blocks"},
    "scatter_blocks": {"triton": "gpu.blocks:scatter_blocks", "torch": "reference:scatter_blocks"},
    "pick": {"triton": "gpu.pick:pick", "torch": "row_sampling:pick"},
    "weight_sums": {"triton": "gpu.pick:weight_sums", "torch": "row_sampling:weight_sums"},
    "edit_": {"triton": "gpu.edit_logits:edit_", "torch": "row_sampling:edit_"},
}

# How each implementation of attention prepares a step, before its function runs in each layer.
PREPARATIONS = {
    "triton": "gpu.tiled:TiledAttention",
    "torch": "gpu.plan:PlainAttention",
    "flashinfer": "gpu.flashinfer_attend:FlashInferAttention",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    operation: str
    implementation: str
    reason: str


_overrides: dict[str, str] | None = None  # what the variable says, once read
on_cpu = False  # kernels run on CPU tensors too, in Triton's interpreter: see `override`


def choose(operation: str, device: torch.device) -> Choice:
    """The implementation for a device. Raises ValueError when the variable names an operation or an implementation that is not there,
    Unavailable when it names a library that cannot serve here."""
    wanted = _wanted(operation)
    if wanted is not None:
        why = why_not(wanted) if wanted in LIBRARIES else ""
        if why:
            raise Unavailable(f"{VARIABLE} wants {operation}={wanted}, but {why}; or take {wanted} out of {VARIABLE}")
        return Choice(operation=operation, implementation=wanted, reason=f"{VARIABLE} says so")
    if device.type != "cuda":
        return Choice(operation=operation, implementation="torch", reason="no GPU")
    if find_spec("triton") is None:
        return Choice(operation=operation, implementation="torch", reason="triton is not installed")
    return Choice(operation=operation, implementation="triton", reason="; ".join(["ours", *_beside(operation)]))


def _beside(operation: str) -> list[str]:
    """Of the libraries that are installed and do not serve: how to have one, or why it cannot be had."""
    here = {name: installed(LIBRARIES[name].distribution) for name in OPERATIONS[operation] if name in LIBRARIES}
    named = [why_not(name) or f"{name} {found} serves if {VARIABLE} has {operation}={name}" for name, found in here.items() if found]
    if operation == "attend":
        named += [f"{name} {found} cannot: {why}" for name, why in UNSUITED.items() if (found := installed(name))]
    return named


@cache
def implementation(operation: str, device: torch.device) -> Callable[..., Any]:
    """The function that `choose` names."""
    return _load(OPERATIONS[operation][choose(operation, device).implementation])


def preparation(device: torch.device) -> Callable[..., Any]:
    """What prepares steps for the implementation of attention that serves a device, made of an `AttendSpec`."""
    return _load(PREPARATIONS[choose("attend", device).implementation])


def _load(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    found: Callable[..., Any] = getattr(import_module(f"polymux.kernels.{module}"), name)
    return found


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
