"""The events in a request's life, on one clock; every latency is the difference of two of them.

    ARRIVED -> ADMITTED -> PREFILL_STARTED -> FIRST_TOKEN -> DECODE_STARTED -> LAST_TOKEN -> one of FINISHED, FAILED, CANCELLED
            \\-> REFUSED

A replayed sequence passes PREFILL_STARTED and DECODE_STARTED again; the first time counts, since the client felt no other.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class RequestEvent(enum.StrEnum):
    ARRIVED = "arrived"  # the request's last byte is read
    ADMITTED = "admitted"  # the controller has named its workers
    PREFILL_STARTED = "prefill_started"
    FIRST_TOKEN = "first_token"  # handed to the client's stream
    DECODE_STARTED = "decode_started"  # its KV is committed on the decode worker
    LAST_TOKEN = "last_token"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REFUSED = "refused"


ENDS = frozenset({RequestEvent.FINISHED, RequestEvent.FAILED, RequestEvent.CANCELLED, RequestEvent.REFUSED})


@dataclass(slots=True)
class Lifetime:
    """One request's events and when they happened, in seconds of the owner's clock. Not thread-safe."""

    num_output_tokens: int = 0
    _at_s: dict[RequestEvent, float] = field(default_factory=dict)
    _end: RequestEvent | None = None

    def mark(self, event: RequestEvent, at_s: float) -> bool:
        """Note an event. False, and nothing noted, when it was there before or the request has ended already."""
        if self._end is not None or event in self._at_s:
            return False
        self._at_s[event] = at_s
        if event in ENDS:
            self._end = event
        return True

    def tokens(self, count: int, at_s: float) -> None:
        """The client got `count` more tokens."""
        if count <= 0 or self._end is not None:
            return
        self._at_s.setdefault(RequestEvent.FIRST_TOKEN, at_s)
        self._at_s[RequestEvent.LAST_TOKEN] = at_s
        self.num_output_tokens += count

    @property
    def outcome(self) -> RequestEvent | None:
        """How it ended; None while it runs."""
        return self._end

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return self.between(RequestEvent.ARRIVED, RequestEvent.FIRST_TOKEN)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first; None for fewer than two tokens."""
        span_s = self.between(RequestEvent.FIRST_TOKEN, RequestEvent.LAST_TOKEN)
        return None if span_s is None or self.num_output_tokens < 2 else span_s / (self.num_output_tokens - 1)

    @property
    def queue_s(self) -> float | None:
        """Arrival to the start of the prefill: every wait before compute."""
        return self.between(RequestEvent.ARRIVED, RequestEvent.PREFILL_STARTED)

    @property
    def prefill_s(self) -> float | None:
        return self.between(RequestEvent.PREFILL_STARTED, RequestEvent.FIRST_TOKEN)

    @property
    def handover_s(self) -> float | None:
        """First token to readable KV on the decode worker."""
        return self.between(RequestEvent.FIRST_TOKEN, RequestEvent.DECODE_STARTED)

    @property
    def decode_s(self) -> float | None:
        return self.between(RequestEvent.DECODE_STARTED, RequestEvent.LAST_TOKEN)

    @property
    def e2e_s(self) -> float | None:
        """Arrival to the end, whatever the end was."""
        return None if self._end is None else self.between(RequestEvent.ARRIVED, self._end)

    def between(self, first: RequestEvent, then: RequestEvent) -> float | None:
        """Seconds from one event to another; None unless both have happened."""
        if first not in self._at_s or then not in self._at_s:
            return None
        return self._at_s[then] - self._at_s[first]
