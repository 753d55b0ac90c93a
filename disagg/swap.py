"""Swap or recompute: what becomes of the KV of a sequence that is preempted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapView:
    """Some blocks at the end of a preempted sequence. Seconds are predictions from learned costs."""

    num_bytes: int  # of them
    free_host_bytes: int
    copy_s: float  # one way
    recompute_s: float  # to prefill the whole sequence, prompt and outputs


def pays(view: SwapView) -> bool:
    """Whether to keep them in host memory: there is room, and both copies take less than computing the sequence again.

    Copies overlap with other work and a prefill does too, on whatever worker it runs; what is compared is the work, not the wait.
    """
    return view.num_bytes <= view.free_host_bytes and 2 * view.copy_s < view.recompute_s
