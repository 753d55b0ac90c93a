"""The requests in flight, the front doors that hold them, and their deadlines. Whatever ends a request takes it out here."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from polymux.cluster.books import DecodeBook, PrefillBook
from polymux.disagg.slo import SLO
from polymux.transport.errors import Overloaded
from polymux.transport.messages import Admit
from polymux.transport.units import ClientId, SequenceId

MAX_CLIENTS = 1024


@dataclass(slots=True)
class PlacedSequence:
    sequence_id: SequenceId
    prefill: PrefillBook
    decode: DecodeBook

    def end(self) -> None:
        self.prefill.end(self.sequence_id)
        self.decode.end(self.sequence_id)

    def must_move(self, excluded: tuple[str, ...]) -> bool:
        """Whether one of its workers is lost, or the front door has found it so."""
        return any(book.is_lost or book.hello.worker_id in excluded for book in (self.prefill, self.decode))


@dataclass(slots=True)
class Request:
    ask: Admit
    slo: SLO
    deadline_at_s: float
    sequences: list[PlacedSequence] = field(default_factory=list)  # in choice order


@dataclass(slots=True)
class _Client:
    seen_at_s: float
    request_ids: dict[str, None] = field(default_factory=dict)


class Ledger:
    """Bounded by what admission lets in, and by `MAX_CLIENTS`."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._clients: dict[ClientId, _Client] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; entries of ended requests are dropped when they come up

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def seen(self, client_id: ClientId, now_s: float) -> None:
        """A front door is alive. Raises Overloaded for a new one when there are too many."""
        client = self._clients.get(client_id)
        if client is not None:
            client.seen_at_s = now_s
        elif len(self._clients) >= MAX_CLIENTS:
            raise Overloaded(f"{MAX_CLIENTS} front doors are connected, and no more may be")
        else:
            self._clients[client_id] = _Client(now_s)

    def add(self, request: Request) -> None:
        """Take in a request of a client that was seen."""
        self._requests[request.ask.request_id] = request
        self._clients[request.ask.client_id].request_ids[request.ask.request_id] = None
        heapq.heappush(self._deadlines, (request.deadline_at_s, request.ask.request_id))

    def end(self, request_id: str) -> Request | None:
        """Take it out and free its place in the workers' books; None when it is not there (any more)."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            sequence.end()
        client = self._clients.get(request.ask.client_id)
        if client is not None:
            client.request_ids.pop(request_id, None)
        if len(self._deadlines) > 64 + 2 * len(self._requests):
            self._deadlines = [(r.deadline_at_s, other_id) for other_id, r in self._requests.items()]
            heapq.heapify(self._deadlines)
        return request

    def gone_clients(self, seen_before_s: float) -> dict[ClientId, tuple[str, ...]]:
        """Forget the front doors that were last seen before that time; theirs are the requests to end."""
        gone = {client_id: tuple(c.request_ids) for client_id, c in self._clients.items() if c.seen_at_s < seen_before_s}
        for client_id in gone:
            del self._clients[client_id]
        return gone

    def overdue(self, now_s: float) -> tuple[str, ...]:
        """Requests whose deadline has passed; each is named once."""
        found: dict[str, None] = {}
        while self._deadlines and self._deadlines[0][0] <= now_s:
            deadline_at_s, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None and request.deadline_at_s == deadline_at_s:
                found[request_id] = None
        return tuple(found)

    def check(self) -> None:
        """Assert that every request is its client's, placed whole, and that the heap is bounded."""
        held = [request_id for client in self._clients.values() for request_id in client.request_ids]
        assert sorted(held) == sorted(self._requests)
        assert all(len(r.sequences) == r.ask.num_sequences for r in self)
        assert len(self._requests) <= len(self._deadlines) <= 64 + 2 * len(self._requests) + 1
        for request in self:
            for sequence in request.sequences:
                assert sequence.sequence_id in sequence.prefill.placed
                assert sequence.sequence_id in sequence.decode.placed
