"""Every operation in plain torch: the definition of correct. Slow on purpose; runs on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from polymux.kernels.paged import CacheShape, Span


class StepAttention(Protocol):
    """The attention of a step in the layers of one window."""

    @property
    def spans(self) -> Sequence[Span]: ...
    @property
    def window(self) -> int | None: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each last-dimension row to unit root mean square, in fp32, then by `weight`, in x's dtype."""
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) * weight


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add delta to x, both [T, H], in place; returns the norm of the sum."""
    return rms_norm(x.add_(delta), weight, eps)


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


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The activation of SwiGLU, [T, I] each."""
    return torch.nn.functional.silu(gate) * up


def embed(table: Tensor, token_ids: Tensor) -> Tensor:
    """Rows of table [V, H] for token_ids [T]."""
    return table[token_ids]


def kv_write(kv: Tensor, layer: int, k: Tensor, v: Tensor, block_ids: Tensor, slots: Tensor) -> None:
    """Put k and v [T, Hkv, D] into slot `slots[t]` of block `block_ids[t]` of kv [N, L, 2, Hkv, S, D], in place."""
    kv[block_ids, layer, 0, :, slots] = k
    kv[block_ids, layer, 1, :, slots] = v


def rotate_write(
    heads: Tensor,
    norms: Tensor | None,
    eps: float,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    rows: Tensor,
    shape: CacheShape,
) -> Tensor:
    """The norm of each query and key head, if any, their rotation, and K and V into the cache; returns the queries [T, Hq, D].

    heads [T, Hq + 2 Hkv, D]; norms [Hq + Hkv, D]; table [P, D], cosines then sines; positions and slots (block_id * S + slot) [T] int32,
    of which `num_tokens` [1] int32 are tokens and the others padding, written nowhere; rows [R, D], one layer's view of the cache. The
    slots after the last token of a block that the step begins become zero, as in `paged.WritePlan`.
    """
    num_qk = heads.shape[1] - shape.num_kv_heads
    qk = heads[:, :num_qk] if norms is None else rms_norm(heads[:, :num_qk], norms, eps)
    cos, sin = table[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    qk = rotate(qk, torch.cat((cos, cos), dim=-1), sin)
    num_heads, count, slot = num_qk - shape.num_kv_heads, int(num_tokens), slots.long()
    strips = torch.arange(2 * shape.num_kv_heads, device=heads.device)
    first = slot // shape.block_size * shape.strips_per_block * shape.block_size + slot % shape.block_size
    places = first[:count, None] + strips * shape.block_size
    rows[places] = torch.cat((qk[:, num_heads:], heads[:, num_qk:]), dim=1)[:count]
    known = slot[:count].tolist()
    for token, here in enumerate(known):
        place = here % shape.block_size
        if known[token + 1 : token + 2] != [here + 1] and token >= place and known[token - place] == here - place:
            for rest in range(1, shape.block_size - place):
                rows[places[token] + rest] = 0
    return qk[:, :num_heads]


def gather_blocks(kv: Tensor, block_ids: Tensor, slab: Tensor, layers: slice, heads: slice) -> None:
    """Copy layers and KV heads of blocks `block_ids` [n] of kv [N, L, 2, Hkv, S, D] into the slab [n, layers, 2, heads, S, D].

    The slab may be a slice of the heads of a contiguous one.
    """
    slab.copy_(kv[:, layers, :, heads][block_ids.long()])


def scatter_blocks(kv: Tensor, block_ids: Tensor, slab: Tensor, layers: slice, heads: slice) -> None:
    """The reverse of `gather_blocks`; no block is named twice."""
    part = kv[:, layers, :, heads]
    part[block_ids.long()] = slab


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


def attend_step(q: Tensor, kv: Tensor, layer: int, plan: StepAttention, scale: float, out: Tensor) -> None:
    """`attend` for each sequence of a step, q and out [T, Hq, D]; the rows of no sequence become zero."""
    out.zero_()
    for span in plan.spans:
        rows = slice(span.start, span.start + span.num_tokens)
        out[rows] = attend(q[rows], kv, layer, span.block_ids, span.context_len, plan.window, scale)
