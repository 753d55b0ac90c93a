"""Backend `local`: both workers live in one process, and the decode side reads the prefill side's region where it is.

Where the two are one region and a pushed block is the granted one, nothing moves at all: the block table is the hand-over. On a GPU it is
`cuda_ipc` without the mapping.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polymux.transport.errors import PeerLost
from polymux.transport.kv_backend import Landing, Receiver
from polymux.transport.kv_pull import PullReceiver
from polymux.transport.protocol import EdgeTerms
from polymux.transport.reactor import Reactor
from polymux.transport.region import Region

if TYPE_CHECKING:
    from polymux.transport.cuda.region import DeviceRegion, MappedRegion
    from polymux.transport.kv_cuda_ipc import EventRing

_edges: dict[bytes, LocalEdge] = {}  # of this process, by the secret of the edge
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class LocalEdge:
    """The prefill side's end, for a decode side that finds it in its own process."""

    regions: tuple[Region | DeviceRegion | MappedRegion, ...]  # of each rank
    ring: EventRing | None  # of a region on a GPU
    fence: threading.Event = field(default_factory=threading.Event)


def expose(secret: bytes, regions: tuple[Region | DeviceRegion | MappedRegion, ...], ring: EventRing | None) -> LocalEdge:
    with _lock:
        return _edges.setdefault(secret, LocalEdge(regions, ring))


def withdraw(secret: bytes) -> None:
    """Fence. May be called twice."""
    with _lock:
        edge = _edges.pop(secret, None)
    if edge is not None:
        edge.fence.set()


def open_local(terms: EdgeTerms, region: Region | DeviceRegion, reactor: Reactor, landing: Landing) -> Receiver:
    """`region` is the sink's. Raises PeerLost when the source is in another process."""
    with _lock:
        edge = _edges.get(terms.secret)
    if edge is None:
        raise PeerLost("another process")
    buffers = [one.buffer for one in edge.regions if isinstance(one, Region)]
    if buffers:
        return PullReceiver("local", reactor.loop, landing, buffers, edge.fence.is_set, lambda: None)
    from polymux.transport.kv_cuda_ipc import open_within  # which needs torch

    assert edge.ring is not None and not isinstance(region, Region)
    return open_within(edge.regions, edge.ring, region, edge.fence.is_set, reactor, landing)
