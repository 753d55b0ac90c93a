"""A framed connection in a reactor: frames come in by callback in its thread, and go out from any thread without blocking it."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable

from polymux.transport.errors import Overloaded, PeerLost, PolymuxError
from polymux.transport.frames import FrameBuffer, frame
from polymux.transport.reactor import Reactor
from polymux.transport.units import KIB, MIB
from polymux.transport.wire import MAX_CONTROL_BYTES

log = logging.getLogger(__name__)

_RECEIVE_BYTES = 256 * KIB
_MAX_PARTS = 64  # frames in one sendmsg


class Channel:
    """Owns the socket. Ends once, by `close`, loss, a malformed frame or a peer that does not read; then `on_lost(why)` is called.

    `send` tries the socket at once, so that a frame leaves without a change of thread; what the kernel does not take waits in a
    bounded queue, and the reactor is woken once for all of it.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        *,
        on_frame: Callable[[bytes], None],
        on_lost: Callable[[PolymuxError], None],
        max_pending_bytes: int = 4 * MIB,
        max_frame_bytes: int = MAX_CONTROL_BYTES,
    ) -> None:
        self._reactor = reactor
        self._sock = sock
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._max_pending_bytes = max_pending_bytes
        self._frames = FrameBuffer(max_frame_bytes)
        self._received = memoryview(bytearray(_RECEIVE_BYTES))
        self._lock = threading.Lock()  # of everything below
        self._is_open = True
        self._is_writing = False  # the reactor watches for room
        self._pending: deque[bytes | memoryview] = deque()
        self._pending_bytes = 0
        self.heard_s = reactor.loop.time()

    def start(self) -> None:
        """Begin to read; in the reactor's thread."""
        self._reactor.loop.add_reader(self._sock, self._readable)

    @property
    def is_open(self) -> bool:
        return self._is_open

    def send(self, payload: bytes) -> bool:
        """False when the channel is closed, or closes now because the peer has not read what was sent before."""
        data = frame(payload)
        with self._lock:
            if not self._is_open:
                return False
            try:
                sent = 0 if self._pending else self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                self._reactor.post(self.close, PeerLost(f"the connection broke: {error}"))
                return False
            return sent == len(data) or self._keep(memoryview(data)[sent:])

    def _keep(self, data: memoryview) -> bool:
        if self._pending_bytes + len(data) > self._max_pending_bytes:
            why = Overloaded(f"the peer leaves more than {self._max_pending_bytes} bytes unread")
            self._reactor.post(self.close, why)
            return False
        self._pending.append(data)
        self._pending_bytes += len(data)
        if not self._is_writing:
            self._is_writing = True
            self._reactor.post(self._watch)
        return True

    def close(self, why: PolymuxError) -> None:
        """At once, in the reactor's thread. Later calls do nothing."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            self._pending.clear()
            self._pending_bytes = 0
        self._reactor.loop.remove_reader(self._sock)
        self._reactor.loop.remove_writer(self._sock)
        self._sock.close()
        self._on_lost(why)

    def _watch(self) -> None:
        if self._is_open:
            self._reactor.loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        with self._lock:
            try:
                self._flush()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._reactor.post(self.close, PeerLost(f"the connection broke: {error}"))
                return
            if not self._pending:
                self._is_writing = False
                self._reactor.loop.remove_writer(self._sock)

    def _flush(self) -> None:
        parts = [self._pending[i] for i in range(min(len(self._pending), _MAX_PARTS))]
        sent = self._sock.sendmsg(parts)
        self._pending_bytes -= sent
        while sent:
            first = self._pending.popleft()
            if sent < len(first):
                self._pending.appendleft(memoryview(first)[sent:])
                return
            sent -= len(first)

    def _readable(self) -> None:
        try:
            received = self._sock.recv_into(self._received)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(PeerLost(f"the connection broke: {error}"))
            return
        if not received:
            self.close(PeerLost("the peer closed the connection"))
            return
        self.heard_s = self._reactor.loop.time()
        try:
            for payload in self._frames.feed(self._received[:received]):
                self._on_frame(payload)
                if not self._is_open:
                    return
        except PolymuxError as error:
            self.close(error)
        except Exception as error:  # a callback's own mistake ends this peer's connection, not everybody's
            log.exception("channel.failed")
            self.close(PolymuxError(f"a callback failed: {error!r}"))
