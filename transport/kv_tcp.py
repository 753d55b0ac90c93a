"""Backend `tcp`: works anywhere. Each move is a framed header and then its bytes, scattered straight into the granted blocks.

The bytes have a connection of their own, so that a cancel never waits behind them; commits travel on it too, behind their data. The sink
decides where bytes go before it reads them: those of a transfer that has ended are read into scratch memory and dropped.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice
from socket import socket

from polymux.transport.errors import GrantViolation, PeerLost, PolymuxError, WireError
from polymux.transport.frames import HEADER_BYTES, frame
from polymux.transport.kv_backend import DeviceEvent, Landing
from polymux.transport.protocol import Commit, Move
from polymux.transport.region import BlockGrid, Grid
from polymux.transport.transfer import SinkTransfer
from polymux.transport.units import GIB, KIB, MIB, TransferId, unpack_ids
from polymux.transport.wire import MAX_CONTROL_BYTES, decode, encode

_MAX_PARTS = 256  # buffers in one system call
_TURN_BYTES = 2 * MIB  # then the reactor's other sockets get their turn
_MAX_MOVE_BYTES = GIB
_ZEROS = memoryview(bytes(256 * KIB))


class Parts:
    """Buffers that a socket is filling or emptying, in order."""

    def __init__(self, views: Iterable[memoryview] = ()) -> None:
        self._views = deque(view for view in views if view.nbytes)

    def __bool__(self) -> bool:
        return bool(self._views)

    def head(self) -> list[memoryview]:
        return list(islice(self._views, _MAX_PARTS))

    def advance(self, done: int) -> None:
        views = self._views
        while done:
            first = views[0]
            if done < first.nbytes:
                views[0] = first[done:]
                return
            done -= first.nbytes
            views.popleft()

    def redirect(self, scratch: memoryview, keep: bytes = b"") -> None:
        """The rest comes from, or goes to, other memory, as many bytes as before; but what is left of `keep` stays."""
        kept = [view for view in self._views if view.obj is keep]
        left = sum(view.nbytes for view in self._views if view.obj is not keep)
        self._views = deque([*kept, *over(scratch, left)])


def over(scratch: memoryview, num_bytes: int) -> list[memoryview]:
    whole, rest = divmod(num_bytes, scratch.nbytes)
    return [scratch] * whole + ([scratch[:rest]] if rest else [])


@dataclass(slots=True)
class _Item:
    message: Move | Commit
    source: BlockGrid | None


class TcpSender:
    """The prefill side. Works off a queue as fast as the socket takes it; nothing is copied but by the kernel."""

    def __init__(self, loop: asyncio.AbstractEventLoop, broken: Callable[[PolymuxError], None]) -> None:
        self._loop = loop
        self._broken = broken
        self._sock: socket | None = None
        self._queue: deque[_Item] = deque()
        self._parts = Parts()
        self._sending: TransferId | None = None  # whose bytes are in `_parts`
        self._head = b""  # the header before them
        self._next_seq = 0
        self._is_watching = False

    def attach(self, sock: socket) -> None:
        """The data connection is there."""
        self._sock = sock
        self._pump()

    def send_move(self, move: Move, source: Grid, ready: DeviceEvent | None) -> None:
        assert isinstance(source, BlockGrid)
        self._put(_Item(move, source))

    def send_commit(self, commit: Commit) -> None:
        self._put(_Item(commit, None))

    def forget(self, transfer_id: TransferId, then: Callable[[], None]) -> None:
        """What was half sent is finished with zeros, which the sink drops."""
        self._queue = deque(item for item in self._queue if item.message.transfer_id != transfer_id)
        if self._sending == transfer_id:
            self._parts.redirect(_ZEROS, keep=self._head)
        then()

    def close(self, then: Callable[[], None]) -> None:
        self._queue.clear()
        self._parts = Parts()
        if self._sock is not None:
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None
        then()

    def _put(self, item: _Item) -> None:
        self._queue.append(item)
        if not self._is_watching:
            self._pump()

    def _pump(self) -> None:
        room = _TURN_BYTES
        try:
            while self._sock is not None and room > 0 and (self._parts or self._next()):
                sent = self._sock.sendmsg(self._parts.head())
                self._parts.advance(sent)
                room -= sent
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._broken(PeerLost(f"the data connection broke: {error}"))
        self._watch()

    def _watch(self) -> None:
        wanted = bool(self._parts or self._queue)
        if self._sock is None or wanted == self._is_watching:
            return
        self._is_watching = wanted
        if wanted:
            self._loop.add_writer(self._sock, self._pump)
        else:
            self._loop.remove_writer(self._sock)

    def _next(self) -> bool:
        """Lay out the next message; False when there is none."""
        self._sending = None
        if not self._queue:
            return False
        item = self._queue.popleft()
        message = item.message
        if isinstance(message, Commit):
            self._parts = Parts([memoryview(frame(encode(message)))])
            return True
        assert item.source is not None
        self._head = frame(encode(replace(message, seq=self._next_seq)))
        self._next_seq += 1
        grid, lo, hi = item.source, message.layer_lo, message.layer_hi
        self._sending = message.transfer_id
        bytes_of_blocks = (grid.views(block_id, lo, hi) for block_id in unpack_ids(message.src_block_ids))
        self._parts = Parts([memoryview(self._head), *chain.from_iterable(bytes_of_blocks)])
        return True


class TcpReceiver:
    """The decode side. Reads a length, a message, and for a move its bytes, each into the memory that is meant for it."""

    name = "tcp"

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket, landing: Landing) -> None:
        self._loop = loop
        self._sock = sock
        self._landing = landing
        self._scratch = memoryview(bytearray(256 * KIB))
        self._length = memoryview(bytearray(HEADER_BYTES))
        self._head: memoryview | None = None
        self._move: Move | None = None
        self._transfer: SinkTransfer | None = None  # None while a move is dropped
        self._parts = Parts([self._length])
        self._is_closed = False
        loop.add_reader(sock, self._readable)

    def take(self, item: Move | Commit) -> None:
        raise WireError(f"{type(item).__name__} belongs on the data connection")

    def abandon(self, transfer_id: TransferId) -> bool:
        if self._transfer is not None and self._transfer.transfer_id == transfer_id:
            self._transfer = None
            self._parts.redirect(self._scratch)
        return True

    def is_writing(self, transfer_id: TransferId) -> bool:
        return False

    def is_fenced(self) -> bool:
        return False  # what was sent was right when it was sent, and is ours now

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _readable(self) -> None:
        room = _TURN_BYTES
        try:
            while room > 0 and not self._is_closed:
                received = self._sock.recvmsg_into(self._parts.head())[0]
                if not received:
                    raise PeerLost("the peer closed the data connection")
                self._parts.advance(received)
                room -= received
                while not self._parts and not self._is_closed:
                    self._complete()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._landing.broken(PeerLost(f"the data connection broke: {error}"))
        except PolymuxError as error:
            self._landing.broken(error)

    def _complete(self) -> None:
        """All of what was awaited is here: say what comes next."""
        if self._move is not None:
            move, transfer, self._move, self._transfer = self._move, self._transfer, None, None
            self._await_length()
            if transfer is not None:
                grid = self._landing.target(transfer)
                assert isinstance(grid, BlockGrid)
                grid.spread(_blocks_of(transfer, move), move.layer_lo, move.layer_hi)
                self._landing.landed(transfer, move)
        elif self._head is not None:
            message, self._head = decode(self._head), None
            self._open(message)
        else:
            (length,) = struct.unpack("<I", self._length)
            if not 0 < length <= MAX_CONTROL_BYTES:
                raise WireError(f"a frame of {length} bytes; the limit is {MAX_CONTROL_BYTES}")
            self._head = memoryview(bytearray(length))
            self._parts = Parts([self._head])

    def _await_length(self) -> None:
        self._parts = Parts([self._length])

    def _open(self, message: object) -> None:
        if isinstance(message, Commit):
            self._await_length()
            self._landing.commit(message)
        elif isinstance(message, Move):
            self._open_move(message)
        else:
            raise WireError(f"{type(message).__name__} does not belong on the data connection")

    def _open_move(self, move: Move) -> None:
        if not 0 < move.num_bytes <= _MAX_MOVE_BYTES:
            raise GrantViolation(f"a move of {move.num_bytes} bytes; the limit is {_MAX_MOVE_BYTES}")
        self._move, self._transfer = move, self._landing.admit(move)
        if self._transfer is None:
            self._parts = Parts(over(self._scratch, move.num_bytes))
            return
        grid = self._landing.target(self._transfer)
        assert isinstance(grid, BlockGrid)
        bytes_of_blocks = (grid.views(block_id, move.layer_lo, move.layer_hi) for block_id in _blocks_of(self._transfer, move))
        self._parts = Parts(chain.from_iterable(bytes_of_blocks))


def _blocks_of(transfer: SinkTransfer, move: Move) -> list[int]:
    """The granted blocks that a move fills."""
    return transfer.block_ids[move.first_block : move.first_block + len(move.src_block_ids) // 4]
