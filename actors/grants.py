"""Grants: blocks of this worker that a prefill worker, another or itself, may fill, from the order to the last event of its transfer.

Owned by whom? The transfer while it runs; the sequence once it is committed; after a failure the quarantine, until the transport is quiet.
"""

from __future__ import annotations

from dataclasses import dataclass

from polymux.actors.engine import Engine
from polymux.actors.local_orders import LocalOrders
from polymux.actors.sequence import Phase, Sequence
from polymux.transport.errors import NoFreeBlocks
from polymux.transport.kv import KVCommitted, KVEdge, KVEvent, KVFailed, KVSink
from polymux.transport.messages import Grant, Peer, Prefill
from polymux.transport.units import TransferId, pack_ids

EDGE_DEADLINE_S = 5.0  # to dial a prefill worker; it has the request's own deadline after that


@dataclass(slots=True)
class _Live:
    transfer_id: TransferId
    sequence: Sequence
    edge: KVEdge | LocalOrders
    block_ids: list[int]


class Grants:
    """The books of one decode worker's transfers. `peer` is that worker."""

    def __init__(self, engine: Engine, sink: KVSink, local: LocalOrders, peer: Peer) -> None:
        self._engine = engine
        self._sink = sink
        self._local = local
        self._peer = peer
        self._live: dict[TransferId, _Live] = {}
        self._quarantine: dict[TransferId, _Live] = {}

    def order(self, sequence: Sequence) -> None:
        """Grant blocks for the tokens so far, send the order. Raises NoFreeBlocks, Overloaded, TransferError; then none is held."""
        command = sequence.command
        pool = self._engine.pool(sequence.spec.model)
        peer = sequence.prefill or self._peer
        edge = self._edge(peer)
        found = self._cached(sequence) if edge is self._local else []
        try:
            block_ids = found + pool.allocate(sequence.spec.kv.num_blocks(sequence.num_tokens_to_come) - len(found))
        except NoFreeBlocks:
            pool.free(found)
            raise
        transfer_id = self._sink.next_transfer_id()
        remaining_s = sequence.deadline_s - self._engine.clock()
        grant = Grant(
            transfer_id=transfer_id,
            layout_hash=sequence.spec.kv.layout_hash,
            block_ids=pack_ids(block_ids),
            target_epoch=self._peer.epoch,
            source_epoch=peer.epoch,
        )
        prefill = Prefill(
            sequence_id=command.sequence_id,
            client_id=sequence.client_id,
            model=command.model,
            prompt_ids=command.prompt_ids,
            output_ids=pack_ids(sequence.output_ids),
            sampling=command.sampling,
            grant=grant,
            deadline_s=remaining_s,
            tpot_slo_s=command.tpot_slo_s,
            handover=sequence.handover,
            due_in_s=sequence.due_s - self._engine.clock(),
            cache_salt=command.cache_salt,
            num_in_place=len(found) * sequence.spec.kv.block_size,
        )
        self._live[transfer_id] = _Live(transfer_id, sequence, edge, block_ids)
        try:
            edge.order(prefill, sequence.spec.kv)
        except BaseException:
            del self._live[transfer_id]
            pool.free(block_ids)
            raise
        sequence.phase, sequence.transfer_id = Phase.PREFILLING, transfer_id

    def _cached(self, sequence: Sequence) -> list[int]:
        """Blocks that hold what it begins with, where its prompt is to be computed on this worker."""
        if sequence.handover is not None:
            return []
        return self._engine.prefixes.match(sequence.spec, sequence.command.cache_salt, sequence.packed_ids)

    def _edge(self, prefill: Peer) -> KVEdge | LocalOrders:
        is_here = (prefill.worker_id, prefill.epoch) == (self._peer.worker_id, self._peer.epoch)
        return self._local if is_here else self._sink.open(prefill, EDGE_DEADLINE_S)

    def cancel(self, sequence: Sequence, reason: str) -> None:
        """End a sequence's transfer; its blocks go back when the transport says so."""
        live = self._live.get(sequence.transfer_id) if sequence.transfer_id is not None else None
        if live is not None:
            live.edge.cancel(live.transfer_id, reason)

    def settle(self, event: KVEvent) -> Sequence | None:
        """Book an event. Returns its sequence, which owns the blocks if they were committed; None when quarantined blocks went back."""
        if isinstance(event, KVCommitted):
            live = self._live.pop(event.transfer_id)
            live.sequence.block_ids, live.sequence.transfer_id = live.block_ids, None
            return live.sequence
        if isinstance(event, KVFailed):
            live = self._live.pop(event.transfer_id)
            self._quarantine[event.transfer_id] = live
            live.sequence.transfer_id = None
            return live.sequence
        live = self._quarantine.pop(event.transfer_id)
        self._engine.pool(live.sequence.spec.model).free(live.block_ids)
        return None

    @property
    def is_idle(self) -> bool:
        """No transfer will end, so no event is to come."""
        return not self._live and not self._quarantine
