"""One reply of every worker's recent spans, asked for only when somebody looks. A worker that does not answer in time is shown as missing.

Hosts share no clock, so times stay ages: each lane says how long before the reply its spans' ages were taken, and how sure that is.
The front door, which makes wall-clock times of them, adds nothing but the moment at which the reply came.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from polymux.transport.errors import PolymuxError
from polymux.transport.messages import LookBack, Role, WorkerTimeline
from polymux.transport.units import WorkerId

ANSWER_S = 2.0  # for each worker
MAX_SECONDS = 3600.0
MAX_SPANS = 65_536  # of one reply, over all its lanes
COLUMNS = ("kind", "model", "began_s", "seconds", "nbytes", "num_seqs", "num_tokens", "num_steps")

Ask = Callable[[LookBack], Awaitable[WorkerTimeline]]


async def gather(asks: Mapping[WorkerId, tuple[Role, Ask | None]], look: LookBack) -> dict[str, Any]:
    """Every worker's lane as plain data, in the mapping's order; None for one that is not there to be asked."""
    share = LookBack(within_s=min(look.within_s, MAX_SECONDS), max_spans=min(look.max_spans, MAX_SPANS // max(len(asks), 1)))
    answers = await asyncio.gather(*(_lane(ask, share) for _, ask in asks.values()))
    now_s = time.monotonic()
    lanes = []
    for (worker_id, (role, _)), (lane, at_s) in zip(asks.items(), answers, strict=True):
        lanes.append({"worker_id": worker_id, "role": role, "age_s": now_s - at_s, **lane})
    return {"within_s": share.within_s, "columns": list(COLUMNS), "lanes": lanes}


async def _lane(ask: Ask | None, look: LookBack) -> tuple[dict[str, Any], float]:
    """A lane, and our own clock's reading when its ages were taken: halfway between question and answer, give or take that half."""
    asked_s = time.monotonic()
    if ask is None:
        return _missing("it is being started"), asked_s
    try:
        async with asyncio.timeout(ANSWER_S):
            timeline = await ask(look)
    except TimeoutError:
        return _missing(f"it did not answer within {ANSWER_S:g} s"), asked_s
    except PolymuxError as error:
        return _missing(str(error)), asked_s
    half_s = (time.monotonic() - asked_s) / 2
    spans = [
        (
            span.kind.value,
            span.model,
            round(span.began_s, 6),
            round(span.began_s - span.ended_s, 6),
            span.nbytes,
            span.num_seqs,
            span.num_tokens,
            span.num_steps,
        )
        for span in timeline.spans
    ]
    return {"epoch": timeline.epoch, "missing": None, "uncertainty_s": half_s, "spans": spans}, asked_s + half_s


def _missing(reason: str) -> dict[str, Any]:
    return {"epoch": None, "missing": reason, "uncertainty_s": 0.0, "spans": []}
