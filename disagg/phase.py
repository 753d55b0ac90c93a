"""Prefill or decode: which kind of work a worker that has both steps next.

Asked at every step. A prefill makes a user's first token and brings a batch a member, so it goes first while the batch can spare its time;
a batch that cannot, or is late, goes before a prompt that has time; and where only one of the two can be on time, the one that makes more
tokens a second.
"""

from __future__ import annotations

import enum
from math import inf

from polymux.disagg.views import PhaseView, WorkView

MAX_PASSED_OVER = 32  # steps of one kind in a row while the other waits


class Phase(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


def next_phase(view: PhaseView) -> Phase:
    """Raises ValueError when there is neither. The other kind never waits for more than `MAX_PASSED_OVER` steps."""
    prefill, decode = view.prefill, view.decode
    if prefill is None or decode is None:
        if prefill is decode:
            raise ValueError("there is neither prefill nor decode work")
        return Phase.DECODE if prefill is None else Phase.PREFILL
    if max(prefill.num_passed_over, decode.num_passed_over) >= MAX_PASSED_OVER:
        return Phase.PREFILL if prefill.num_passed_over >= decode.num_passed_over else Phase.DECODE
    if _is_on_time(decode, view.now_s + _takes_s(prefill)):
        return Phase.PREFILL
    if _is_on_time(prefill, view.now_s + _takes_s(decode)):
        return Phase.DECODE
    return Phase.PREFILL if _rate(prefill, view.now_s) > _rate(decode, view.now_s) else Phase.DECODE


def _takes_s(work: WorkView) -> float:
    return work.switch_s + work.step_s


def _is_on_time(work: WorkView, start_s: float) -> bool:
    return start_s + _takes_s(work) <= work.due_at_s < inf


def _rate(work: WorkView, now_s: float) -> float:
    """Tokens a second if it goes first; those of work that is late in any case count half."""
    return work.num_tokens / _takes_s(work) * (1.0 if _is_on_time(work, now_s) else 0.5)
