"""The worker's side of its connections: commands come in from front doors, token frames go out, decode workers ask for KV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polymux.transport.messages import Cancel, Generate, TokenFrame
from polymux.transport.reactor import Reactor
from polymux.transport.units import MIB, ClientId, Epoch, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    max_clients: int = 256
    max_pending_bytes: int = 4 * MIB  # written to a client and not yet taken by it; beyond it the client is dropped
    handshake_s: float = 5.0
    silence_s: float = 20.0  # a client that says nothing for so long is gone; links ping every 5 s


class WorkerServer:
    """One listening socket and its thread. `on_command` and `on_client_lost` come from that thread and must be quick.

    A worker listens before the controller gives it an epoch: `start()` returns the address to register with, `serve(epoch)` begins to
    let peers in. Each connection that was let in ends in exactly one `on_client_lost`; a client id that connects anew loses its
    older connection first.
    """

    def __init__(
        self,
        *,
        worker_id: WorkerId,
        token: str,
        on_command: Callable[[ClientId, Generate | Cancel], None],
        on_client_lost: Callable[[ClientId], None],
        host: str = "127.0.0.1",
        port: int = 0,
        advertised_host: str | None = None,
        limits: StreamLimits | None = None,
        reactor: Reactor | None = None,
    ) -> None:
        raise NotImplementedError

    def start(self) -> str:
        """Listen. Returns the address, "tcp://host:port"."""
        raise NotImplementedError

    def serve(self, epoch: Epoch) -> None:
        """Let peers in that expect this epoch; until then all are refused."""
        raise NotImplementedError

    def send(self, client_id: ClientId, frame: TokenFrame) -> bool:
        """Send to a client from any thread, without ever blocking. False when the client is not connected (or was just dropped)."""
        raise NotImplementedError

    @property
    def client_ids(self) -> tuple[ClientId, ...]:
        raise NotImplementedError

    def close(self) -> None:
        """Stop listening and drop every connection. May be called twice."""
        raise NotImplementedError
