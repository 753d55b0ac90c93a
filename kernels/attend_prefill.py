"""Attention of a chunk of one sequence: causal over its own K and V, which need no gathering, and over the cached tokens before it."""

from __future__ import annotations

from torch import Tensor

from polymux.kernels.attend_plan import Chunk
from polymux.kernels.flash import attend_dense, combine, gather_tile


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, strips: Tensor, chunk: Chunk, scratch: Tensor, scale: float, out: Tensor) -> None:
    """q and out [T, Hkv, G, D]; k and v [T, Hkv, D]; strips [.., S * D] of one layer; fills `chunk.rows` of out.

    The KV heads are the batch and the query heads of each are its heads, so K and V serve a whole group by stride 0.
    """
    queries = q[chunk.rows].permute(1, 2, 0, 3)
    num_kv_heads, group_size, _, head_dim = queries.shape
    own_k, own_v = (x[chunk.rows].transpose(0, 1).unsqueeze(1).expand(-1, group_size, -1, -1) for x in (k, v))
    parts = [attend_dense(queries, own_k, own_v, scale, mask=chunk.own_mask, causal=chunk.own_mask is None)]
    for tile in chunk.tiles:
        tile_k, tile_v = gather_tile(strips, tile, scratch, head_dim, num_kv_heads)
        shared_k, shared_v = (x.transpose(0, 1).expand(-1, group_size, -1, -1) for x in (tile_k, tile_v))
        part, lse = attend_dense(queries, shared_k, shared_v, scale, mask=tile.mask)
        if tile.dead is not None:
            lse = lse.masked_fill(tile.dead, float("-inf"))
        parts.append((part, lse))
    out[chunk.rows].permute(1, 2, 0, 3).copy_(combine(parts))
