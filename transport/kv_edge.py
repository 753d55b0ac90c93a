"""One decode-prefill pair, as the decode side sees it: orders out, moves in, every transfer to its one end."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from socket import socket

from polymux.transport.channel import Channel
from polymux.transport.errors import (
    Cancelled,
    PeerLost,
    PolymuxError,
    StaleEpoch,
    TransferError,
    TransferTimeout,
    WireError,
)
from polymux.transport.handshake import from_report, report
from polymux.transport.kv_backend import Receiver
from polymux.transport.kv_fault import Faults
from polymux.transport.kv_types import EdgeCounters, EdgeStats, KVCommitted, KVEvent, KVFailed, KVQuiesced, KVSettings
from polymux.transport.messages import KVLayout, Peer, Prefill
from polymux.transport.protocol import Commit, EdgeOpen, Ended, Failed, Move, Ping, Pong, Released
from polymux.transport.reactor import Reactor
from polymux.transport.region import BlockGrid, Grid, Grids
from polymux.transport.transfer import SinkLedger, SinkTransfer
from polymux.transport.units import MIB, TransferId
from polymux.transport.wire import decode, encode

_MAX_ORDER_BYTES = 16 * MIB  # unread by the peer; its edge is dropped beyond it


@dataclass(slots=True)
class SinkContext:
    """What all edges of one sink share. `lock` guards the ledger and each edge's state; callbacks are called without it."""

    identity: Peer
    settings: KVSettings
    reactor: Reactor
    ledger: SinkLedger
    grids: Grids[Grid]
    emit: Callable[[KVEvent], None]
    faults: Faults | None
    lock: threading.RLock = field(default_factory=threading.RLock)


class KVEdge:
    """One decode-prefill pair. Made by `KVSink.open`; every public method may be called from any thread and returns at once."""

    def __init__(self, context: SinkContext, number: int, peer: Peer, on_closed: Callable[[KVEdge], None]) -> None:
        self.peer = peer
        self.number = number
        self.backend = ""  # one of BACKENDS, once open
        self.reason = ""  # why that one
        self.ready = threading.Event()  # open, or lost
        self.lost: PolymuxError | None = None
        self.settled = asyncio.Event()  # lost, and nothing of it is written or granted any more
        self._context = context
        self._on_closed = on_closed
        self._loop = context.reactor.loop
        self._channel: Channel | None = None
        self._receiver: Receiver | None = None
        self._waiting: dict[TransferId, Prefill] = {}  # ordered before the edge was open
        self._timers: dict[TransferId, asyncio.TimerHandle] = {}  # deadlines of live transfers
        self._confirmations: dict[TransferId, asyncio.TimerHandle] = {}  # of the peer, for ended ones
        self._cancelled: dict[TransferId, tuple[SinkTransfer, PolymuxError]] = {}  # and not yet reported
        self._started_s: dict[TransferId, float] = {}
        self._heartbeat: asyncio.TimerHandle | None = None
        self._counters = EdgeCounters()

    @property
    def is_open(self) -> bool:
        """Connected and negotiated. False before, and for good after the edge was lost: `KVSink.open` then makes a new one."""
        return self._channel is not None and self.lost is None

    def order(self, prefill: Prefill, layout: KVLayout) -> None:
        """Send the command with its grant; from here on the granted blocks are the transfer's until its last event.

        `prefill.grant.block_ids` are blocks of `layout` in this sink's region; exactly those blocks must be filled for a
        commit. `prefill.deadline_s` from now it fails with TransferTimeout. Works while the edge is still connecting: the order waits, and
        fails with PeerLost if there is no connection. Raises, and then nothing was granted: Overloaded (bounded queue full),
        GrantViolation (empty, duplicate, out of range, or overlapping a live grant), LayoutMismatch, StaleEpoch, TransferTimeout (the
        deadline has passed already), PeerLost (edge is lost), WireError (too large).
        """
        if prefill.deadline_s <= 0:
            raise TransferTimeout(f"sequence {prefill.sequence_id}: its deadline has passed")
        encode(prefill)
        with self._context.lock:
            if self.lost is not None:
                raise PeerLost(f"the edge to worker {self.peer.worker_id} is lost: {self.lost}")
            transfer = self._context.ledger.grant(self.number, prefill, layout)
            self._started_s[transfer.transfer_id] = self._loop.time()
            if self.is_open:
                self._say(prefill)
            else:
                self._waiting[transfer.transfer_id] = prefill
        self._context.reactor.post(self._watch, transfer, prefill.deadline_s)

    def cancel(self, transfer_id: TransferId, reason: str) -> bool:
        """End a transfer: KVFailed(Cancelled), then KVQuiesced. False when it had ended already."""
        with self._context.lock:
            transfer = self._context.ledger.find(self.number, transfer_id)
            if transfer is None or not self._context.ledger.fail(transfer):
                return False
            self._cancelled[transfer_id] = (transfer, Cancelled(reason))
        self._context.reactor.post(self._after_cancel, transfer_id)
        return True

    def close(self) -> None:
        """Give the edge up; what is outstanding fails with PeerLost."""
        self._context.reactor.post(self.shut, PeerLost("the edge was closed on this side"))

    def stats(self) -> EdgeStats:
        with self._context.lock:
            ledger = self._context.ledger
            if self.lost is None:
                self._counters.stale_moves = ledger.num_stale(self.number)
            num, num_bytes = len(ledger.transfers(self.number)), ledger.bytes_outstanding(self.number)
            return self._counters.stats(self.peer.worker_id, self.backend, num, num_bytes)

    # From here on: in the reactor's thread only.

    def begin(self, sock: socket, receiver: Receiver, reason: str) -> None:
        """The edge is negotiated; orders that waited go out."""
        channel = Channel(self._context.reactor, sock, on_frame=self._receive, on_lost=self.shut, max_pending_bytes=_MAX_ORDER_BYTES)
        with self._context.lock:
            self._channel, self._receiver = channel, receiver
            self.backend, self.reason = receiver.name, reason
            channel.send(encode(EdgeOpen(backend=receiver.name.removeprefix("fault+"), reason=reason)))
            for prefill in self._waiting.values():
                self._say(prefill)
            self._waiting.clear()
        channel.start()
        self.ready.set()

    def shut(self, why: PolymuxError) -> None:
        """The edge is lost: nothing comes through it any more, so everything on it fails and quiesces. Later calls do nothing."""
        with self._context.lock:
            if self.lost is not None:
                return
            self.lost = why
            self._counters.stale_moves = self._context.ledger.num_stale(self.number)
        if self._receiver is not None:
            self._receiver.close()
        if self._channel is not None:
            self._channel.close(why)
        for timer in [*self._confirmations.values(), *([self._heartbeat] if self._heartbeat else [])]:
            timer.cancel()
        error = why if isinstance(why, TransferError) else PeerLost(f"the edge to worker {self.peer.worker_id} is lost: {why}")
        for transfer_id in list(self._cancelled):
            self._after_cancel(transfer_id)
        for transfer in self._context.ledger.transfers(self.number):
            self._fail(transfer, error)
        for transfer in self._context.ledger.transfers(self.number):
            if not self._is_writing(transfer.transfer_id):
                self._quiesce(transfer)
        self._on_closed(self)
        self.ready.set()
        self._settle()

    def _settle(self) -> None:
        """A lost edge's last transfer is quiet: its books close."""
        if self.lost is not None and not self.settled.is_set() and not self._context.ledger.transfers(self.number):
            with self._context.lock:
                self._context.ledger.close_edge(self.number)
            self.settled.set()

    def quiet(self, transfer_id: TransferId) -> None:
        with self._context.lock:
            transfer = self._context.ledger.find(self.number, transfer_id)
            is_reported = transfer_id not in self._cancelled  # else `_after_cancel` is still to come, and finds it quiet
        if transfer is not None and not transfer.is_live and is_reported:
            self._quiesce(transfer)
            self._settle()

    def _is_writing(self, transfer_id: TransferId) -> bool:
        return self._receiver is not None and self._receiver.is_writing(transfer_id)

    def broken(self, why: Exception) -> None:
        self.shut(why if isinstance(why, PolymuxError) else PolymuxError(str(why)))

    def admit(self, move: Move) -> SinkTransfer | None:
        if self._context.faults:
            self._context.faults.strike("sink.receive.move")
        with self._context.lock:
            transfer = self._context.ledger.admit(self.number, move)
            if transfer is not None and transfer.began_s is None:
                transfer.began_s = self._loop.time()
            return transfer

    def target(self, transfer: SinkTransfer) -> Grid:
        return self._context.grids.of(transfer.layout)

    def landed(self, transfer: SinkTransfer, move: Move, crc32: int | None = None) -> None:
        grid = self.target(transfer)
        if self._context.faults and isinstance(grid, BlockGrid):
            block_id = transfer.block_ids[move.first_block]
            self._context.faults.damage("sink.land.move", grid.view(block_id, move.layer_lo, move.layer_hi))
        if move.num_checked_blocks and crc32 is None:
            assert isinstance(grid, BlockGrid)
            crc32 = _checksum(grid, transfer, move)
        if move.num_checked_blocks and crc32 != move.crc32:
            self._check_fence()
            self._fail(transfer, TransferError(f"move {move.seq} arrived damaged: its checksum differs"))
            return
        with self._context.lock:
            if not transfer.is_live:
                return
            self._context.ledger.land(transfer, move)
            self._counters.moves += 1
            self._counters.bytes += move.num_bytes

    def commit(self, commit: Commit) -> None:
        if self._context.faults:
            self._context.faults.strike("sink.receive.commit")
        self._check_fence()
        try:
            with self._context.lock:
                transfer = self._context.ledger.commit(self.number, commit)
                if transfer is None:
                    return
                self._counters.committed += 1
                now_s = self._loop.time()
                self._counters.seconds += now_s - self._started_s.pop(transfer.transfer_id)
        except StaleEpoch:
            raise  # the peer is not who we took it for: no use going on with this edge
        except TransferError as error:
            refused = self._context.ledger.find(self.number, commit.transfer_id)
            assert refused is not None
            self._fail(refused, error)
            return
        self._stop_timer(transfer)
        self._context.emit(
            KVCommitted(
                transfer_id=transfer.transfer_id,
                sequence_id=transfer.sequence_id,
                prefilled=commit.prefilled,
                began_s=now_s if transfer.began_s is None else transfer.began_s,
                ended_s=now_s,
            )
        )
        self._say(Ended(transfer_id=transfer.transfer_id, error=None))

    def _check_fence(self) -> None:
        """Raise PeerLost when the source has closed the edge: then its blocks may have been re-used before we copied them."""
        assert self._receiver is not None
        if self._receiver.is_fenced():
            raise PeerLost(f"worker {self.peer.worker_id} has closed the edge")

    def _receive(self, payload: bytes) -> None:
        message = decode(payload)
        match message:
            case Move() | Commit():
                assert self._receiver is not None
                self._receiver.take(message)
            case Failed():
                transfer = self._context.ledger.find(self.number, message.transfer_id)
                if transfer is not None:
                    self._fail(transfer, from_report(message.error))
            case Released():
                self._confirmed(message.transfer_id)
            case Ping():
                self._say(Pong())
            case Pong():
                pass
            case _:
                raise WireError(f"a prefill worker must not send {type(message).__name__}")

    def _say(self, message: Prefill | Ended | Ping | Pong) -> None:
        assert self._channel is not None
        send = partial(self._channel.send, encode(message))
        if self._context.faults:
            step = f"sink.send.{type(message).__name__.lower()}"
            self._context.reactor.post(self._context.faults.pass_on, step, send)
        else:
            send()

    def _watch(self, transfer: SinkTransfer, deadline_s: float) -> None:
        if not transfer.is_live:
            return
        self._timers[transfer.transfer_id] = self._loop.call_later(deadline_s, self._expire, transfer, deadline_s)
        if self._heartbeat is None:
            self._heartbeat = self._loop.call_later(self._context.settings.silence_s / 3, self._beat, self._loop.time())

    def _expire(self, transfer: SinkTransfer, deadline_s: float) -> None:
        done = f"{transfer.coverage.num_missing} of {transfer.coverage.num_layers * transfer.coverage.num_blocks} layers of blocks missing"
        self._fail(transfer, TransferTimeout(f"transfer {transfer.transfer_id} was not committed within {deadline_s:g} s: {done}"))

    def _beat(self, since_s: float) -> None:
        """While something is outstanding: ask for a sign of life, and end the edge where there is none."""
        silence_s = self._context.settings.silence_s
        if self._channel is not None:
            if self._loop.time() - max(self._channel.heard_s, since_s) > silence_s:
                self.shut(PeerLost(f"worker {self.peer.worker_id} has been silent for {silence_s:g} s"))
                return
            self._say(Ping())
        is_busy = bool(self._confirmations or self._context.ledger.transfers(self.number))
        self._heartbeat = self._loop.call_later(silence_s / 3, self._beat, since_s) if is_busy else None

    def _fail(self, transfer: SinkTransfer, error: PolymuxError) -> None:
        with self._context.lock:
            if not self._context.ledger.fail(transfer):
                return
        self._after_failure(transfer, error)

    def _after_cancel(self, transfer_id: TransferId) -> None:
        cancelled = self._cancelled.pop(transfer_id, None)
        if cancelled is not None:
            self._after_failure(*cancelled)

    def _after_failure(self, transfer: SinkTransfer, error: PolymuxError) -> None:
        transfer_id = transfer.transfer_id
        with self._context.lock:
            self._counters.failed[type(error).__name__] += 1
            self._started_s.pop(transfer_id, None)
            is_unsent = self._waiting.pop(transfer_id, None) is not None
        self._stop_timer(transfer)
        self._context.emit(KVFailed(transfer_id=transfer_id, sequence_id=transfer.sequence_id, error=error))
        if is_unsent or self._receiver is None or self._receiver.abandon(transfer_id):
            self._quiesce(transfer)
        if self.is_open and not is_unsent:
            overdue = PeerLost(f"worker {self.peer.worker_id} did not confirm the end of transfer {transfer_id}")
            self._confirmations[transfer_id] = self._loop.call_later(self._context.settings.acknowledge_s, self.shut, overdue)
            self._say(Ended(transfer_id=transfer_id, error=report(error)))

    def _confirmed(self, transfer_id: TransferId) -> None:
        timer = self._confirmations.pop(transfer_id, None)
        if timer is not None:
            timer.cancel()
        transfer = self._context.ledger.find(self.number, transfer_id)
        if transfer is not None and not transfer.is_live and not self._is_writing(transfer_id):
            self._quiesce(transfer)

    def _quiesce(self, transfer: SinkTransfer) -> None:
        with self._context.lock:
            self._context.ledger.quiesce(transfer)
        self._context.emit(KVQuiesced(transfer_id=transfer.transfer_id))

    def _stop_timer(self, transfer: SinkTransfer) -> None:
        timer = self._timers.pop(transfer.transfer_id, None)
        if timer is not None:
            timer.cancel()


def _checksum(grid: BlockGrid, transfer: SinkTransfer, move: Move) -> int:
    crc = 0
    for block_id in transfer.block_ids[move.first_block : move.first_block + move.num_checked_blocks]:
        for view in grid.views(block_id, move.layer_lo, move.layer_hi):
            crc = zlib.crc32(view, crc)
    return crc
