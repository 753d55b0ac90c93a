"""Between a layer's first product and its attention: the norm of each head, its rotation, and K and V into the paged cache, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polymux.kernels.paged import CacheShape

TILE = 1024  # elements of half a head, times heads


@triton.jit
def _rotate_write(
    heads,
    norms,
    table,
    positions,
    slots,
    num_tokens,
    rows,
    num_heads,
    num_kv_heads,
    heads_stride,
    block_stride,
    eps,
    NORMS: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0)
    count = tl.load(num_tokens)
    if token >= count:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    num_qk = num_heads + num_kv_heads
    mask = (head < num_qk + num_kv_heads) & (pair < DIM // 2)
    places = heads + token.to(tl.int64) * heads_stride + head * DIM + pair
    raw_first = tl.load(places, mask=mask, other=0.0)
    raw_second = tl.load(places + DIM // 2, mask=mask, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    is_turned = head < num_qk
    if NORMS:
        inverse = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / DIM + eps)[:, None]
        scales = norms + head * DIM + pair
        first = (first * inverse).to(heads.dtype.element_ty).to(tl.float32) * tl.load(scales, mask=mask & is_turned, other=0.0)
        second = (second * inverse).to(heads.dtype.element_ty).to(tl.float32) * tl.load(scales + DIM // 2, mask=mask & is_turned, other=0.0)
    angles = table + tl.load(positions + token).to(tl.int64) * DIM + pair
    cos = tl.load(angles, mask=pair < DIM // 2, other=0.0).to(tl.float32)
    sin = tl.load(angles + DIM // 2, mask=pair < DIM // 2, other=0.0).to(tl.float32)
    turned_first = tl.where(is_turned, (first * cos - second * sin).to(heads.dtype.element_ty), raw_first)
    turned_second = tl.where(is_turned, (second * cos + first * sin).to(heads.dtype.element_ty), raw_second)
    is_query = head < num_heads
    tl.store(places, turned_first, mask=mask & is_query)
    tl.store(places + DIM // 2, turned_second, mask=mask & is_query)
    slot = tl.load(slots + token)
    place = slot % SLOTS
    strip = head - num_heads  # K's heads, then V's: as they lie in a layer of a block
    block = rows + (slot // SLOTS).to(tl.int64) * block_stride + strip * (SLOTS * DIM) + pair
    kept = mask & ~is_query
    tl.store(block + place * DIM, turned_first, mask=kept)
    tl.store(block + place * DIM + DIM // 2, turned_second, mask=kept)
    follows = tl.load(slots + token + 1, mask=token + 1 < count, other=-1)
    began = tl.load(slots + token - place, mask=token >= place, other=-1)
    if (follows != slot + 1) & (began == slot - place):  # the last token, in a block that this step begins: zeros after it
        for rest in range(place + 1, SLOTS):
            tl.store(block + rest * DIM, tl.zeros((HEADS, HALF), rows.dtype.element_ty), mask=kept)
            tl.store(block + rest * DIM + DIM // 2, tl.zeros((HEADS, HALF), rows.dtype.element_ty), mask=kept)


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
    """As `reference.rotate_write`, with the queries over their own memory: heads [T, Hq + 2 Hkv, D] becomes scratch. Returns [T, Hq, D].

    norms [Hq + Hkv, D] or None; table [P, D], cosines then sines; positions and slots [T] int32, of which `num_tokens` [1] int32 are
    tokens and the others padding; rows [R, D], one layer's view of the cache.
    """
    total, num_all, dim = heads.shape
    assert heads.stride(1) == dim and heads.stride(2) == 1 and dim % 2 == 0, "a head's elements are not neighbours"
    num_heads = num_all - 2 * shape.num_kv_heads
    if total:
        half = triton.next_power_of_2(dim // 2)
        per_program = max(TILE // half, 1)
        _rotate_write[(total, triton.cdiv(num_all, per_program))](
            heads,
            heads if norms is None else norms,
            table,
            positions,
            slots,
            num_tokens,
            rows,
            num_heads,
            shape.num_kv_heads,
            heads.stride(0),
            shape.strips_per_block * shape.block_size * dim,
            eps,
            NORMS=norms is not None,
            DIM=dim,
            SLOTS=shape.block_size,
            HEADS=per_program,
            HALF=half,
            num_warps=4,
        )
    return heads[:, :num_heads]
