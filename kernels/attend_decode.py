"""Attention of single tokens over the paged cache: the query heads of a KV head are the rows of one small product per sequence."""

from __future__ import annotations

from torch import Tensor

from polymux.kernels.attend_plan import RowGroup
from polymux.kernels.flash import attend_dense, combine, gather_tile


def attend_group(q: Tensor, strips: Tensor, group: RowGroup, scratch: Tensor, scale: float, out: Tensor) -> None:
    """q and out [T, Hkv, G, D]; strips [.., S * D] of one layer; fills `group.rows` of out."""
    rows = q[group.rows]
    num_rows, num_kv_heads, _, head_dim = rows.shape
    parts = []
    for tile in group.tiles:
        k, v = gather_tile(strips, tile, scratch, head_dim, num_kv_heads)
        if tile.num_tables != num_rows:
            k, v = (x.expand(num_rows, -1, -1, -1) for x in (k, v))
        parts.append(attend_dense(rows, k, v, scale, mask=tile.mask))
    out[group.rows].copy_(combine(parts))
