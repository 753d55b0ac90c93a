"""Orders of a worker to itself: its prefill role computes into the blocks that its decode role granted, and nothing moves.

The prefill role speaks to one object, whoever ordered: orders of other workers go on to the transport, and its own ones end here with the
same events. All calls are the engine thread's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from polymux.actors.engine import Engine
from polymux.transport.errors import Cancelled, PolymuxError
from polymux.transport.kv import KVCommitted, KVEvent, KVFailed, KVQuiesced, OrderRef
from polymux.transport.messages import KVLayout, Prefill, Prefilled
from polymux.transport.units import TransferId, unpack_ids

LOCAL_EDGE = 0  # the transport numbers its edges from 1


def is_local(order: OrderRef) -> bool:
    return order.edge == LOCAL_EDGE


class OrderSource(Protocol):
    """The prefill side of the transport (`KVSource`)."""

    def accept(self, ref: OrderRef, layout: KVLayout) -> None: ...
    def push(self, ref: OrderRef, layer_lo: int, layer_hi: int, src_block_ids: Sequence[int], first_block: int) -> bool: ...
    def commit(self, ref: OrderRef, prefilled: Prefilled) -> bool: ...
    def fail(self, ref: OrderRef, error: PolymuxError) -> bool: ...


class PrefillEnd(Protocol):
    def accept(self, command: Prefill, order: OrderRef) -> None: ...
    def cancel(self, order: OrderRef, reason: str) -> None: ...
    def released(self, order: OrderRef, at_s: float) -> None: ...


class DecodeEnd(Protocol):
    def kv_event(self, event: KVEvent) -> None: ...


class LocalOrders:
    """`order` and `cancel` are the decode role's, as of a `KVEdge`; the other four the prefill role's, as of a `KVSource`.

    Events are left in the mailbox (`tell`), so that no role is called while it is in the middle of a step.
    """

    def __init__(self, engine: Engine, source: OrderSource, tell: Callable[[Callable[[], None]], None]) -> None:
        self._engine = engine
        self._source = source
        self._tell = tell
        self._live: dict[TransferId, Prefill] = {}

    def connect(self, prefill: PrefillEnd, decode: DecodeEnd) -> None:
        self._prefill, self._decode = prefill, decode

    def order(self, prefill: Prefill, layout: KVLayout) -> None:
        transfer_id = prefill.grant.transfer_id
        self._live[transfer_id] = prefill
        self._tell(lambda: self._begin(transfer_id))

    def _begin(self, transfer_id: TransferId) -> None:
        prefill = self._live.get(transfer_id)
        if prefill is not None:  # not cancelled meanwhile
            self._prefill.accept(prefill, OrderRef(LOCAL_EDGE, transfer_id))

    def cancel(self, transfer_id: TransferId, reason: str) -> bool:
        """False when it had ended already. The prefill role lets go of the blocks before this returns."""
        prefill = self._live.pop(transfer_id, None)
        if prefill is None:
            return False
        self._prefill.cancel(OrderRef(LOCAL_EDGE, transfer_id), reason)
        self._end(prefill, Cancelled(reason))
        return True

    # -- the prefill role's side: every order of any worker -----------------------------------------------------------

    def accept(self, ref: OrderRef, layout: KVLayout) -> None:
        if not is_local(ref):
            self._source.accept(ref, layout)

    def push(self, ref: OrderRef, layer_lo: int, layer_hi: int, src_block_ids: Sequence[int], first_block: int) -> bool:
        """A block that is the granted one is in place already; others are copied there."""
        if not is_local(ref):
            return self._source.push(ref, layer_lo, layer_hi, src_block_ids, first_block)
        prefill = self._live.get(ref.transfer_id)
        if prefill is None:
            return False
        granted = unpack_ids(prefill.grant.block_ids)[first_block : first_block + len(src_block_ids)]
        self._engine.copy_kv(prefill.model, src_block_ids, granted, range(layer_lo, layer_hi))
        return True

    def commit(self, ref: OrderRef, prefilled: Prefilled) -> bool:
        if not is_local(ref):
            return self._source.commit(ref, prefilled)
        prefill = self._live.pop(ref.transfer_id, None)
        if prefill is None:
            return False
        now_s = self._engine.clock()
        event = KVCommitted(transfer_id=ref.transfer_id, sequence_id=prefill.sequence_id, prefilled=prefilled, began_s=now_s, ended_s=now_s)
        self._tell(lambda: self._prefill.released(ref, now_s))
        self._tell(lambda: self._decode.kv_event(event))
        return True

    def fail(self, ref: OrderRef, error: PolymuxError) -> bool:
        if not is_local(ref):
            return self._source.fail(ref, error)
        prefill = self._live.pop(ref.transfer_id, None)
        if prefill is None:
            return False
        self._end(prefill, error)
        return True

    def _end(self, prefill: Prefill, error: PolymuxError) -> None:
        """Without a commit: the prefill role lets go first, then the blocks may be freed."""
        transfer_id = prefill.grant.transfer_id
        self._tell(lambda: self._prefill.released(OrderRef(LOCAL_EDGE, transfer_id), self._engine.clock()))
        self._tell(lambda: self._decode.kv_event(KVFailed(transfer_id=transfer_id, sequence_id=prefill.sequence_id, error=error)))
        self._tell(lambda: self._decode.kv_event(KVQuiesced(transfer_id=transfer_id)))
