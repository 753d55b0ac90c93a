"""Backend `nccl`: between GPUs, wherever they are. Each edge has a communicator of its own, so a death touches no other edge.

The prefill side gathers a move into a slab, says so on the control connection, and sends the slab; the decode side hears of it, posts the
receive into a slab of its own, and scatters that into the granted blocks. Both therefore post in the order of the moves. NCCL's kernels see
slabs only: a peer that is frozen, late or dead can hold up a slab until the abort, but never a KV block.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial

from polymux.transport.cuda.mover import Mover
from polymux.transport.cuda.region import DeviceGrid
from polymux.transport.cuda.slab import PER_EDGE, Lane, Slab
from polymux.transport.errors import PolymuxError, TransferTimeout
from polymux.transport.frames import drive_async, frame, read_frame
from polymux.transport.handshake import Introduction, from_report, report
from polymux.transport.kv_backend import DeviceEvent, Landing
from polymux.transport.kv_device import Arrival, DeviceReceiver
from polymux.transport.nccl.comm import Comm, CommState, Operation
from polymux.transport.protocol import Commit, CommJoined, Move
from polymux.transport.reactor import Reactor
from polymux.transport.region import Grid
from polymux.transport.sockets import dial_tcp
from polymux.transport.units import TransferId, unpack_ids
from polymux.transport.wire import decode_as, encode

SINK_RANK, SOURCE_RANK = 0, 1


class CommLink:
    """One rank of an edge's communicator: how it was joined, and its end. All in the mover's thread but the constructor.

    `on_joined` and `on_broken` are called there too, at most once each and not after `close`.
    """

    name = "nccl"
    takes_all = True  # the other rank has sent it, wanted or not

    def __init__(
        self,
        mover: Mover,
        unique_id: bytes,
        rank: int,
        on_joined: Callable[[], None],
        on_broken: Callable[[PolymuxError], None],
    ) -> None:
        self._mover = mover
        self._unique_id = unique_id
        self._rank = rank
        self._on_joined: Callable[[], None] | None = on_joined
        self._on_broken: Callable[[PolymuxError], None] | None = on_broken
        self._lane: Lane | None = None
        self._comm: Comm | None = None

    def open(self) -> None:
        """Raises PolymuxError where the device has nothing left for it."""
        (self._mover.outgoing if self._rank == SOURCE_RANK else self._mover.incoming).prepare()
        self._lane = self._mover.lane()
        self._comm = self._mover.comm(self._lane, self._unique_id, self._rank)

    def step(self, now_s: float) -> bool:
        if self._comm is None:
            return False
        has_moved = self._comm.step(now_s)
        if self._comm.state is CommState.READY and self._on_joined is not None:
            self._on_joined()
            self._on_joined = None
        if not self._comm.is_usable and self._on_broken is not None:
            self._on_broken(self._comm.why or PolymuxError("closed"))
            self._on_broken = None
        return has_moved

    @property
    def is_busy(self) -> bool:
        return self._comm is not None and self._comm.has_work

    @property
    def can_post(self) -> bool:
        return self._comm is not None and self._comm.state is CommState.READY

    def post(self, slab: Slab, nbytes: int, now_s: float) -> Operation:
        assert self._comm is not None
        operation = Operation(self._rank == SOURCE_RANK, slab.address, nbytes, slab.event)
        self._comm.post(operation, now_s)
        return operation

    def can_begin(self, move: Move) -> bool:
        return self.can_post

    def begin(self, arrival: Arrival, now_s: float) -> None:
        assert isinstance(arrival.item, Move) and arrival.slab is not None
        arrival.operation = self.post(arrival.slab, arrival.item.num_bytes, now_s)

    def is_in(self, arrival: Arrival) -> bool:
        return arrival.operation is not None and arrival.operation.is_done

    def fetch(self, arrival: Arrival) -> None:
        return

    def is_fenced(self) -> bool:
        return False  # what was sent was right when it was sent, and is ours now

    def close(self, now_s: float) -> None:
        self._on_joined = self._on_broken = None
        if self._comm is not None:
            self._comm.close(now_s)

    @property
    def is_gone(self) -> bool:
        return self._comm is None or self._comm.state is CommState.GONE

    def release(self) -> None:
        if self._lane is not None:
            self._mover.return_lane(self._lane)
            self._lane = None


async def open_nccl(
    address: str, intro: Callable[[bytes], Introduction], token: str, deadline_s: float, mover: Mover, reactor: Reactor, landing: Landing
) -> DeviceReceiver:
    """Make a communicator with the source and wait until both can use it. `intro` says where to meet.

    Raises PeerLost, TransferTimeout, OutOfMemory or WireError, when one of the two has got nowhere.
    """
    nccl, join_s = mover.nccl, mover.limits.join_s
    assert nccl is not None
    unique_id = await mover.ask(nccl.unique_id, deadline_s)
    joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(error: PolymuxError | None) -> None:
        if not joined.done():
            joined.set_result(None) if error is None else joined.set_exception(error)
        elif error is not None:
            landing.broken(error)

    link = CommLink(mover, unique_id, SINK_RANK, partial(reactor.post, settle, None), partial(reactor.post, settle))
    receiver = DeviceReceiver(link, mover, reactor, landing)
    try:
        await mover.ask(link.open, deadline_s)
        sock, _ = await dial_tcp(address, intro(unique_id), token, deadline_s)
        with closing(sock):
            answer = decode_as(CommJoined, await drive_async(read_frame(), sock, join_s + deadline_s))
        if answer.error is not None:
            raise from_report(answer.error)
        async with asyncio.timeout(join_s):
            await joined
    except BaseException as error:
        receiver.close()
        joined.cancel()
        if isinstance(error, TimeoutError):
            raise TransferTimeout(f"NCCL: no communicator within {join_s:g} s") from error
        raise
    return receiver


@dataclass(slots=True, eq=False)
class _Departure:
    """A move or commit on its way out."""

    item: Move | Commit
    source: DeviceGrid | None
    ready: DeviceEvent | None
    slab: Slab | None = None
    operation: Operation | None = None
    is_reading: bool = False  # its source blocks
    is_forgotten: bool = False  # before the sink was told of it
    is_announced: bool = False  # or dropped: its turn is over
    since_s: float = 0.0  # the device has all that reads

    @property
    def is_sending(self) -> bool:
        return self.operation is not None and not self.operation.is_done


class NcclSender:
    """The prefill side. `send_*`, `forget` and `close` are the reactor's, `step` and `failed` the mover's."""

    def __init__(
        self, link: CommLink, mover: Mover, reactor: Reactor, say: Callable[[Move | Commit], object], broken: Callable[[PolymuxError], None]
    ) -> None:
        self._link = link
        self._mover = mover
        self._reactor = reactor
        self._say = say
        self._broken = broken
        self._lane: Lane | None = None
        self._next_seq = 0
        self._lock = threading.Lock()  # of what follows
        self._queue: deque[_Departure] = deque()
        self._flights: deque[_Departure] = deque()
        self._thens: list[tuple[TransferId | None, Callable[[], None]]] = []  # for whom to call when no source block of theirs is read
        self._is_closed = False
        mover.post(mover.add, self)

    def send_move(self, move: Move, source: Grid, ready: DeviceEvent | None) -> None:
        assert isinstance(source, DeviceGrid)
        self._put(_Departure(move, source, ready))

    def send_commit(self, commit: Commit) -> None:
        self._put(_Departure(commit, None, None))

    def forget(self, transfer_id: TransferId, then: Callable[[], None]) -> None:
        self._drop(transfer_id, then)

    def close(self, then: Callable[[], None]) -> None:
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        self._drop(None, then)
        if not was_closed:
            self._mover.post(self._shut)

    def _put(self, departure: _Departure) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._queue.append(departure)
        self._mover.wake()

    def _drop(self, transfer_id: TransferId | None, then: Callable[[], None]) -> None:
        """Begin to read nothing more of this transfer, or of any, and call back once what was begun is over."""
        with self._lock:
            self._queue = deque(one for one in self._queue if transfer_id not in (None, one.item.transfer_id))
            for departure in self._flights:
                if transfer_id in (None, departure.item.transfer_id):
                    departure.is_forgotten = True
            is_read = self._is_read(transfer_id)
            if is_read:
                self._thens.append((transfer_id, then))
        if not is_read:
            then()

    def _is_read(self, transfer_id: TransferId | None) -> bool:
        return any(one.is_reading and transfer_id in (None, one.item.transfer_id) for one in self._flights)

    # In the mover's thread.

    @property
    def is_busy(self) -> bool:
        return bool(self._queue or self._flights or self._link.is_busy or self._is_closed)

    def step(self, now_s: float) -> bool:
        has_moved = self._link.step(now_s)
        for departure in self._flights:
            if departure.is_reading:
                has_moved |= self._has_read(departure, now_s)
        for departure in self._flights:
            if not departure.is_announced:
                if departure.is_reading or not self._dispatch(departure, now_s):
                    break  # none overtakes another
                has_moved = True
        has_moved |= self._land()
        if self._is_closed:
            return self._end() or has_moved
        while self._begin():
            has_moved = True
        return has_moved

    def failed(self, why: PolymuxError) -> None:
        """The edge goes; what the device still does is looked after until it is over."""
        self._reactor.post(self._broken, why)

    def _begin(self) -> bool:
        """Gather the next move, if its blocks are final and there is a slab."""
        with self._lock:
            if not self._queue or sum(one.slab is not None for one in self._flights) >= PER_EDGE:
                return False
            departure = self._queue[0]
        if isinstance(departure.item, Move):
            if departure.ready is not None and not self._mover.runtime.is_done(departure.ready.cuda_event):
                return False
            departure.slab = self._mover.outgoing.take()
            if departure.slab is None:
                return False
        with self._lock:
            if not self._queue or self._queue[0] is not departure:  # forgotten meanwhile
                self._give_back(departure)
                return True
            self._flights.append(self._queue.popleft())
            departure.is_reading = departure.slab is not None
        if departure.slab is not None:
            self._gather(departure, departure.slab)
        return True

    def _gather(self, departure: _Departure, slab: Slab) -> None:
        move, source = departure.item, departure.source
        assert isinstance(move, Move) and source is not None
        if self._lane is None:
            self._lane = self._mover.lane()
        try:
            with self._lane.on():
                slab.gather(source, unpack_ids(move.src_block_ids), range(move.layer_lo, move.layer_hi))
                if move.num_checked_blocks:
                    slab.download(move.num_checked_bytes)
        except BaseException:
            departure.is_forgotten = True  # what was enqueued is waited for all the same
            raise
        finally:
            self._mover.runtime.record(slab.event, self._lane.stream)
            departure.since_s = time.monotonic()  # not before: kernels may have been compiled

    def _has_read(self, departure: _Departure, now_s: float) -> bool:
        """Whether its source blocks are in the slab by now; whoever waited for that is told."""
        slab = departure.slab
        assert slab is not None
        if not self._mover.runtime.is_done(slab.event):
            if now_s - departure.since_s > self._mover.limits.stall_s:
                self._mover.fence(f"a gather of transfer {departure.item.transfer_id} on this device has not ended")
            return False
        with self._lock:
            departure.is_reading = False
            free = [one for one in self._thens if not self._is_read(one[0])]
            self._thens = [one for one in self._thens if self._is_read(one[0])]
        for _, then in free:
            self._reactor.post(then)
        return True

    def _dispatch(self, departure: _Departure, now_s: float) -> bool:
        """Tell the sink, and then send, once the communicator takes it; what was forgotten before that is never told of."""
        item, slab = departure.item, departure.slab
        is_wanted = not departure.is_forgotten and not self._is_closed
        if is_wanted and slab is not None and not self._link.can_post:
            return False
        departure.is_announced = True
        if not is_wanted:
            self._give_back(departure)
        elif isinstance(item, Move) and slab is not None:
            crc32 = slab.checksum(item.num_checked_bytes) if item.num_checked_blocks else 0
            self._say(replace(item, seq=self._next_seq, crc32=crc32))
            self._next_seq += 1
            departure.operation = self._link.post(slab, item.num_bytes, now_s)
        else:
            self._say(item)
        return True

    def _land(self) -> bool:
        has_moved = False
        while self._flights and self._flights[0].is_announced and not self._flights[0].is_sending:
            with self._lock:
                departure = self._flights.popleft()
            self._give_back(departure)
            has_moved = True
        return has_moved

    def _give_back(self, departure: _Departure) -> None:
        slab, departure.slab = departure.slab, None
        if slab is not None:
            self._mover.outgoing.give(slab)

    def _shut(self) -> None:
        self._link.close(time.monotonic())

    def _end(self) -> bool:
        """Closed: once nothing is read or sent any more, all goes back."""
        if not self._link.is_gone or any(departure.is_reading for departure in self._flights):
            return False
        for departure in self._flights:
            self._give_back(departure)
        with self._lock:
            self._flights.clear()
        if self._lane is not None:
            self._mover.return_lane(self._lane)
            self._lane = None
        self._mover.remove(self)
        self._link.release()
        return True


def attach_nccl(
    mover: Mover,
    reactor: Reactor,
    unique_id: bytes,
    sock: socket.socket,
    say: Callable[[Move | Commit], object],
    broken: Callable[[PolymuxError], None],
) -> NcclSender:
    """The prefill side joins, and reports over the connection that asked for it; later troubles go to `broken`."""
    has_answered = False

    def answer(error: PolymuxError | None) -> None:
        nonlocal has_answered
        if has_answered:
            if error is not None:
                broken(error)
            return
        has_answered = True
        with suppress(OSError):  # the sink has given up meanwhile
            sock.send(frame(encode(CommJoined(error=report(error) if error else None))))

    def open_link() -> None:
        try:
            link.open()
        except PolymuxError as error:
            reactor.post(answer, error)

    link = CommLink(mover, unique_id, SOURCE_RANK, partial(reactor.post, answer, None), partial(reactor.post, answer))
    sender = NcclSender(link, mover, reactor, say, broken)
    mover.post(open_link)
    return sender
