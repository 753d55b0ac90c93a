"""One decode-prefill pair, as the prefill side sees it: orders in, moves out, source blocks released once each."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from socket import SHUT_RDWR, socket
from typing import TYPE_CHECKING

from polymux.transport.channel import Channel
from polymux.transport.errors import GrantViolation, Overloaded, PeerLost, PolymuxError, StaleEpoch, WireError
from polymux.transport.handshake import from_report, report
from polymux.transport.kv_backend import DeviceEvent, Sender
from polymux.transport.kv_fault import Faults, FaultySender
from polymux.transport.kv_local import expose, withdraw
from polymux.transport.kv_moves import MoveMaker, Push, PushCommit
from polymux.transport.kv_pull import PullSender
from polymux.transport.kv_tcp import TcpSender
from polymux.transport.kv_types import EdgeCounters, EdgeStats, KVSettings, OrderRef
from polymux.transport.messages import Peer, Prefill, Prefilled
from polymux.transport.protocol import (
    Commit,
    EdgeOpen,
    EdgeTerms,
    Ended,
    Failed,
    Move,
    PeerKind,
    Ping,
    Pong,
    Released,
)
from polymux.transport.reactor import Reactor
from polymux.transport.region import Grid, Grids, Region
from polymux.transport.transfer import SourceOrder, SourceState
from polymux.transport.units import MIB, Epoch, TransferId, WorkerId
from polymux.transport.wire import decode, encode

if TYPE_CHECKING:
    from polymux.transport.cuda.region import DeviceRegion, MappedRegion
    from polymux.transport.kv_cuda_ipc import EventRing

log = logging.getLogger(__name__)

_MAX_UNREAD_BYTES = 16 * MIB  # of moves that the sink has not read; its edge is dropped beyond it


@dataclass(slots=True)
class SourceContext:
    """What all edges of one source share. `lock` guards orders and queues; callbacks are called without it."""

    worker_id: WorkerId
    settings: KVSettings
    reactor: Reactor
    grids: Grids[Grid]
    region: Region | DeviceRegion
    followers: tuple[Region | MappedRegion, ...]  # of the other ranks
    on_order: Callable[[OrderRef, Prefill], None]
    on_cancel: Callable[[OrderRef, str], None]
    on_released: Callable[[OrderRef], None]
    faults: Faults | None
    lock: threading.RLock = field(default_factory=threading.RLock)


class SourceEdge:
    """`push`, `push_commit` and `say_failed` come from the engine, with the lock held; all else runs in the reactor's thread."""

    def __init__(
        self,
        context: SourceContext,
        number: int,
        epoch: Epoch,
        sink: Peer,
        sock: socket,
        on_closed: Callable[[SourceEdge], None],
    ) -> None:
        self.number = number
        self.sink = sink
        self.secret = secrets.token_bytes(16)
        self.backend = ""
        self.lost: PolymuxError | None = None
        self.settled = asyncio.Event()  # lost, and every order was released
        self.orders: dict[TransferId, SourceOrder] = {}
        self._context = context
        self._region = context.region
        self._epoch = epoch
        self._on_closed = on_closed
        self._loop = context.reactor.loop
        self._channel = Channel(context.reactor, sock, on_frame=self._receive, on_lost=self.shut, max_pending_bytes=_MAX_UNREAD_BYTES)
        self._sender: Sender | None = None
        self._attached: dict[str, Sender] = {}  # by backend: those that came with a connection of their own
        self._joined: set[PeerKind] = set()  # connections that came
        self._sockets: list[socket] = []  # those that are the fence, by being closed
        self._ring: EventRing | None = None
        self._queue: deque[Push | PushCommit] = deque()
        self._is_scheduled = False
        self._expires_s: dict[TransferId, float] = {}
        self._started_s: dict[TransferId, float] = {}
        self._heartbeat: asyncio.TimerHandle | None = None
        self._moves = MoveMaker(context.worker_id, epoch, sink.epoch, context.grids, context.settings.checksum_every)
        self._counters = EdgeCounters()

    def push(
        self,
        order: SourceOrder,
        layer_lo: int,
        layer_hi: int,
        src_block_ids: Sequence[int],
        first_block: int,
        ready: DeviceEvent | None,
    ) -> None:
        """Queue. Layers that follow one another before the transport gets to them go as one move, once the last is ready."""
        new = Push(order, layer_lo, layer_hi, tuple(src_block_ids), first_block, ready)
        last = self._queue[-1] if self._queue else None
        if isinstance(last, Push) and last.is_continued_by(new):
            last.layer_hi, last.ready = layer_hi, ready
            return
        self._queue.append(new)
        self._schedule()

    def push_commit(self, order: SourceOrder, prefilled: Prefilled) -> None:
        self._queue.append(PushCommit(order, prefilled))
        self._schedule()

    def say_failed(self, order: SourceOrder, error: PolymuxError) -> None:
        self._counters.failed[type(error).__name__] += 1
        self._say(Failed(transfer_id=order.ref.transfer_id, error=report(error)))

    def stats(self) -> EdgeStats:
        pinned = [order.num_blocks * order.layout.block_bytes for order in self.orders.values() if order.layout]
        return self._counters.stats(self.sink.worker_id, self.backend, len(self.orders), sum(pinned))

    def has_joined(self, kind: PeerKind) -> bool:
        return kind in self._joined

    def begin(self, terms: EdgeTerms) -> None:
        self._ring = None if isinstance(self._region, Region) else self._region.rings.take()
        expose(self.secret, (self._region, *self._context.followers), self._ring)
        self._channel.send(encode(terms))
        self._channel.start()

    def attach_data(self, sock: socket) -> None:
        self._joined.add(PeerKind.KV_DATA)
        sender = TcpSender(self._loop, self.shut)
        sender.attach(sock)
        self._attached["tcp"] = sender

    def attach_fence(self, sock: socket, kind: PeerKind) -> EventRing | None:
        """Memory is being handed over; the ring goes with it where it is on a GPU."""
        self._joined.add(kind)
        self._sockets.append(sock)
        return self._ring

    def attach_comm(self, sock: socket, unique_id: bytes) -> None:
        """Join a communicator, and say over this connection whether that worked."""
        from polymux.transport.kv_nccl import attach_nccl  # which needs torch

        region = self._region
        if isinstance(region, Region):
            raise PeerLost("the source's KV is in host memory")
        self._joined.add(PeerKind.KV_NCCL)
        self._sockets.append(sock)
        say = lambda item: self._channel.send(encode(item))  # noqa: E731
        self._attached["nccl"] = attach_nccl(region.mover, self._context.reactor, unique_id, sock, say, self._comm_broken)

    def _comm_broken(self, why: PolymuxError) -> None:
        if self.backend == "nccl":
            self.shut(why)

    def shut(self, why: PolymuxError) -> None:
        """Fence first, then let the engine have its blocks back. Later calls do nothing."""
        with self._context.lock:
            if self.lost is not None:
                return
            self.lost = why
            orders = list(self.orders.values())
            self.orders.clear()
            self._queue.clear()
        self._raise_fence(partial(self._released, orders, why))
        self._channel.close(why)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._on_closed(self)

    def _released(self, orders: list[SourceOrder], why: PolymuxError) -> None:
        """Nothing of the edge is read any more."""
        for order in orders:
            self._counters.failed[type(why).__name__] += order.state is not SourceState.FAILED
            self._release(order, str(why))
        self.settled.set()

    def _raise_fence(self, then: Callable[[], None]) -> None:
        withdraw(self.secret)
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(SHUT_RDWR)
            sock.close()
        self._close_attached()
        if self._sender is not None:
            self._sender.close(then)
        else:
            then()
        if self._ring is not None and not isinstance(self._region, Region):
            self._region.rings.give(self._ring)
            self._ring = None

    def _close_attached(self) -> None:
        """Those that were not chosen."""
        for sender in self._attached.values():
            sender.close(lambda: None)
        self._attached.clear()

    def _receive(self, payload: bytes) -> None:
        message = decode(payload)
        match message:
            case Prefill():
                self._begin_order(message)
            case Ended():
                self._end_order(message)
            case EdgeOpen():
                self._open(message)
            case Ping():
                self._say(Pong())
            case Pong():
                pass
            case _:
                raise WireError(f"a decode worker must not send {type(message).__name__}")

    def _open(self, chosen: EdgeOpen) -> None:
        if self._sender is not None:
            raise WireError("the edge is open already")
        sender = self._sender_for(chosen.backend)
        self._close_attached()
        self.backend = chosen.backend
        self._sender = FaultySender(sender, self._context.faults) if self._context.faults else sender
        log.info("kv.edge_open peer=%s backend=%s reason=%s", self.sink.worker_id, chosen.backend, chosen.reason)

    def _sender_for(self, backend: str) -> Sender:
        def send(item: Move | Commit) -> bool:
            return self._channel.send(encode(item))

        if backend in ("tcp", "nccl"):
            if backend not in self._attached:
                raise WireError(f"backend {backend} without a connection for it")
            return self._attached.pop(backend)
        if backend not in ("local", "shm", "cuda_ipc"):
            raise WireError(f"unknown backend {backend!r}")
        if self._ring is None:
            return PullSender(send, lambda: None)
        from polymux.transport.kv_cuda_ipc import DevicePullSender  # which needs torch

        return DevicePullSender(send, self._ring, lambda: None)

    def _begin_order(self, prefill: Prefill) -> None:
        if self._context.faults:
            self._context.faults.strike("source.receive.prefill")
        grant = prefill.grant
        if self._sender is None:
            raise WireError("an order came before the edge was open")
        if grant.transfer_id in self.orders:
            raise GrantViolation(f"transfer {grant.transfer_id} was ordered twice")
        ref = OrderRef(self.number, grant.transfer_id)
        order = SourceOrder(ref, prefill, len(grant.block_ids) // 4)
        try:
            self._check(prefill, order)
            with self._context.lock:
                self.orders[grant.transfer_id] = order
                self._started_s[grant.transfer_id] = self._loop.time()
                self._expires_s[grant.transfer_id] = self._loop.time() + prefill.deadline_s + self._context.settings.acknowledge_s
            self._context.on_order(ref, prefill)
        except PolymuxError as error:
            with self._context.lock:
                self.orders.pop(grant.transfer_id, None)
                self.say_failed(order, error)
        self._watch()

    def _check(self, prefill: Prefill, order: SourceOrder) -> None:
        grant = prefill.grant
        if (grant.source_epoch, grant.target_epoch) != (self._epoch, self.sink.epoch):
            said, meant = (grant.source_epoch, grant.target_epoch), (self._epoch, self.sink.epoch)
            raise StaleEpoch(f"the grant joins epochs {said}, the edge {meant}")
        if order.num_blocks == 0:
            raise GrantViolation("the grant names no blocks")
        if len(self.orders) >= self._context.settings.max_transfers:
            raise Overloaded(f"{len(self.orders)} orders of {self.sink.worker_id} are outstanding", retry_after_s=1.0)

    def _end_order(self, ended: Ended) -> None:
        if self._context.faults:
            self._context.faults.strike("source.receive.ended")
        assert self._sender is not None
        error = from_report(ended.error) if ended.error else None
        with self._context.lock:
            order = self.orders.get(ended.transfer_id)
            if order is not None and error is None:
                if order.state is not SourceState.COMMITTED:
                    raise WireError(f"the sink committed transfer {ended.transfer_id} before we did")
                self._counters.committed += 1
                self._counters.seconds += self._loop.time() - self._started_s[ended.transfer_id]
            elif order is not None and order.state is not SourceState.FAILED:
                self._counters.failed[type(error).__name__] += 1
            self.orders.pop(ended.transfer_id, None)  # nothing more is pushed for it
        self._sender.forget(ended.transfer_id, partial(self._forgotten, ended, order, error))

    def _forgotten(self, ended: Ended, order: SourceOrder | None, error: PolymuxError | None) -> None:
        """Its source blocks are read no more: let the engine have them, and the sink know."""
        if error is not None:
            self._say(Released(transfer_id=ended.transfer_id))
        if order is not None:
            self._release(order, str(error))

    def _release(self, order: SourceOrder, why: str) -> None:
        with self._context.lock:
            is_active, order.state = order.is_active, SourceState.RELEASED
            self._started_s.pop(order.ref.transfer_id, None)
            self._expires_s.pop(order.ref.transfer_id, None)
        try:
            if is_active:
                self._context.on_cancel(order.ref, why)
            self._context.on_released(order.ref)
        except Exception:  # the engine's mistake must not unsettle the books
            log.exception("kv.release_failed ref=%s", order.ref)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._context.reactor.post(self._drain)

    def _drain(self) -> None:
        try:
            self._send_queued()
        except PolymuxError as error:  # the device's
            self.shut(error)

    def _send_queued(self) -> None:
        with self._context.lock:
            self._is_scheduled = False
            items = list(self._queue)
            self._queue.clear()
        for item in items:
            order = item.order
            has_ended = self.orders.get(order.ref.transfer_id) is not order
            if self.lost is not None or has_ended or order.state is SourceState.FAILED:
                continue
            assert self._sender is not None
            if isinstance(item, PushCommit):
                self._sender.send_commit(self._moves.commit_of(item))
                continue
            for move, grid in self._moves.of(item):
                self._counters.moves += 1
                self._counters.bytes += move.num_bytes
                self._sender.send_move(move, grid, item.ready)

    def _say(self, message: Failed | Released | Ping | Pong) -> None:
        send = partial(self._channel.send, encode(message))
        if self._context.faults:
            step = f"source.send.{type(message).__name__.lower()}"
            self._context.reactor.post(self._context.faults.pass_on, step, send)
        else:
            send()

    def _watch(self) -> None:
        if self._heartbeat is None and self.lost is None:
            now_s = self._loop.time()
            self._heartbeat = self._loop.call_later(self._context.settings.silence_s / 3, self._beat, now_s)

    def _beat(self, since_s: float) -> None:
        """While orders are outstanding: the sink pings, or its edge is fenced; and none outlives its deadline by much."""
        now_s, silence_s = self._loop.time(), self._context.settings.silence_s
        if not self.orders:
            self._heartbeat = None
        elif now_s - max(self._channel.heard_s, since_s) > silence_s:
            self.shut(PeerLost(f"worker {self.sink.worker_id} has been silent for {silence_s:g} s"))
        elif now_s > min(self._expires_s.values()):
            self.shut(PeerLost(f"worker {self.sink.worker_id} let an order's deadline pass without ending it"))
        else:
            self._heartbeat = self._loop.call_later(silence_s / 3, self._beat, since_s)
