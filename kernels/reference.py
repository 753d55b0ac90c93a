"""Every operation in plain torch: the definition of correct. Slow on purpose; runs on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each last-dimension row to unit root mean square, in fp32, then by `weight`, in x's dtype."""
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [T, H, D], halves paired; cos [T, 1, D], its halves equal, and sin [T, 1, D / 2], in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second * sin, first * sin), dim=-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return residual + linear(x, weight, bias)


def gated_linear(x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None) -> Tensor:
    """SwiGLU: silu(gate(x)) * up(x)."""
    return torch.nn.functional.silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias)


def embed(table: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of table [V, H] for token_ids [T]."""
    return table[token_ids]


def kv_write(kv: Tensor, layer: int, k: Tensor, v: Tensor, block_ids: Tensor, slots: Tensor) -> None:
    """Put k and v [T, Hkv, D] into slot `slots[t]` of block `block_ids[t]` of kv [N, L, 2, Hkv, S, D], in place."""
    kv[block_ids, layer, 0, :, slots] = k
    kv[block_ids, layer, 1, :, slots] = v


def attend(q: Tensor, kv: Tensor, layer: int, block_ids: Sequence[int], context_len: int, window: int | None, scale: float) -> Tensor:
    """Causal attention of one sequence's new tokens over its paged cache, which holds their own K and V already.

    q [T, Hq, D], its first row at position `context_len`; kv [N, L, 2, Hkv, S, D]; a token sees itself and at most `window - 1`
    tokens before it. Returns [T, Hq, D] in q's dtype; scores and softmax in fp32.
    """
    num_tokens, num_heads, head_dim = q.shape
    ids = torch.tensor(list(block_ids), device=kv.device)
    blocks = kv[ids, layer].transpose(0, 1).transpose(1, 2)  # [2, Hkv, n, S, D]
    k, v = blocks.reshape(2, kv.shape[3], -1, head_dim)[:, :, : context_len + num_tokens].float()
    group = num_heads // kv.shape[3]
    scores = torch.einsum("thd,hcd->thc", q.float(), k.repeat_interleave(group, 0)) * scale
    query = torch.arange(context_len, context_len + num_tokens, device=q.device)[:, None]
    key = torch.arange(context_len + num_tokens, device=q.device)[None, :]
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    return torch.einsum("thc,hcd->thd", weights, v.repeat_interleave(group, 0)).to(q.dtype)
