"""What a worker did with its last minutes, as spans on its own monotonic clock: a bounded ring that any of its threads may write.

Recording is a lock and a list, well under a microsecond, since it happens at each step; spans are made when somebody looks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from polymux.transport.messages import Span, SpanKind
from polymux.transport.units import ModelName

MAX_SPANS = 16_384  # kept: minutes of a busy worker, about 3 MiB
MERGE_GAP_S = 0.02  # between two steps of one model that are drawn as one
MERGED_S = 1.0  # the longest of them, so that a look at a busy worker still shows its batch change

_STEPS = (SpanKind.PREFILL, SpanKind.DECODE)


@dataclass(slots=True)
class _Record:
    """A span as it is kept; the last of a run of steps still grows."""

    kind: SpanKind
    model: ModelName
    began_s: float
    ended_s: float
    nbytes: int
    num_seqs: int
    num_tokens: int
    num_steps: int = 1


class Timeline:
    """Thread-safe. Times are readings of `clock`, which every writer shares."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_spans: int = MAX_SPANS) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._records: deque[_Record] = deque(maxlen=max_spans)
        self._step: _Record | None = None  # the last one computed, while it may still grow
        self._active: _Record | None = None

    def add(
        self, kind: SpanKind, model: ModelName, began_s: float, ended_s: float, *, nbytes: int = 0, num_seqs: int = 0, num_tokens: int = 0
    ) -> None:
        """Something took from `began_s` to `ended_s`. Steps of one model that follow each other become one span."""
        with self._lock:
            if kind in _STEPS:
                last = self._step
                if (
                    last is not None
                    and last.model == model
                    and last.kind is kind
                    and began_s - last.ended_s <= MERGE_GAP_S
                    and ended_s - last.began_s <= MERGED_S
                ):
                    last.ended_s = ended_s
                    last.nbytes += nbytes
                    last.num_seqs = max(last.num_seqs, num_seqs)
                    last.num_tokens += num_tokens
                    last.num_steps += 1
                    return
            record = _Record(kind, model, began_s, ended_s, nbytes, num_seqs, num_tokens)
            if kind in _STEPS:
                self._step = record
            self._records.append(record)

    def activated(self, model: ModelName | None, at_s: float) -> None:
        """From now on `model` is the active one, or none is."""
        with self._lock:
            if self._active is not None:
                self._active.ended_s = at_s
                self._records.append(self._active)
            self._active = None if model is None else _Record(SpanKind.ACTIVE, model, at_s, at_s, 0, 0, 0)

    def spans(self, within_s: float, max_spans: int = MAX_SPANS) -> tuple[Span, ...]:
        """What ended within the last seconds, the newest `max_spans` of it, oldest end first. Times are seconds before now."""
        now_s = self.clock()
        with self._lock:
            records = list(self._records)
            if self._active is not None:
                records.append(_Record(SpanKind.ACTIVE, self._active.model, self._active.began_s, now_s, 0, 0, 0))
        recent = [record for record in records if now_s - record.ended_s <= within_s]
        return tuple(_span(record, now_s) for record in recent[max(len(recent) - max_spans, 0) :])


def _span(record: _Record, now_s: float) -> Span:
    return Span(
        kind=record.kind,
        model=record.model,
        began_s=now_s - record.began_s,
        ended_s=max(now_s - record.ended_s, 0.0),
        nbytes=record.nbytes,
        num_seqs=record.num_seqs,
        num_tokens=record.num_tokens,
        num_steps=record.num_steps,
    )
