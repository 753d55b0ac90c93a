"""The prefill worker's end of KV migration: orders in, layers out, source blocks pinned until nobody reads them."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from itertools import count
from socket import socket
from typing import TYPE_CHECKING

from polymux.transport.descriptors import listen_abstract, send_fd
from polymux.transport.errors import GrantViolation, LayoutMismatch, PeerLost, PolymuxError, StaleEpoch, WireError
from polymux.transport.frames import frame
from polymux.transport.handshake import Introduction
from polymux.transport.kv_backend import DeviceEvent
from polymux.transport.kv_choice import offered
from polymux.transport.kv_fault import Faults
from polymux.transport.kv_source_edge import SourceContext, SourceEdge
from polymux.transport.kv_types import EdgeHistory, EdgeStats, KVSettings, OrderRef
from polymux.transport.messages import KVLayout, Peer, Prefill, Prefilled
from polymux.transport.protocol import EdgeOffer, EdgeTerms, JoinComm, JoinEdge, PeerKind
from polymux.transport.reactor import all_set
from polymux.transport.region import Region
from polymux.transport.sockets import tune
from polymux.transport.stream import WorkerServer
from polymux.transport.transfer import SourceOrder, SourceState
from polymux.transport.units import Epoch, WorkerId
from polymux.transport.wire import decode_as, encode

if TYPE_CHECKING:
    from polymux.transport.cuda.region import DeviceRegion, MappedRegion
    from polymux.transport.kv_cuda_ipc import EventRing

log = logging.getLogger(__name__)


class KVSource:
    """Answers decode workers through the worker's `server`. Methods may be called from any thread and return at once.

    `followers`: the regions of an instance's other ranks, mapped here.

    `on_order(ref, prefill)`: a new order; `accept` it before the first push. A PolymuxError that it raises refuses the order, which then
    gets no `on_released`. `on_cancel(ref, reason)`: the other side has ended it (or the edge is lost): stop computing.
    `on_released(ref)`: always last and exactly once: the transport reads the source blocks no more.
    """

    def __init__(
        self,
        *,
        server: WorkerServer,
        region: Region | DeviceRegion,
        followers: Sequence[Region | MappedRegion] = (),
        host_id: str,
        on_order: Callable[[OrderRef, Prefill], None],
        on_cancel: Callable[[OrderRef, str], None],
        on_released: Callable[[OrderRef], None],
        settings: KVSettings | None = None,
        faults: Faults | None = None,
    ) -> None:
        self._server = server
        self._region = region
        self._followers = tuple(followers)
        self._host_id = host_id
        self._settings = settings or KVSettings()
        self._context = SourceContext(
            server.worker_id,
            self._settings,
            server.reactor,
            region.grids(followers),
            region,
            self._followers,
            on_order,
            on_cancel,
            on_released,
            faults,
        )
        self._lock = self._context.lock
        self._edges: dict[int, SourceEdge] = {}
        self._history = EdgeHistory()
        self._unsettled: set[SourceEdge] = set()
        self._numbers = count(1)
        self._listener: socket | None = None
        self._unix_name = ""
        if isinstance(region, Region) and region.fd is not None:
            self._listener, self._unix_name = listen_abstract("kv")
            self._listener.setblocking(False)
            server.reactor.post(server.reactor.loop.add_reader, self._listener, self._accept)
        self._device = region.terms()
        for kind in (PeerKind.DECODE, PeerKind.KV_DATA, PeerKind.KV_REGION, PeerKind.KV_CUDA_IPC, PeerKind.KV_NCCL):
            server.plug(kind, self)

    def accept(self, ref: OrderRef, layout: KVLayout) -> None:
        """Say in which layout the source blocks lie. Raises LayoutMismatch, after failing the order, when the grant's differs."""
        with self._lock:
            order = self._find(ref)
            if order is None:
                return
            try:
                order.accept(layout)
            except LayoutMismatch as error:
                self.fail(ref, error)
                raise

    def push(
        self,
        ref: OrderRef,
        layer_lo: int,
        layer_hi: int,
        src_block_ids: Sequence[int],
        first_block: int,
        ready: DeviceEvent | None = None,
    ) -> bool:
        """Layers [layer_lo, layer_hi) of these source blocks are final: move them to the granted blocks from number `first_block` on.

        Every (layer, block) is pushed exactly once, so a block only once it is full, or when the last chunk has filled it as far as it
        goes: after a chunk that ends at token t push blocks [pushed so far, t // block_size), after the last chunk also the partial one.
        On a GPU they are final only after `ready`: an event that is recorded already, and no later than that of the next push. Without
        one it is taken here, on the calling thread's current stream.
        No ids: nothing happens. False when the order has ended meanwhile (ignored). Raises GrantViolation for layers or blocks
        outside the order, out of the region, or pushed before.
        """
        with self._lock:
            order = self._find(ref)
            if order is None:
                return False
            if len(src_block_ids):
                ready = self._region.mark() if ready is None else ready
                order.push(layer_lo, layer_hi, src_block_ids, first_block, self._region.nbytes)
                self._edges[ref.edge].push(order, layer_lo, layer_hi, src_block_ids, first_block, ready)
            return True

    def commit(self, ref: OrderRef, prefilled: Prefilled) -> bool:
        """All was pushed; the sink may commit. False when the order has ended meanwhile. Raises GrantViolation if something is missing."""
        with self._lock:
            order = self._find(ref)
            if order is None:
                return False
            if prefilled.sequence_id != order.prefill.sequence_id:
                raise GrantViolation(f"sequence {prefilled.sequence_id} commits the order of {order.prefill.sequence_id}")
            order.commit()
            self._edges[ref.edge].push_commit(order, prefilled)
            return True

    def fail(self, ref: OrderRef, error: PolymuxError) -> bool:
        """The prefill failed; the sink gets KVFailed(error). False when the order has ended meanwhile."""
        with self._lock:
            order = self._find(ref)
            if order is None:
                return False
            order.state = SourceState.FAILED
            self._edges[ref.edge].say_failed(order, error)
            return True

    def snapshot(self) -> tuple[EdgeStats, ...]:
        with self._lock:
            return self._history.with_live(edge.stats() for edge in self._edges.values())

    def close(self) -> None:
        """Fence every edge; outstanding orders are cancelled and released before this returns. May be called twice."""
        reactor = self._server.reactor
        if not reactor.loop.is_closed():
            reactor.run(self._shut())

    async def _shut(self) -> None:
        edges = list(self._edges.values())
        self.stop()
        await all_set([edge.settled for edge in {*edges, *self._unsettled}], self._settings.acknowledge_s, "source")

    def _find(self, ref: OrderRef) -> SourceOrder | None:
        edge = self._edges.get(ref.edge)
        order = edge.orders.get(ref.transfer_id) if edge else None
        return order if order is not None and order.is_active else None

    # The acceptor of decode workers; in the reactor's thread.

    def decide(self, intro: Introduction) -> bytes:
        if intro.kind is PeerKind.DECODE:
            self._check_offer(intro)
        else:
            edge = self._joined(intro)
            if edge.has_joined(intro.kind):
                raise WireError(f"edge {edge.number} has its {intro.kind} connection already")
        return b""

    def install(self, intro: Introduction, sock: socket) -> None:
        try:
            if intro.kind is PeerKind.DECODE:
                self._open_edge(decode_as(EdgeOffer, intro.body), sock)
                return
            edge = self._joined(intro)
            if intro.kind is PeerKind.KV_DATA:
                edge.attach_data(sock)
            elif intro.kind is PeerKind.KV_NCCL:
                edge.attach_comm(sock, decode_as(JoinComm, intro.body).unique_id)
            else:
                self._hand_over(sock, edge.attach_fence(sock, intro.kind))
        except (PolymuxError, OSError) as error:
            log.info("kv.join_failed peer=%s error=%s", intro.peer_id, error)
            sock.close()

    def stop(self) -> None:
        """The server stops, or we do."""
        if self._listener is not None:
            self._server.reactor.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for edge in list(self._edges.values()):
            edge.shut(PeerLost("the prefill worker stops"))
        self._context.grids.close()
        self._context.followers = self._followers = ()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        tune(sock)
        self._server.greet(sock)

    def _check_offer(self, intro: Introduction) -> None:
        sink = decode_as(EdgeOffer, intro.body).sink
        if sink.worker_id != intro.peer_id:
            raise WireError(f"peer {intro.peer_id} offers an edge of {sink.worker_id}")
        newest = max((edge.sink.epoch for edge in self._edges_of(sink.worker_id)), default=sink.epoch)
        if sink.epoch < newest:
            raise StaleEpoch(f"worker {sink.worker_id} has epoch {newest}; {sink.epoch} is gone")

    def _edges_of(self, worker_id: WorkerId) -> list[SourceEdge]:
        return [edge for edge in self._edges.values() if edge.sink.worker_id == worker_id]

    def _joined(self, intro: Introduction) -> SourceEdge:
        is_comm = intro.kind is PeerKind.KV_NCCL
        join = decode_as(JoinComm, intro.body) if is_comm else decode_as(JoinEdge, intro.body)
        edge = self._edges.get(join.edge)
        if edge is None or not secrets.compare_digest(edge.secret, join.secret):
            raise PeerLost(f"edge {join.edge} does not exist any more")
        return edge

    def _open_edge(self, offer: EdgeOffer, sock: socket) -> None:
        for older in self._edges_of(offer.sink.worker_id):
            older.shut(PeerLost(f"worker {offer.sink.worker_id} connected anew"))
        epoch = self._server.epoch
        assert epoch is not None  # the handshake compared it
        edge = SourceEdge(self._context, next(self._numbers), epoch, offer.sink, sock, self._forget)
        with self._lock:
            self._edges[edge.number] = edge
        edge.begin(self._terms(edge, epoch))

    def _terms(self, edge: SourceEdge, epoch: Epoch) -> EdgeTerms:
        identity = Peer(worker_id=self._server.worker_id, epoch=epoch, address="", host_id=self._host_id)
        return EdgeTerms(
            edge=edge.number,
            secret=edge.secret,
            source=identity,
            region_bytes=self._region.nbytes,
            backends=offered(self._settings.backend, self._device, has_descriptor=bool(self._unix_name)),
            unix_name=self._unix_name,
            num_ranks=1 + len(self._followers),
            device=self._device,
        )

    def _hand_over(self, sock: socket, ring: EventRing | None) -> None:
        if not isinstance(self._region, Region):
            from polymux.transport.kv_cuda_ipc import export  # which needs torch

            assert ring is not None
            sock.send(frame(encode(export(self._region, self._followers, ring))))  # a few kilobytes into an empty buffer
            return
        for region in (self._region, *self._followers):
            assert isinstance(region, Region)
            fd = region.read_only_fd()
            try:
                send_fd(sock, fd)
            finally:
                os.close(fd)

    def _forget(self, edge: SourceEdge) -> None:
        log.info("kv.edge_lost peer=%s backend=%s why=%s", edge.sink.worker_id, edge.backend, edge.lost)
        with self._lock:
            self._history.add(edge.stats())
            del self._edges[edge.number]
        self._unsettled = {one for one in (*self._unsettled, edge) if not one.settled.is_set()}
