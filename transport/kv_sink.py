"""The decode worker's end of KV migration: grants, edges to prefill workers, landing, commit and quarantine."""

from __future__ import annotations

from collections.abc import Callable

from polymux.transport.kv_types import EdgeStats, KVEvent, KVSettings
from polymux.transport.messages import KVLayout, Peer, Prefill
from polymux.transport.reactor import Reactor
from polymux.transport.region import Region
from polymux.transport.units import TransferId


class KVEdge:
    """One decode-prefill pair. Made by `KVSink.open`; every method may be called from any thread and returns at once."""

    peer: Peer
    backend: str  # local | shm | tcp; "" until the edge is open
    reason: str  # why that backend was chosen

    @property
    def is_open(self) -> bool:
        """Connected and negotiated. False before, and for good after the edge was lost: `KVSink.open` then makes a new one."""
        raise NotImplementedError

    def order(self, prefill: Prefill, layout: KVLayout) -> None:
        """Send the command with its grant; from here on the granted blocks are the transfer's until its last event.

        `prefill.grant.block_ids` are blocks of `layout` in this sink's region; exactly those blocks must be filled for a
        commit. `prefill.deadline_s` from now it fails with TransferTimeout. Works while the edge is still connecting: the order waits, and
        fails with PeerLost if there is no connection. Raises, and then nothing was granted: Overloaded (bounded queue full),
        GrantViolation (empty, duplicate, out of range, or overlapping a live grant), LayoutMismatch, StaleEpoch, PeerLost (edge is lost).
        """
        raise NotImplementedError

    def cancel(self, transfer_id: TransferId, reason: str) -> bool:
        """End a transfer: KVFailed(Cancelled), then KVQuiesced. False when it had ended already."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the edge up; what is outstanding fails with PeerLost."""
        raise NotImplementedError


class KVSink:
    """All edges of one decode worker. `identity` carries its epoch; `token` is the cluster's shared secret."""

    def __init__(
        self,
        *,
        region: Region,
        identity: Peer,
        token: str,
        on_event: Callable[[KVEvent], None],
        settings: KVSettings | None = None,
        reactor: Reactor | None = None,
    ) -> None:
        raise NotImplementedError

    def next_transfer_id(self) -> TransferId:
        """An id that this sink has not used."""
        raise NotImplementedError

    def open(self, peer: Peer, deadline_s: float) -> KVEdge:
        """The edge to this incarnation of a worker, dialled in the background if there is none. Returns at once.

        An edge to an older epoch of the same worker is closed first: a restarted worker is a new worker.
        """
        raise NotImplementedError

    def connect(self, peer: Peer, deadline_s: float) -> KVEdge:
        """`open`, and wait until the edge is negotiated. Raises PeerLost, StaleEpoch, ProtocolMismatch, AuthenticationFailed."""
        raise NotImplementedError

    def snapshot(self) -> tuple[EdgeStats, ...]:
        raise NotImplementedError

    def close(self) -> None:
        """Close every edge; outstanding transfers fail with PeerLost and quiesce before this returns."""
        raise NotImplementedError
