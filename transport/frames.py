"""Frames: a little-endian u32 length, then so many bytes of one message. And the ways to read them with a deadline.

An exchange of a few frames is written once, as a generator of steps: it yields bytes to send, or a number of bytes to receive and gets
them. `drive_blocking` and `drive_async` run such a generator over a socket.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

from polymux.transport.errors import PeerLost, TransferTimeout, WireError
from polymux.transport.wire import MAX_CONTROL_BYTES

_HEADER = struct.Struct("<I")
HEADER_BYTES = _HEADER.size

T = TypeVar("T")
Steps = Generator[bytes | int, bytes, T]


def frame(payload: bytes) -> bytes:
    return _HEADER.pack(len(payload)) + payload


def read_frame(limit: int = MAX_CONTROL_BYTES) -> Steps[bytes]:
    """Steps that receive one frame. Raises WireError for a length above the limit, before reading any of it."""
    (length,) = _HEADER.unpack((yield HEADER_BYTES))
    if length > limit:
        raise WireError(f"a frame of {length} bytes; the limit is {limit}")
    return (yield length) if length else b""


class FrameBuffer:
    """Cuts a byte stream into frames. Holds at most one unfinished frame."""

    def __init__(self, limit: int = MAX_CONTROL_BYTES) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The payloads that are complete now. Raises WireError when the next one announces more than the limit."""
        self._rest += data
        start, end = 0, len(self._rest)
        try:
            while end - start >= HEADER_BYTES:
                (length,) = _HEADER.unpack_from(self._rest, start)
                if length > self._limit:
                    raise WireError(f"a frame of {length} bytes; the limit is {self._limit}")
                if end - start < HEADER_BYTES + length:
                    return
                start += HEADER_BYTES + length
                yield bytes(self._rest[start - length : start])
        finally:
            del self._rest[:start]


def drive_blocking(steps: Steps[T], sock: socket.socket, deadline_s: float) -> T:
    """Raises TransferTimeout at the deadline, PeerLost when the other side closes, and what the steps raise."""
    until_s = time.monotonic() + deadline_s
    try:
        wanted = next(steps)
        while True:
            sock.settimeout(max(until_s - time.monotonic(), 1e-3))
            if isinstance(wanted, int):
                wanted = steps.send(_receive_blocking(sock, wanted, until_s))
            else:
                sock.sendall(wanted)
                wanted = next(steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    except TimeoutError as error:
        raise TransferTimeout(f"the peer did not answer within {deadline_s:g} s") from error
    except OSError as error:
        raise PeerLost(f"the connection broke: {error}") from error


def _receive_blocking(sock: socket.socket, wanted: int, until_s: float) -> bytes:
    data = bytearray()
    while len(data) < wanted:
        sock.settimeout(max(until_s - time.monotonic(), 1e-3))
        part = sock.recv(wanted - len(data))
        if not part:
            raise PeerLost("the peer closed the connection before it had answered")
        data += part
    return bytes(data)


async def drive_async(steps: Steps[T], sock: socket.socket, deadline_s: float) -> T:
    """The same on a non-blocking socket, in the running loop."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(deadline_s):
            wanted = next(steps)
            while True:
                if isinstance(wanted, int):
                    wanted = steps.send(await _receive_async(loop, sock, wanted))
                else:
                    await loop.sock_sendall(sock, wanted)
                    wanted = next(steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    except TimeoutError as error:
        raise TransferTimeout(f"the peer did not answer within {deadline_s:g} s") from error
    except OSError as error:
        raise PeerLost(f"the connection broke: {error}") from error


async def _receive_async(loop: asyncio.AbstractEventLoop, sock: socket.socket, wanted: int) -> bytes:
    data = bytearray()
    while len(data) < wanted:
        part = await loop.sock_recv(sock, wanted - len(data))
        if not part:
            raise PeerLost("the peer closed the connection before it had answered")
        data += part
    return bytes(data)
