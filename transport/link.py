"""The front door's side of a worker connection, in its own asyncio loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast

from polymux.transport.errors import PeerLost, PolymuxError, WireError
from polymux.transport.frames import FrameBuffer, drive_async, frame, read_frame
from polymux.transport.handshake import Introduction
from polymux.transport.messages import Cancel, Generate, Peer, TokenFrame
from polymux.transport.protocol import PeerKind, Ping, Pong
from polymux.transport.sockets import dial_tcp
from polymux.transport.units import ClientId
from polymux.transport.wire import MAX_CONTROL_BYTES, decode, decode_as, encode

PING_S = 5.0
SILENCE_S = 15.0  # of a worker: it answers pings within microseconds unless it is dead or frozen
_MAX_FRAMES = 1024  # received and not yet taken; then TCP holds the worker back, and the worker drops us if that lasts
_LINGER_S = 1.0
_PING = frame(encode(Ping()))


class WorkerLink(asyncio.Protocol):
    """`async for frame in link` yields TokenFrames until `close()` ends it, or raises PeerLost when the worker is gone.

    One task iterates; any task may send.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._buffer = FrameBuffer(MAX_CONTROL_BYTES)
        self._frames: deque[TokenFrame] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._lost: PolymuxError | None = None
        self._is_closed = False
        self._is_paused = False
        self._heard_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def connect(cls, peer: Peer, client_id: ClientId, token: str, deadline_s: float) -> WorkerLink:
        """Dial and authenticate both ways. Raises PeerLost, TransferTimeout, StaleEpoch, ProtocolMismatch, AuthenticationFailed."""
        intro = Introduction(kind=PeerKind.CLIENT, peer_id=client_id, target=peer.worker_id, epoch=peer.epoch, body=b"")
        sock, _ = await dial_tcp(peer.address, intro, token, deadline_s)
        try:
            decode_as(Pong, await drive_async(read_frame(), sock, deadline_s))  # from here on the worker can send to us
            link = cls(peer)
            await link._loop.create_connection(lambda: link, sock=sock)
        except BaseException:
            sock.close()
            raise
        return link

    @property
    def is_open(self) -> bool:
        return self._lost is None and not self._is_closed

    async def send(self, message: Generate | Cancel) -> None:
        """Raises PeerLost when the link is down or stalls, WireError for a message that is too large."""
        data = frame(encode(message))
        if self.is_open and not self._writable.is_set():
            try:
                async with asyncio.timeout(SILENCE_S):
                    await self._writable.wait()
            except TimeoutError:
                self._lose(PeerLost(f"worker {self.peer.worker_id} has read nothing for {SILENCE_S:g} s"))
        if not self.is_open or self._transport is None:
            raise self._gone()
        self._transport.write(data)

    def __aiter__(self) -> WorkerLink:
        return self

    async def __anext__(self) -> TokenFrame:
        while self._is_closed or not self._frames:
            if self._is_closed:
                raise StopAsyncIteration
            if self._lost is not None:
                raise self._gone()
            self._arrived = self._loop.create_future()
            await self._arrived
        if self._is_paused and len(self._frames) <= _MAX_FRAMES // 2 and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return self._frames.popleft()

    async def close(self) -> None:
        """What was sent still goes out, for a second; the iteration ends at once. May be called twice."""
        if not self._is_closed and self._transport is not None:
            self._transport.close()
            self._loop.call_later(_LINGER_S, self._transport.abort)
        self._is_closed = True
        self._stop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by class, only by behaviour
        self._timer = self._loop.call_later(PING_S, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(PeerLost(f"worker {self.peer.worker_id} closed the connection" + (f": {exc}" if exc else "")))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._heard_s = self._loop.time()
        try:
            for payload in self._buffer.feed(data):
                self._receive(decode(payload))
        except WireError as error:
            self._lose(PeerLost(f"worker {self.peer.worker_id} sent what is no frame: {error}"))
        if len(self._frames) >= _MAX_FRAMES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def _receive(self, message: object) -> None:
        if isinstance(message, TokenFrame):
            self._frames.append(message)
        elif not isinstance(message, Pong):
            raise WireError(f"a worker must not send {type(message).__name__}")

    def _tick(self) -> None:
        if self._loop.time() - self._heard_s > SILENCE_S and not self._is_paused:
            self._lose(PeerLost(f"worker {self.peer.worker_id} has been silent for {SILENCE_S:g} s"))
        elif self.is_open and self._transport is not None:
            self._transport.write(_PING)
            self._timer = self._loop.call_later(PING_S, self._tick)

    def _gone(self) -> PolymuxError:
        return PeerLost(self._lost.message if self._lost else f"the link to worker {self.peer.worker_id} is closed")

    def _lose(self, why: PolymuxError) -> None:
        if self._lost is None and not self._is_closed:
            self._lost = why
        if self._transport is not None:
            self._transport.abort()
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._writable.set()
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
