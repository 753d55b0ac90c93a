"""The worker's side of its connections: commands come in from front doors, token frames go out, decode workers ask for KV."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from polymux.transport.channel import Channel
from polymux.transport.errors import Overloaded, PeerLost, PolymuxError, WireError
from polymux.transport.frames import drive_async
from polymux.transport.handshake import Introduction, abandon, accept, check_target, check_token, report
from polymux.transport.messages import Cancel, Generate, SequenceUpdate, TokenFrame
from polymux.transport.protocol import PeerKind, Ping, Pong
from polymux.transport.reactor import Reactor
from polymux.transport.sockets import listen_tcp, tcp_address, tune
from polymux.transport.units import MIB, ClientId, Epoch, WorkerId
from polymux.transport.wire import decode, encode

log = logging.getLogger(__name__)

_MAX_HANDSHAKES = 64
_SWEEP_S = 5.0
_PONG = encode(Pong())


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    max_clients: int = 256
    max_pending_bytes: int = 4 * MIB  # written to a client and not yet taken by it; beyond it the client is dropped
    handshake_s: float = 5.0
    silence_s: float = 20.0  # a client that says nothing for so long is gone; links ping every 5 s


class Acceptor(Protocol):
    """What serves one kind of peer. Both are called in the reactor's thread."""

    def decide(self, intro: Introduction) -> bytes:
        """The body of the Welcome, or a PolymuxError that refuses the peer."""

    def install(self, intro: Introduction, sock: socket.socket) -> None:
        """The peer was let in; the socket is the acceptor's from here on."""

    def stop(self) -> None:
        """Close every connection; the server goes."""


class WorkerServer:
    """One listening socket and its thread. `on_command` and `on_client_lost` come from that thread and must be quick.

    A worker listens before the controller gives it an epoch: `start()` returns the address to register with, `serve(epoch)` begins to
    let peers in. Each connection that was let in ends in exactly one `on_client_lost`; a client id that connects anew loses its
    older connection first. A PolymuxError raised by `on_command` for a Generate goes to the client as that sequence's end.
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
        check_token(token)
        self.worker_id = worker_id
        self.token = token
        self.epoch: Epoch | None = None
        self.reactor = reactor or Reactor(f"polymux-{worker_id}")
        self._owns_reactor = reactor is None
        self._host, self._port, self._advertised_host = host, port, advertised_host or host
        self._limits = limits or StreamLimits()
        self._clients = _Clients(self, on_command, on_client_lost, self._limits)
        self._acceptors: dict[PeerKind, Acceptor] = {PeerKind.CLIENT: self._clients}
        self._handshakes: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    def start(self) -> str:
        """Listen. Returns the address, "tcp://host:port". Raises ConfigError when it cannot."""
        self._listener = listen_tcp(self._host, self._port)
        self.reactor.post(self.reactor.loop.add_reader, self._listener, self._accept)
        return tcp_address(self._advertised_host, self._listener.getsockname()[1])

    def serve(self, epoch: Epoch) -> None:
        """Let peers in that expect this epoch; until then all are refused."""
        self.epoch = epoch

    def plug(self, kind: PeerKind, acceptor: Acceptor) -> None:
        """Serve another kind of peer."""
        self._acceptors[kind] = acceptor

    def send(self, client_id: ClientId, frame: TokenFrame) -> bool:
        """Send to a client from any thread, without ever blocking. False when the client is not connected (or was just dropped)."""
        channel = self._clients.channels.get(client_id)
        return channel is not None and channel.send(encode(frame))

    @property
    def client_ids(self) -> tuple[ClientId, ...]:
        return tuple(self._clients.channels)

    def close(self) -> None:
        """Stop listening and drop every connection. May be called twice."""
        if not self.reactor.loop.is_closed():
            self.reactor.run(self._shut())
        if self._owns_reactor:
            self.reactor.close()

    async def _shut(self) -> None:
        if self._listener is not None:
            self.reactor.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        for acceptor in set(self._acceptors.values()):
            acceptor.stop()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:  # the dialler has gone already, or we are out of descriptors
            return
        tune(sock)
        self.greet(sock)

    def greet(self, sock: socket.socket) -> None:
        """Shake hands on a fresh connection, whichever socket it was accepted on, and install it with its kind's acceptor."""
        if len(self._handshakes) >= _MAX_HANDSHAKES:
            sock.close()
            return
        task = self.reactor.loop.create_task(self._greet(sock))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            intro = await drive_async(accept(self.token, self._decide), sock, self._limits.handshake_s)
        except PolymuxError as error:
            log.info("peer.refused worker_id=%s error=%s", self.worker_id, error)
            abandon(sock)
        except BaseException:
            sock.close()
            raise
        else:
            self._acceptors[intro.kind].install(intro, sock)

    def _decide(self, intro: Introduction) -> bytes:
        check_target(intro, self.worker_id, self.epoch)
        acceptor = self._acceptors.get(intro.kind)
        if acceptor is None:
            raise WireError(f"worker {self.worker_id} does not serve peers of kind {intro.kind}")
        return acceptor.decide(intro)


class _Clients:
    """The acceptor of front doors."""

    def __init__(
        self,
        server: WorkerServer,
        on_command: Callable[[ClientId, Generate | Cancel], None],
        on_client_lost: Callable[[ClientId], None],
        limits: StreamLimits,
    ) -> None:
        self.channels: dict[ClientId, Channel] = {}
        self._server = server
        self._on_command = on_command
        self._on_client_lost = on_client_lost
        self._limits = limits
        self._is_sweeping = False

    def decide(self, intro: Introduction) -> bytes:
        if len(self.channels) >= self._limits.max_clients and intro.peer_id not in self.channels:
            raise Overloaded(f"worker {self._server.worker_id} serves {self._limits.max_clients} clients already")
        return b""

    def install(self, intro: Introduction, sock: socket.socket) -> None:
        client_id = ClientId(intro.peer_id)
        older = self.channels.get(client_id)
        if older is not None:
            older.close(PeerLost(f"client {client_id} connected anew"))
        channel = Channel(
            self._server.reactor,
            sock,
            on_frame=lambda payload: self._receive(client_id, channel, payload),
            on_lost=lambda why: self._lose(client_id, why),
            max_pending_bytes=self._limits.max_pending_bytes,
        )
        self.channels[client_id] = channel
        channel.send(_PONG)  # what the client waits for: now it can be sent to
        channel.start()
        if not self._is_sweeping:
            self._is_sweeping = True
            self._server.reactor.loop.call_later(_SWEEP_S, self._sweep)

    def stop(self) -> None:
        for channel in list(self.channels.values()):
            channel.close(PeerLost("the worker stops"))

    def _receive(self, client_id: ClientId, channel: Channel, payload: bytes) -> None:
        message = decode(payload)
        match message:
            case Ping():
                channel.send(_PONG)
            case Generate() | Cancel():
                try:
                    self._on_command(client_id, message)
                except PolymuxError as error:
                    self._refuse(channel, message, error)
            case _:
                raise WireError(f"a client must not send {type(message).__name__}")

    def _refuse(self, channel: Channel, command: Generate | Cancel, error: PolymuxError) -> None:
        log.warning("command.refused sequence_id=%s error=%s", command.sequence_id, error)
        if isinstance(command, Generate):
            index = len(command.output_ids) // 4
            update = SequenceUpdate(sequence_id=command.sequence_id, index=index, token_ids=(), error=report(error))
            channel.send(encode(TokenFrame(worker_id=self._server.worker_id, epoch=self._server.epoch or Epoch(0), updates=(update,))))

    def _lose(self, client_id: ClientId, why: PolymuxError) -> None:
        del self.channels[client_id]
        log.info("client.lost client_id=%s why=%s", client_id, why)
        self._on_client_lost(client_id)

    def _sweep(self) -> None:
        """Drop clients that fell silent; runs only while there are clients."""
        oldest_s = self._server.reactor.loop.time() - self._limits.silence_s
        for channel in list(self.channels.values()):
            if channel.heard_s < oldest_s:
                channel.close(PeerLost(f"nothing heard for {self._limits.silence_s:g} s"))
        self._is_sweeping = bool(self.channels)
        if self._is_sweeping:
            self._server.reactor.loop.call_later(_SWEEP_S, self._sweep)
