"""Backend `cuda_ipc`: two processes of one host, on one GPU or on two that reach each other. One maps the other's region.

As with `shm`, the decode side copies, on a stream of its own, and the connection that brought the handle is the fence. What a move's blocks
still wait for is an event of the prefill worker's, which the decode worker has opened too and looks at before it begins to copy; it
never lets its device wait for one, since the event of a process that has died may never come. `local` is the same within one process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from polymux.transport.cuda.mover import Mover
from polymux.transport.cuda.region import DeviceGrid, DeviceRegion, MappedRegion, as_tensor, device_grids
from polymux.transport.cuda.runtime import HANDLE_BYTES
from polymux.transport.errors import CudaError, WireError
from polymux.transport.frames import drive_async, read_frame
from polymux.transport.handshake import Introduction
from polymux.transport.head_slices import MAX_RANKS
from polymux.transport.kv_backend import DeviceEvent, Landing
from polymux.transport.kv_device import Arrival, DeviceReceiver
from polymux.transport.messages import KVLayout
from polymux.transport.protocol import Commit, EdgeTerms, IpcTerms, Move
from polymux.transport.reactor import Reactor
from polymux.transport.region import Grid, Region
from polymux.transport.sockets import dial_tcp, is_closed
from polymux.transport.units import TransferId, unpack_ids
from polymux.transport.wire import decode_as

NUM_EVENTS = 64  # a move waits for a later one's event when so many are under way, which is late but never wrong


class EventRing:
    """Events that are recorded in turn on one stream, so that each comes no earlier than those before it. Used by one edge at a time."""

    def __init__(self, region: DeviceRegion) -> None:
        self._runtime = region.runtime
        self._index = region.index
        self._runtime.set_device(region.index)
        self._stream = self._runtime.stream()
        self.events = tuple(self._runtime.event(is_interprocess=True) for _ in range(NUM_EVENTS))

    def mark(self, seq: int, ready: DeviceEvent | None) -> None:
        """Record the event of a move: it comes once `ready` has."""
        self._runtime.set_device(self._index)
        if ready is not None:
            self._runtime.wait_event(self._stream, ready.cuda_event)
        self._runtime.record(self.events[seq % NUM_EVENTS], self._stream)

    def close(self) -> None:
        for event in self.events:
            self._runtime.destroy_event(event)
        self._runtime.destroy_stream(self._stream)


class Rings:
    """The rings of one region. They live as long as it: to destroy an event that another process has open is undefined."""

    def __init__(self, region: DeviceRegion) -> None:
        self._region = region
        self._lock = threading.Lock()
        self._free: list[EventRing] = []

    def take(self) -> EventRing:
        with self._lock:
            return self._free.pop() if self._free else EventRing(self._region)

    def give(self, ring: EventRing) -> None:
        with self._lock:
            self._free.append(ring)

    def close(self) -> None:
        """The worker ends."""
        for ring in self._free:
            ring.close()
        self._free.clear()


class DevicePullSender:
    """The prefill side: marks what is ready on the device, says so, and leaves the reading to the peer. `fence` is the backend's."""

    def __init__(self, send: Callable[[Move | Commit], object], ring: EventRing, fence: Callable[[], None]) -> None:
        self._send = send
        self._ring = ring
        self._fence = fence
        self._next_seq = 0

    def send_move(self, move: Move, source: Grid, ready: DeviceEvent | None) -> None:
        """No checksum: the bytes may not be there yet, and nothing carries them that could damage them."""
        self._ring.mark(self._next_seq, ready)
        self._send(replace(move, seq=self._next_seq, num_checked_blocks=0))
        self._next_seq += 1

    def send_commit(self, commit: Commit) -> None:
        self._send(commit)

    def forget(self, transfer_id: TransferId, then: Callable[[], None]) -> None:
        then()  # the sink has said that it reads no more

    def close(self, then: Callable[[], None]) -> None:
        self._fence()
        then()


def export(region: DeviceRegion, followers: Sequence[Region | MappedRegion], ring: EventRing) -> IpcTerms:
    """What another process needs to read the region of each rank, and to know when."""
    handles = region.handles(followers)
    return IpcTerms(memory=b"".join(handles), events=b"".join(region.runtime.event_handle(event) for event in ring.events))


async def open_cuda_ipc(
    address: str,
    intro: Introduction,
    token: str,
    deadline_s: float,
    edge: EdgeTerms,
    region: DeviceRegion,
    reactor: Reactor,
    landing: Landing,
) -> DeviceReceiver:
    """`edge`: what the source said of itself.

    Raises PeerLost, TransferTimeout, WireError, CudaError or OutOfMemory when the source's memory cannot be had.
    """
    sock, _ = await dial_tcp(address, intro, token, deadline_s)
    try:
        terms = decode_as(IpcTerms, await drive_async(read_frame(), sock, deadline_s))
        source = await region.mover.ask(partial(_map, region, terms, edge, sock.close), deadline_s)
    except BaseException:
        sock.close()
        raise
    link = PullLink("cuda_ipc", region.mover, region, source, lambda: is_closed(sock))
    return DeviceReceiver(link, region.mover, reactor, landing)


def open_within(
    source: Sequence[Region | DeviceRegion | MappedRegion],
    ring: EventRing,
    region: DeviceRegion,
    is_fenced: Callable[[], bool],
    reactor: Reactor,
    landing: Landing,
) -> DeviceReceiver:
    """The source, of one rank or several, is in this process; the mover's incoming slabs are there."""
    addresses = [one.address for one in source if not isinstance(one, Region)]
    mapped = Mapped(addresses, source[0].nbytes, ring.events, lambda: None)
    return DeviceReceiver(PullLink("local", region.mover, region, mapped, is_fenced), region.mover, reactor, landing)


def _map(region: DeviceRegion, terms: IpcTerms, edge: EdgeTerms, release: Callable[[], None]) -> Mapped:
    runtime, mover = region.runtime, region.mover
    if not 0 < edge.num_ranks <= MAX_RANKS or len(terms.memory) != edge.num_ranks * HANDLE_BYTES:
        raise WireError(f"IPC handles of {len(terms.memory)} bytes for the memories of {edge.num_ranks} ranks")
    if not terms.events or len(terms.events) % HANDLE_BYTES:
        raise WireError(f"IPC handles of {len(terms.events)} bytes for events")
    mover.incoming.prepare()
    addresses: list[int] = []
    events: list[int] = []

    def close_all() -> None:
        for close, opened in ((runtime.destroy_event, events), (runtime.close_memory, addresses)):
            for one in opened:
                with suppress(CudaError):  # its owner may be dead
                    close(one)

    def let_go() -> None:
        release()
        mover.aside(close_all)  # which waits for the device, and so perhaps for the peer of another edge

    try:
        addresses.extend(runtime.open_memory(handle) for handle in _handles(terms.memory))
        events.extend(runtime.open_event(handle) for handle in _handles(terms.events))
    except CudaError:
        let_go()
        raise
    return Mapped(addresses, edge.region_bytes, events, let_go)


def _handles(joined: bytes) -> Iterator[bytes]:
    for start in range(0, len(joined), HANDLE_BYTES):
        yield joined[start : start + HANDLE_BYTES]


@dataclass(slots=True)
class Mapped:
    """A source's memory and events as this process sees them. `release` lets them go; in the mover's thread."""

    addresses: Sequence[int]  # of each rank
    nbytes: int  # of each
    events: Sequence[int]
    release: Callable[[], None]


class PullLink:
    """A source that this device reads by itself: nothing has to be brought in before the copy."""

    takes_all = False

    def __init__(self, name: str, mover: Mover, region: DeviceRegion, source: Mapped, is_fenced: Callable[[], bool]) -> None:
        self.name = name
        self.is_fenced = is_fenced
        self._mover = mover
        self._source = source
        self._is_open = True
        self._grids = device_grids([as_tensor(address, source.nbytes, region.device) for address in source.addresses])

    def grid(self, layout: KVLayout) -> DeviceGrid:
        """The source's blocks of a model, whatever its ranks and ours."""
        return self._grids.of_model(layout)

    def step(self, now_s: float) -> bool:
        return False

    @property
    def is_busy(self) -> bool:
        return False

    def can_begin(self, move: Move) -> bool:
        """Whether the source's device has finished what the move is about."""
        return self._mover.runtime.is_done(self._source.events[move.seq % len(self._source.events)])

    def begin(self, arrival: Arrival, now_s: float) -> None:
        return

    def is_in(self, arrival: Arrival) -> bool:
        return True

    def fetch(self, arrival: Arrival) -> None:
        move, transfer, slab = arrival.item, arrival.transfer, arrival.slab
        assert isinstance(move, Move) and transfer is not None and slab is not None
        source, block_ids = self.grid(transfer.layout), unpack_ids(move.src_block_ids)
        source.check(block_ids)
        slab.gather(source, block_ids, range(move.layer_lo, move.layer_hi))

    def close(self, now_s: float) -> None:
        self._is_open = False

    @property
    def is_gone(self) -> bool:
        return not self._is_open

    def release(self) -> None:
        """Nothing is copied any more."""
        self._grids.close()
        self._source.release()
