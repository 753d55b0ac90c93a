"""One decode-prefill pair, as the prefill side sees it: orders in, moves out, source blocks released once each."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from socket import SHUT_RDWR, socket

from polymux.transport.channel import Channel
from polymux.transport.errors import GrantViolation, Overloaded, PeerLost, PolymuxError, StaleEpoch, WireError
from polymux.transport.handshake import from_report, report
from polymux.transport.kv_backend import Sender
from polymux.transport.kv_fault import Faults, FaultySender
from polymux.transport.kv_local import expose, withdraw
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
from polymux.transport.region import BlockGrid, Grids
from polymux.transport.transfer import SourceOrder, SourceState
from polymux.transport.units import KIB, MIB, Epoch, TransferId, WorkerId, pack_ids
from polymux.transport.wire import MAX_BULK_BYTES, decode, encode

log = logging.getLogger(__name__)

_MAX_UNREAD_BYTES = 16 * MIB  # of moves that the sink has not read; its edge is dropped beyond it
_SAMPLE_BYTES = 256 * KIB  # of a move, where only some moves are checked


@dataclass(slots=True)
class SourceContext:
    """What all edges of one source share. `lock` guards orders and queues; callbacks are called without it."""

    worker_id: WorkerId
    settings: KVSettings
    reactor: Reactor
    grids: Grids
    buffers: tuple[memoryview, ...]  # of each rank
    on_order: Callable[[OrderRef, Prefill], None]
    on_cancel: Callable[[OrderRef, str], None]
    on_released: Callable[[OrderRef], None]
    faults: Faults | None
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass(slots=True)
class _Push:
    order: SourceOrder
    layer_lo: int
    layer_hi: int
    src_block_ids: tuple[int, ...]
    first_block: int

    def is_continued_by(self, other: _Push) -> bool:
        """The same blocks' next layers."""
        return (self.order, self.layer_hi, self.src_block_ids, self.first_block) == (
            other.order,
            other.layer_lo,
            other.src_block_ids,
            other.first_block,
        )


@dataclass(slots=True)
class _PushCommit:
    order: SourceOrder
    prefilled: Prefilled


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
        self.orders: dict[TransferId, SourceOrder] = {}
        self._context = context
        self._epoch = epoch
        self._on_closed = on_closed
        self._loop = context.reactor.loop
        self._channel = Channel(context.reactor, sock, on_frame=self._receive, on_lost=self.shut, max_pending_bytes=_MAX_UNREAD_BYTES)
        self._sender: Sender | None = None
        self._tcp: TcpSender | None = None
        self._fence: socket | None = None
        self._queue: deque[_Push | _PushCommit] = deque()
        self._is_scheduled = False
        self._expires_s: dict[TransferId, float] = {}
        self._started_s: dict[TransferId, float] = {}
        self._heartbeat: asyncio.TimerHandle | None = None
        self._num_moves = 0
        self._counters = EdgeCounters()

    def push(self, order: SourceOrder, layer_lo: int, layer_hi: int, src_block_ids: Sequence[int], first_block: int) -> None:
        """Queue. Layers that follow one another before the transport gets to them go as one move."""
        new = _Push(order, layer_lo, layer_hi, tuple(src_block_ids), first_block)
        last = self._queue[-1] if self._queue else None
        if isinstance(last, _Push) and last.is_continued_by(new):
            last.layer_hi = layer_hi
            return
        self._queue.append(new)
        self._schedule()

    def push_commit(self, order: SourceOrder, prefilled: Prefilled) -> None:
        self._queue.append(_PushCommit(order, prefilled))
        self._schedule()

    def say_failed(self, order: SourceOrder, error: PolymuxError) -> None:
        self._counters.failed[type(error).__name__] += 1
        self._say(Failed(transfer_id=order.ref.transfer_id, error=report(error)))

    def stats(self) -> EdgeStats:
        pinned = [order.num_blocks * order.layout.block_bytes for order in self.orders.values() if order.layout]
        return self._counters.stats(self.sink.worker_id, self.backend, len(self.orders), sum(pinned))

    def has_joined(self, kind: PeerKind) -> bool:
        return (self._tcp if kind is PeerKind.KV_DATA else self._fence) is not None

    def begin(self, terms: EdgeTerms) -> None:
        expose(self.secret, self._context.buffers)
        self._channel.send(encode(terms))
        self._channel.start()

    def attach_data(self, sock: socket) -> None:
        self._tcp = TcpSender(self._loop, self.shut)
        self._tcp.attach(sock)

    def attach_fence(self, sock: socket) -> None:
        self._fence = sock

    def shut(self, why: PolymuxError) -> None:
        """Fence first, then let the engine have its blocks back. Later calls do nothing."""
        with self._context.lock:
            if self.lost is not None:
                return
            self.lost = why
            orders = list(self.orders.values())
            self.orders.clear()
            self._queue.clear()
        self._raise_fence()
        self._channel.close(why)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        for order in orders:
            self._counters.failed[type(why).__name__] += order.state is not SourceState.FAILED
            self._release(order, str(why))
        self._on_closed(self)

    def _raise_fence(self) -> None:
        withdraw(self.secret)
        if self._fence is not None:
            with suppress(OSError):
                self._fence.shutdown(SHUT_RDWR)
            self._fence.close()
        for sender in (self._sender, self._tcp):
            if sender is not None:
                sender.close()

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
        sender: Sender
        if chosen.backend == "tcp":
            if self._tcp is None:
                raise WireError("backend tcp without a data connection")
            sender = self._tcp
        elif chosen.backend in ("local", "shm"):
            sender = PullSender(lambda item: self._channel.send(encode(item)), lambda: None)
        else:
            raise WireError(f"unknown backend {chosen.backend!r}")
        self.backend = chosen.backend
        self._sender = FaultySender(sender, self._context.faults) if self._context.faults else sender
        log.info("kv.edge_open peer=%s backend=%s reason=%s", self.sink.worker_id, chosen.backend, chosen.reason)

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
        self._sender.forget(ended.transfer_id)
        with self._context.lock:
            order = self.orders.pop(ended.transfer_id, None)
            error = from_report(ended.error) if ended.error else None
            if order is not None and error is None:
                if order.state is not SourceState.COMMITTED:
                    raise WireError(f"the sink committed transfer {ended.transfer_id} before we did")
                self._counters.committed += 1
                self._counters.seconds += self._loop.time() - self._started_s[ended.transfer_id]
            elif order is not None and order.state is not SourceState.FAILED:
                self._counters.failed[type(error).__name__] += 1
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
        with self._context.lock:
            self._is_scheduled = False
            items = list(self._queue)
            self._queue.clear()
        for item in items:
            order = item.order
            if self.lost is not None or order.state in (SourceState.FAILED, SourceState.RELEASED):
                continue
            assert self._sender is not None
            if isinstance(item, _PushCommit):
                self._sender.send_commit(self._commit_of(order, item.prefilled))
            else:
                self._send_push(item)

    def _commit_of(self, order: SourceOrder, prefilled: Prefilled) -> Commit:
        assert order.layout is not None
        grant = order.prefill.grant
        return Commit(
            transfer_id=grant.transfer_id,
            sequence_id=order.prefill.sequence_id,
            source_id=self._context.worker_id,
            source_epoch=self._epoch,
            target_epoch=grant.target_epoch,
            layout_hash=order.layout.layout_hash,
            num_layers=order.layout.num_layers,
            num_blocks=order.num_blocks,
            prefilled=prefilled,
        )

    def _send_push(self, push: _Push) -> None:
        """As moves that are not too large."""
        assert push.order.layout is not None and self._sender is not None
        layout, ids = push.order.layout, push.src_block_ids
        row_bytes = (push.layer_hi - push.layer_lo) * layout.moved_layer_bytes
        per_move = max(MAX_BULK_BYTES // row_bytes, 1)
        grid = self._context.grids.of(layout)
        for start in range(0, len(ids), per_move):
            some = ids[start : start + per_move]
            num_checked, crc = self._checksum(grid, some, push.layer_lo, push.layer_hi)
            move = Move(
                seq=0,
                transfer_id=push.order.ref.transfer_id,
                source_epoch=self._epoch,
                target_epoch=self.sink.epoch,
                layer_lo=push.layer_lo,
                layer_hi=push.layer_hi,
                first_block=push.first_block + start,
                src_block_ids=pack_ids(some),
                num_bytes=len(some) * row_bytes,
                num_checked_blocks=num_checked,
                crc32=crc,
            )
            self._counters.moves += 1
            self._counters.bytes += move.num_bytes
            self._sender.send_move(move, grid)

    def _checksum(self, grid: BlockGrid, block_ids: Sequence[int], layer_lo: int, layer_hi: int) -> tuple[int, int]:
        every = self._context.settings.checksum_every
        self._num_moves += 1
        if not every or (self._num_moves - 1) % every:
            return 0, 0
        row_bytes = (layer_hi - layer_lo) * grid.layout.moved_layer_bytes
        num_checked = len(block_ids) if every == 1 else min(len(block_ids), max(_SAMPLE_BYTES // row_bytes, 1))
        crc = 0
        for block_id in block_ids[:num_checked]:
            for view in grid.views(block_id, layer_lo, layer_hi):
                crc = zlib.crc32(view, crc)
        return num_checked, crc

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
