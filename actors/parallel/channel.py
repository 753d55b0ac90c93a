"""The line between rank 0 and another rank: framed messages over a socket pair, bounded by its buffer, every send under a deadline."""

from __future__ import annotations

import socket
import threading
from typing import Any

from polymux.transport.descriptors import receive_fd, send_fd
from polymux.transport.frames import Steps, drive_blocking, frame, read_frame
from polymux.transport.wire import MAX_BULK_BYTES, decode, encode

FOREVER_S = 1e8  # of a wait that the other side's end ends


class RankChannel:
    """One end. Any thread may send; one receives."""

    def __init__(self, sock: socket.socket, send_s: float) -> None:
        """`send_s`: how long a message may take to fit the buffer of a rank that does not read."""
        self._sending = sock
        self._receiving = sock.dup()  # a socket object has one time-out, and the two directions have their own
        self._send_s = send_s
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Raises TransferTimeout when the other side does not read, PeerLost when it is gone, WireError for what is too large."""
        data = encode(message, limit=MAX_BULK_BYTES)
        with self._lock:
            drive_blocking(_send(data), self._sending, self._send_s)

    def receive(self, deadline_s: float = FOREVER_S) -> Any:
        """The next message. Raises TransferTimeout, PeerLost, WireError."""
        return decode(drive_blocking(read_frame(MAX_BULK_BYTES), self._receiving, deadline_s), limit=MAX_BULK_BYTES)

    def send_fd(self, fd: int) -> None:
        with self._lock:
            send_fd(self._sending, fd)

    def receive_fd(self, deadline_s: float) -> int:
        """The descriptor that comes next; the caller closes it. Raises TransferTimeout, PeerLost, WireError."""
        return receive_fd(self._receiving, deadline_s)

    def fileno(self) -> int:
        return self._receiving.fileno()

    def shut(self) -> None:
        """End both directions; whoever waits on either side wakes up."""
        try:
            self._sending.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self.shut()
        self._sending.close()
        self._receiving.close()


def _send(data: bytes) -> Steps[None]:
    yield frame(data)
