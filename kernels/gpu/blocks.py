"""KV blocks to and from one contiguous slab, for transfers and swaps: whole blocks, some of their layers, or a slice of their heads."""

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
    GATHERS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """`run` words in a row, `num_words / run` times a block, `run_stride` apart, from word `first` of each block on."""
    place = tl.program_id(0)
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = words < num_words
    block = pool + tl.load(block_ids + place).to(tl.int64) * block_stride + first + (words // run) * run_stride + words % run
    piece = slab + place.to(tl.int64) * num_words + words
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
    assert kv.is_contiguous() and slab.is_contiguous() and slab.numel() * slab.element_size() == len(block_ids) * num_strips * strip
    if not len(block_ids) or not num_strips:
        return
    assert strip % 8 == 0 and not kv.data_ptr() % 8 and not slab.data_ptr() % 8, "K or V of a head is not made of whole words"
    words = strip // 8
    first = (first_layer * 2 * num_heads + first_head) * words
    num_words = num_strips * words
    run = num_words if end_head - first_head == num_heads else (end_head - first_head) * words
    _copy_blocks[(len(block_ids), triton.cdiv(num_words, WORDS))](
        kv.view(-1).view(torch.int64),
        block_ids,
        slab.view(-1).view(torch.int64),
        first,
        run,
        num_words,
        num_layers * 2 * num_heads * words,
        num_heads * words,
        GATHERS=gathers,
        WORDS=WORDS,
        num_warps=8,
    )
