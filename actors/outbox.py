"""Tokens on their way out: one frame per engine step and client, whatever the number of sequences in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from polymux.transport.messages import Peer, SequenceUpdate, TokenFrame
from polymux.transport.units import ClientId

Send = Callable[[ClientId, TokenFrame], bool]


class Outbox:
    """Gathers updates during a step; `flush` sends them. A client that is gone is the server's to report, not ours."""

    def __init__(self, peer: Peer, send: Send) -> None:
        self._peer = peer
        self._send = send
        self._updates: dict[ClientId, list[SequenceUpdate]] = defaultdict(list)

    def add(self, client_id: ClientId, update: SequenceUpdate) -> None:
        self._updates[client_id].append(update)

    def send_now(self, client_id: ClientId, update: SequenceUpdate) -> None:
        """Send one update by itself, from any thread: for what is refused before the engine thread sees it."""
        self._send(client_id, TokenFrame(worker_id=self._peer.worker_id, epoch=self._peer.epoch, updates=(update,)))

    def flush(self) -> None:
        while self._updates:
            client_id, updates = self._updates.popitem()
            self._send(client_id, TokenFrame(worker_id=self._peer.worker_id, epoch=self._peer.epoch, updates=tuple(updates)))
