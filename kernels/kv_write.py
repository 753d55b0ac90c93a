"""Scatter new K and V into the paged cache by row index."""

from __future__ import annotations

from torch import Tensor

from polymux.kernels.paged import WritePlan


def kv_write(rows: Tensor, k: Tensor, v: Tensor, plan: WritePlan) -> None:
    """Put k and v [T, Hkv, D] into `rows` [R, D], one layer's view of the cache, in place, and zero what the plan calls unused."""
    if plan.unused is not None:
        rows.index_fill_(0, plan.unused, 0)
    rows.index_put_((plan.k_rows,), k)
    rows.index_put_((plan.v_rows,), v)
