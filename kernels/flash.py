"""torch's flash attention for the CPU, over pieces of the keys whose results are combined by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polymux.kernels.attend_plan import Tile

_flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """q [B, H, Q, D], k and v [B, H, C, D], any strides: the result [B, H, Q, D] in q's dtype and its log-sum-exp [B, H, Q] fp32."""
    return _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)


def gather_tile(strips: Tensor, tile: Tile, scratch: Tensor, head_dim: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """K and V [tables, Hkv, slots, D] of a tile, copied from one layer's strips into `scratch`, which the next tile overwrites."""
    num_strips, width = tile.strips.shape[0], strips.shape[1]
    buffer = scratch[: num_strips * width].view(num_strips, width)
    torch.index_select(strips, 0, tile.strips, out=buffer)
    k, v = buffer.view(2, tile.num_tables, num_kv_heads, -1, head_dim)[:, :, :, tile.first : tile.last].unbind()
    return k, v


def combine(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The attention over all the keys from that over disjoint pieces of them: [B, H, Q, D] and log-sum-exp [B, H, Q] each."""
    total, lse = parts[0]
    if len(parts) == 1:
        return total
    total = total.float()
    for part, part_lse in parts[1:]:
        both = torch.logaddexp(lse, part_lse)
        total = torch.lerp(total, part.float(), (part_lse - both).exp_().unsqueeze(-1))
        lse = both
    return total
