"""The front door's side of a worker connection, in its own asyncio loop."""

from __future__ import annotations

from polymux.transport.messages import Cancel, Generate, Peer, TokenFrame
from polymux.transport.units import ClientId


class WorkerLink:
    """`async for frame in link` yields TokenFrames until `close()` ends it, or raises PeerLost when the worker is gone."""

    peer: Peer

    @classmethod
    async def connect(cls, peer: Peer, client_id: ClientId, token: str, deadline_s: float) -> WorkerLink:
        """Dial and authenticate both ways. Raises PeerLost, StaleEpoch, ProtocolMismatch, AuthenticationFailed."""
        raise NotImplementedError

    async def send(self, message: Generate | Cancel) -> None:
        """Raises PeerLost when the link is down, WireError for a message that is too large."""
        raise NotImplementedError

    def __aiter__(self) -> WorkerLink:
        return self

    async def __anext__(self) -> TokenFrame:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
