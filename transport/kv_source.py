"""The prefill worker's end of KV migration: orders in, layers out, source blocks pinned until nobody reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from polymux.transport.errors import PolymuxError
from polymux.transport.kv_types import EdgeStats, KVSettings, OrderRef
from polymux.transport.messages import KVLayout, Prefill, Prefilled
from polymux.transport.region import Region
from polymux.transport.stream import WorkerServer


class KVSource:
    """Answers decode workers through the worker's `server`. Methods may be called from any thread and return at once.

    `on_order(ref, prefill)`: a new order; `accept` it before the first push. `on_cancel(ref, reason)`: the other side has ended
    it (or the edge is lost): stop computing. `on_released(ref)`: always last and exactly once: the transport reads the
    source blocks no more.
    """

    def __init__(
        self,
        *,
        server: WorkerServer,
        region: Region,
        host_id: str,
        on_order: Callable[[OrderRef, Prefill], None],
        on_cancel: Callable[[OrderRef, str], None],
        on_released: Callable[[OrderRef], None],
        settings: KVSettings | None = None,
    ) -> None:
        raise NotImplementedError

    def accept(self, ref: OrderRef, layout: KVLayout) -> None:
        """Say in which layout the source blocks lie. Raises LayoutMismatch, after failing the order, when the grant's differs."""
        raise NotImplementedError

    def push(self, ref: OrderRef, layer_lo: int, layer_hi: int, src_block_ids: Sequence[int], first_block: int) -> bool:
        """Layers [layer_lo, layer_hi) of these source blocks are final: move them to the granted blocks from number `first_block` on.

        Every (layer, block) is pushed exactly once, so a block only once it is full, or when the last chunk has filled it as far as it
        goes: after a chunk that ends at token t push blocks [pushed so far, t // block_size), after the last chunk also the partial one.
        No ids: nothing happens. False when the order has ended meanwhile (ignored). Raises GrantViolation for layers or blocks
        outside the order, out of the region, or pushed before.
        """
        raise NotImplementedError

    def commit(self, ref: OrderRef, prefilled: Prefilled) -> bool:
        """All was pushed; the sink may commit. False when the order has ended meanwhile. Raises GrantViolation if something is missing."""
        raise NotImplementedError

    def fail(self, ref: OrderRef, error: PolymuxError) -> bool:
        """The prefill failed; the sink gets KVFailed(error). False when the order has ended meanwhile."""
        raise NotImplementedError

    def snapshot(self) -> tuple[EdgeStats, ...]:
        raise NotImplementedError

    def close(self) -> None:
        """Fence every edge; outstanding orders are cancelled and released before this returns."""
        raise NotImplementedError
