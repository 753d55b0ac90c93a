"""What a GPU benchmark is, and the clocks that all of them share.

A module of this folder is a benchmark if it has

    TARGETS: tuple[Target, ...]  # what it promises
    def measure(budget_s: float) -> dict[str, float]  # a figure for each target's name, and any others

and may have `BUDGET_S: float`, the seconds that it would like (60 otherwise). `bench/gpu_check.py` imports it without a GPU too, to list
what is owed, and calls `measure` in a process of its own that is interrupted some time after the budget, then killed. A figure that could
not be taken is left out, and `note` says why; `attempt` keeps what fails from taking the other figures with it. Besides torch, triton,
numpy and msgpack nothing may be needed at import.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

NOTE = "note: "  # begins the lines of a benchmark's output that go into the results
FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU
GIB = 1 << 30
FAILED: list[str] = []  # parts of this process's benchmark


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure that is promised. With neither bound it is owed, but nothing is promised of it."""

    name: str  # its key in what `measure` returns, such as "decode_attention.share_of_copy_bandwidth"
    claim: str  # in words, with the shapes that it holds for
    unit: str = ""  # such as "s" or "GB/s"; a share has none
    at_least: float | None = None
    at_most: float | None = None

    def is_met_by(self, figure: float) -> bool:
        """False for NaN where there is a bound."""
        return (self.at_least is None or figure >= self.at_least) and (self.at_most is None or figure <= self.at_most)

    @property
    def bound(self) -> str:
        bounds = [f"≥ {self.at_least:g}" if self.at_least is not None else "", f"≤ {self.at_most:g}" if self.at_most is not None else ""]
        return " and ".join(filter(None, bounds))


def note(text: str) -> None:
    """Put a line into the results, such as what was not measured and why."""
    print(NOTE + text, flush=True)


def attempt(part: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures that `work` takes. Where it fails there are none: the benchmark has failed, and goes on; an interrupt ends it."""
    if "interrupted" in FAILED:
        return {}
    try:
        return work()
    except KeyboardInterrupt:
        note(f"{part}: interrupted at the deadline")
        FAILED.append("interrupted")
    except Exception as error:  # whatever it is, the other figures are wanted
        traceback.print_exc()
        note(f"{part} failed: {error!r:.300}")
        FAILED.append(part)
    return {}


def time_s(run: Callable[[], object], *, rounds: int = 20, warmup: int = 3, is_cold: bool = True) -> float:
    """Median seconds that one call keeps the GPU, between events on the current stream.

    All rounds are queued without waiting. A cold one writes more than the L2 cache first, so inputs come from memory; that also gives
    the host time to queue the launches, which thus cost nothing unless they take longer.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda") if is_cold else None
    for _ in range(warmup):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for begin, end in events:
        if flush is not None:
            flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


@cache
def copy_bytes_per_s(nbytes: int = GIB) -> float:
    """What this GPU's memory does: bytes read plus bytes written of one large copy, a second."""
    source = torch.randint(0, 127, (nbytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / time_s(lambda: target.copy_(source))


@cache
def matrix_flops_per_s(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """What its matrix units do: a square product of random numbers, two operations a multiply-add."""
    left, right = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device="cuda")
    return 2 * size**3 / time_s(lambda: torch.mm(left, right, out=out), is_cold=False)


@cache
def host_to_device_bytes_per_s(nbytes: int = GIB) -> float:
    """What its host link does: one copy from pinned memory."""
    target = torch.randint(0, 127, (nbytes,), dtype=torch.int8, device="cuda")
    source = torch.empty(nbytes, dtype=torch.int8, pin_memory=True).copy_(target)
    return nbytes / time_s(lambda: target.copy_(source, non_blocking=True), rounds=5, warmup=1, is_cold=False)
