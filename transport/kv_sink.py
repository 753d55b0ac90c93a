"""The decode worker's end of KV migration: it dials prefill workers, and agrees with each on how the bytes will go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from socket import socket
from typing import TYPE_CHECKING

from polymux.transport.errors import NcclError, PeerLost, PolymuxError, ProtocolMismatch, StaleEpoch, TransferTimeout
from polymux.transport.frames import drive_async, read_frame
from polymux.transport.handshake import Introduction, check_token
from polymux.transport.kv_backend import Receiver
from polymux.transport.kv_choice import RecentFailures, Side, to_try, why_not
from polymux.transport.kv_edge import KVEdge, SinkContext
from polymux.transport.kv_fault import Faults, FaultyReceiver
from polymux.transport.kv_local import open_local
from polymux.transport.kv_shm import open_shm
from polymux.transport.kv_tcp import TcpReceiver
from polymux.transport.kv_types import EdgeHistory, EdgeStats, KVEvent, KVSettings
from polymux.transport.messages import EdgeReport, Peer
from polymux.transport.protocol import EdgeOffer, EdgeTerms, JoinComm, JoinEdge, PeerKind
from polymux.transport.reactor import Reactor, all_set
from polymux.transport.region import Region
from polymux.transport.sockets import dial_tcp
from polymux.transport.transfer import SinkLedger
from polymux.transport.units import TransferId, WorkerId
from polymux.transport.wire import decode_as, encode

if TYPE_CHECKING:
    from polymux.transport.cuda.region import DeviceRegion, MappedRegion

log = logging.getLogger(__name__)


class KVSink:
    """All edges of one decode worker. `identity` carries its epoch; `token` is the cluster's shared secret.

    `followers`: the regions of an instance's other ranks, mapped here; granted blocks are those of that id in every one of them.
    """

    def __init__(
        self,
        *,
        region: Region | DeviceRegion,
        followers: Sequence[Region | MappedRegion] = (),
        identity: Peer,
        token: str,
        on_event: Callable[[KVEvent], None],
        settings: KVSettings | None = None,
        reactor: Reactor | None = None,
        faults: Faults | None = None,
    ) -> None:
        check_token(token)
        self._token = token
        self._on_event = on_event
        self._settings = settings or KVSettings()
        self._reactor = reactor or Reactor(f"polymux-{identity.worker_id}-kv")
        self._owns_reactor = reactor is None
        ledger = SinkLedger(region.nbytes, identity.epoch, max_transfers=self._settings.max_transfers, max_bytes=self._settings.max_bytes)
        grids = region.grids(followers)
        self._context = SinkContext(identity, self._settings, self._reactor, ledger, grids, self._emit, faults)
        self._region = region
        self._device = region.terms()
        self._failures = RecentFailures()
        self._edges: dict[WorkerId, KVEdge] = {}
        self._tasks: dict[KVEdge, asyncio.Task[None]] = {}
        self._history = EdgeHistory()
        self._unsettled: set[KVEdge] = set()
        self._numbers = count(1)
        self._transfer_ids = count(1)
        self._is_closed = False

    def next_transfer_id(self) -> TransferId:
        """An id that this sink has not used."""
        return TransferId(next(self._transfer_ids))

    def open(self, peer: Peer, deadline_s: float) -> KVEdge:
        """The edge to this incarnation of a worker, dialled in the background if there is none. Returns at once.

        An edge to an older epoch of the same worker is closed first: a restarted worker is a new worker. Raises StaleEpoch when
        `peer` is the older one, PeerLost after `close`.
        """
        with self._context.lock:
            if self._is_closed:
                raise PeerLost("the sink is closed")
            edge = self._edges.get(peer.worker_id)
            if edge is not None and edge.lost is None:
                if edge.peer.epoch == peer.epoch:
                    return edge
                if edge.peer.epoch > peer.epoch:
                    raise StaleEpoch(f"worker {peer.worker_id} has epoch {edge.peer.epoch}; {peer.epoch} is gone")
                self._reactor.post(edge.shut, StaleEpoch(f"worker {peer.worker_id} was restarted as epoch {peer.epoch}"))
            edge = self._edges[peer.worker_id] = KVEdge(self._context, next(self._numbers), peer, self._forget)
            self._context.ledger.open_edge(edge.number, peer.worker_id, peer.epoch)
        self._reactor.post(self._dial, edge, deadline_s)
        return edge

    def connect(self, peer: Peer, deadline_s: float) -> KVEdge:
        """`open`, and wait until the edge is negotiated.

        Raises PeerLost, StaleEpoch, ProtocolMismatch, AuthenticationFailed, TransferTimeout.
        """
        edge = self.open(peer, deadline_s)
        if not edge.ready.wait(deadline_s + 1.0):
            raise TransferTimeout(f"worker {peer.worker_id} did not answer within {deadline_s:g} s")
        if edge.lost is not None:
            raise edge.lost
        return edge

    def snapshot(self) -> tuple[EdgeStats, ...]:
        with self._context.lock:
            return self._history.with_live(edge.stats() for edge in self._edges.values())

    def edges(self) -> tuple[EdgeReport, ...]:
        """Those that are open now, by peer."""
        with self._context.lock:
            live = [edge for edge in self._edges.values() if edge.is_open]
        reports = (EdgeReport(peer=edge.peer.worker_id, backend=edge.backend, reason=edge.reason) for edge in live)
        return tuple(sorted(reports, key=lambda edge: edge.peer))

    def check(self) -> None:
        """Assert that the books agree with each other."""
        with self._context.lock:
            self._context.ledger.check()

    def close(self) -> None:
        """Close every edge; outstanding transfers fail with PeerLost and quiesce before this returns. May be called twice."""
        if not self._reactor.loop.is_closed():
            self._reactor.run(self._shut())
        if self._owns_reactor:
            self._reactor.close()

    async def _shut(self) -> None:
        with self._context.lock:
            self._is_closed = True
            edges = list(self._edges.values())
        for edge in edges:
            edge.shut(PeerLost("the sink is closed"))
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await all_set([edge.settled for edge in {*edges, *self._unsettled}], self._settings.acknowledge_s, "sink")
        self._context.grids.close()

    def _emit(self, event: KVEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # the engine's mistake must not unsettle the books
            log.exception("kv.event_failed event=%s", event)

    def _forget(self, edge: KVEdge) -> None:
        log.info("kv.edge_lost peer=%s backend=%s why=%s", edge.peer.worker_id, edge.backend, edge.lost)
        if edge.backend == "nccl" and isinstance(edge.lost, NcclError):
            self._failures.add(edge.peer, edge.backend, str(edge.lost), self._reactor.loop.time())
        with self._context.lock:
            self._history.add(edge.stats())
            if self._edges.get(edge.peer.worker_id) is edge:
                del self._edges[edge.peer.worker_id]
        self._unsettled = {one for one in (*self._unsettled, edge) if not one.settled.is_set()}

    def _dial(self, edge: KVEdge, deadline_s: float) -> None:
        if edge.lost is None:
            self._tasks[edge] = task = self._reactor.loop.create_task(self._connect(edge, deadline_s))
            task.add_done_callback(lambda _: self._tasks.pop(edge, None))

    async def _connect(self, edge: KVEdge, deadline_s: float) -> None:
        try:
            sock, receiver, reason = await self._negotiate(edge, deadline_s)
        except PolymuxError as error:
            edge.shut(error)
            return
        if edge.lost is not None:  # closed meanwhile
            receiver.close()
            sock.close()
            return
        log.info("kv.edge_open peer=%s backend=%s reason=%s", edge.peer.worker_id, receiver.name, reason)
        edge.begin(sock, receiver, reason)

    async def _negotiate(self, edge: KVEdge, deadline_s: float) -> tuple[socket, Receiver, str]:
        wanted = to_try(self._settings.backend, self._device)
        offer = encode(EdgeOffer(sink=self._context.identity, backends=wanted, device=self._device))
        sock, _ = await dial_tcp(edge.peer.address, self._introduce(edge, PeerKind.DECODE, offer), self._token, deadline_s)
        try:
            terms = decode_as(EdgeTerms, await drive_async(read_frame(), sock, deadline_s))
            receiver, reason = await self._choose(edge, wanted, terms, deadline_s)
        except BaseException:
            sock.close()
            raise
        return sock, receiver, reason

    async def _choose(self, edge: KVEdge, wanted: tuple[str, ...], terms: EdgeTerms, deadline_s: float) -> tuple[Receiver, str]:
        """The first backend that both sides speak and that works when tried, and why."""
        attempts: dict[str, Callable[[EdgeTerms, KVEdge, float], Awaitable[Receiver]]] = {
            "local": self._try_local,
            "cuda_ipc": self._try_cuda_ipc,
            "nccl": self._try_nccl,
            "shm": self._try_shm,
            "tcp": self._try_tcp,
        }
        sink, source = Side(self._context.identity, self._device, wanted), Side(terms.source, terms.device, terms.backends)
        failures: list[str] = []
        for name in wanted:
            why = None
            try:
                why = why_not(name, self._settings.backend, sink, source)
                if why is None and len(wanted) > 1:
                    why = self._failures.why(edge.peer, name, self._reactor.loop.time())
                if why is not None:
                    raise PeerLost(why)
                receiver = await attempts[name](terms, edge, deadline_s)
            except PolymuxError as error:
                failures.append(f"not {name}: {error}")
                if name == "nccl" and why is None:
                    self._failures.add(edge.peer, name, str(error), self._reactor.loop.time())
                continue
            if self._context.faults:
                receiver = FaultyReceiver(receiver, self._context.faults)
            return receiver, "; ".join(failures) or "first choice"
        raise ProtocolMismatch(f"no common KV backend with worker {edge.peer.worker_id}: {'; '.join(failures)}")

    async def _try_local(self, terms: EdgeTerms, edge: KVEdge, deadline_s: float) -> Receiver:
        if not isinstance(self._region, Region):
            await self._region.mover.ask(self._region.mover.incoming.prepare, deadline_s)
        return open_local(terms, self._region, self._reactor, edge)

    async def _try_cuda_ipc(self, terms: EdgeTerms, edge: KVEdge, deadline_s: float) -> Receiver:
        from polymux.transport.kv_cuda_ipc import open_cuda_ipc  # which needs torch

        assert not isinstance(self._region, Region)
        intro = self._join(edge, PeerKind.KV_CUDA_IPC, terms)
        return await open_cuda_ipc(edge.peer.address, intro, self._token, deadline_s, terms, self._region, self._reactor, edge)

    async def _try_nccl(self, terms: EdgeTerms, edge: KVEdge, deadline_s: float) -> Receiver:
        from polymux.transport.kv_nccl import open_nccl  # which needs torch

        assert not isinstance(self._region, Region)

        def intro(unique_id: bytes) -> Introduction:
            body = encode(JoinComm(edge=terms.edge, secret=terms.secret, unique_id=unique_id))
            return self._introduce(edge, PeerKind.KV_NCCL, body)

        return await open_nccl(edge.peer.address, intro, self._token, deadline_s, self._region.mover, self._reactor, edge)

    async def _try_shm(self, terms: EdgeTerms, edge: KVEdge, deadline_s: float) -> Receiver:
        intro = self._join(edge, PeerKind.KV_REGION, terms)
        return await open_shm(terms, intro, self._token, deadline_s, self._reactor, edge)

    async def _try_tcp(self, terms: EdgeTerms, edge: KVEdge, deadline_s: float) -> Receiver:
        intro = self._join(edge, PeerKind.KV_DATA, terms)
        sock, _ = await dial_tcp(edge.peer.address, intro, self._token, deadline_s)
        return TcpReceiver(self._reactor.loop, sock, edge)

    def _join(self, edge: KVEdge, kind: PeerKind, terms: EdgeTerms) -> Introduction:
        return self._introduce(edge, kind, encode(JoinEdge(edge=terms.edge, secret=terms.secret)))

    def _introduce(self, edge: KVEdge, kind: PeerKind, body: bytes) -> Introduction:
        peer = edge.peer
        return Introduction(kind=kind, peer_id=self._context.identity.worker_id, target=peer.worker_id, epoch=peer.epoch, body=body)
