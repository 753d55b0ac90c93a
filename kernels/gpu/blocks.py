"""KV blocks to and from a slab, for transfers: whole blocks, some of their layers, or a slice of their heads, on either side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048  # of eight bytes: 16 KiB a program


@triton.jit
def _copy_blocks(
    pool,
    block_ids,
    slab,
    first,
    run,
    num_words,
    block_stride,
    run_stride,
    piece_stride,
    piece_run_stride,
    GATHERS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """`run` words in a row, `num_words / run` times a block, `run_stride` apart, from word `first` of each block on.

    In the slab a block's piece is `piece_stride` words behind the last one's, and its runs are `piece_run_stride` apart.
    """
    place = tl.program_id(0)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = words < num_words
    block = pool + tl.load(block_ids + place).to(tl.int64) * block_stride + first + (words // run) * run_stride + words % run
    piece = slab + place.to(tl.int64) * piece_stride + (words // run) * piece_run_stride + words % run
    if GATHERS:
        tl.store(piece, tl.load(block, mask=mask), mask=mask)
    else:
        tl.store(block, tl.load(piece, mask=mask), mask=mask)


def gather_blocks(kv: Tensor, block_ids: Tensor, slab: Tensor, layers: slice, heads: slice) -> None:
    """As `reference.gather_blocks`."""
    _launch(kv, block_ids, slab, layers, heads, gathers=True)


def scatter_blocks(kv: Tensor, block_ids: Tensor, slab: Tensor, layers: slice, heads: slice) -> None:
    """As `reference.scatter_blocks`."""
    _launch(kv, block_ids, slab, layers, heads, gathers=False)


def _launch(kv: Tensor, block_ids: Tensor, slab: Tensor, layers: slice, heads: slice, *, gathers: bool) -> None:
    _, num_layers, _, num_heads, slots, dim = kv.shape
    first_layer, end_layer, _ = layers.indices(num_layers)
    first_head, end_head, _ = heads.indices(num_heads)
    strip = slots * dim * kv.element_size()
    num_strips = (end_layer - first_layer) * 2 * (end_head - first_head)
    assert kv.is_contiguous() and slab.shape == (len(block_ids), end_layer - first_layer, 2, end_head - first_head, slots, dim)
    if not len(block_ids) or not num_strips:
        return
    assert strip % 8 == 0 and not kv.data_ptr() % 8 and not slab.data_ptr() % 8, "K or V of a head is not made of whole words"
    assert slab.stride()[3:] == (slots * dim, dim, 1) and slab.stride(1) == 2 * slab.stride(2), "a slab of other than runs of heads"
    words = strip // 8
    first = (first_layer * 2 * num_heads + first_head) * words
    num_words = num_strips * words
    run = num_words if end_head - first_head == num_heads and slab.is_contiguous() else (end_head - first_head) * words
    _copy_blocks[(len(block_ids), triton.cdiv(num_words, WORDS))](
        kv.view(-1).view(torch.int64),
        block_ids,
        slab.flatten(4).view(torch.int64),
        first,
        run,
        num_words,
        num_layers * 2 * num_heads * words,
        num_heads * words,
        slab.stride(0) * kv.element_size() // 8,
        slab.stride(2) * kv.element_size() // 8,
        GATHERS=gathers,
        WORDS=WORDS,
        num_warps=8,
    )
