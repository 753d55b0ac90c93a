"""Backend `local`: both workers live in one process, and the decode side reads the prefill side's region where it is.

Where the two are one region and a pushed block is the granted one, nothing moves at all: the block table is the hand-over.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from polymux.transport.errors import PeerLost
from polymux.transport.kv_backend import Landing
from polymux.transport.kv_pull import PullReceiver
from polymux.transport.protocol import EdgeTerms
from polymux.transport.reactor import Reactor

_edges: dict[bytes, LocalEdge] = {}  # of this process, by the secret of the edge
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class LocalEdge:
    """The prefill side's end, for a decode side that finds it in its own process."""

    ranks: tuple[memoryview, ...]  # the memory of each
    fence: threading.Event = field(default_factory=threading.Event)


def expose(secret: bytes, ranks: tuple[memoryview, ...]) -> LocalEdge:
    with _lock:
        return _edges.setdefault(secret, LocalEdge(ranks))


def withdraw(secret: bytes) -> None:
    """Fence. May be called twice."""
    with _lock:
        edge = _edges.pop(secret, None)
    if edge is not None:
        edge.fence.set()


def open_local(terms: EdgeTerms, reactor: Reactor, landing: Landing) -> PullReceiver:
    """Raises PeerLost when the source is in another process."""
    with _lock:
        edge = _edges.get(terms.secret)
    if edge is None:
        raise PeerLost("another process")
    return PullReceiver("local", reactor.loop, landing, edge.ranks, edge.fence.is_set, lambda: None)
