"""Paged attention for decode and prefill: one kernel over items of work (`work.py`), in the manner of FlashAttention-2 with split keys.

A thread block takes one item of one KV head: a tile of packed query rows over a range of keys, gathered a few KV blocks at a time through
the block table. Scores are fp32, the softmax is by powers of two and online. Where a tile's keys are cut into parts, each leaves its
unnormalised sums in the workspace, and the part that finishes last combines them in order, so no second kernel runs and the sum does not
depend on which was last.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from polymux.kernels.gpu import work
from polymux.kernels.gpu.config import padded_dim
from polymux.kernels.gpu.plan import AttendPlan
from polymux.kernels.gpu.tiled import Launch, TiledPlan

START = tl.constexpr(work.START)
CONTEXT = tl.constexpr(work.CONTEXT)
TOKENS = tl.constexpr(work.TOKENS)
ROW = tl.constexpr(work.ROW)
TABLE = tl.constexpr(work.TABLE)
BEGIN = tl.constexpr(work.BEGIN)
END = tl.constexpr(work.END)
FIRST_PART = tl.constexpr(work.FIRST_PART)
PART = tl.constexpr(work.PART)
PARTS = tl.constexpr(work.PARTS)
ITEM_WORDS = tl.constexpr(work.ITEM_WORDS)


def attend(q: Tensor, kv: Tensor, layer: int, plan: AttendPlan, scale: float, out: Tensor) -> None:
    """Causal attention of a step's tokens over their paged caches, which hold their own K and V already; fills out.

    q and out [T, Hq, D] of the step's T rows, kv [N, L, 2, Hkv, S, D] in q's dtype: contiguous in D, any strides else. Padding rows become
    zero. Scores, softmax and sums in fp32. Nothing waits for the device, and the launches depend on the plan's shapes alone.
    """
    assert isinstance(plan, TiledPlan), f"{type(plan).__name__} was prepared for another implementation"
    for launch in (plan.decode, plan.prefill):
        if launch is not None:
            _run(q, kv, layer, plan, launch, scale, out)


def _run(q: Tensor, kv: Tensor, layer: int, plan: TiledPlan, launch: Launch, scale: float, out: Tensor) -> None:
    _, _, _, num_kv_heads, block_size, head_dim = kv.shape
    assert q.stride(2) == out.stride(2) == kv.stride(5) == 1, "the last dimension is not contiguous"
    config, workspace = launch.config, plan.workspace
    _attend[(num_kv_heads, launch.items.shape[0])](
        q,
        kv,
        out,
        plan.block_ids,
        launch.items,
        workspace.partials,
        workspace.arrived,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        kv.stride(0),
        layer * kv.stride(1),
        kv.stride(2),
        kv.stride(3),
        kv.stride(4),
        scale * math.log2(math.e),
        plan.window or 0,
        IS_WINDOWED=plan.window is not None,
        GROUP=q.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_dim(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["window"])
def _attend(
    q,
    kv,
    out,
    block_ids,
    items,
    partials,
    arrived,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_block,
    layer_offset,
    stride_kv,
    stride_head,
    stride_slot,
    scale,  # in powers of two
    window,
    IS_WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0)
    item = items + tl.program_id(1) * ITEM_WORDS
    num_parts = tl.load(item + PARTS)
    if num_parts == 0:
        return
    start = tl.load(item + START)
    context = tl.load(item + CONTEXT)
    num_rows = tl.load(item + TOKENS) * GROUP
    first_row = tl.load(item + ROW)
    begin = tl.load(item + BEGIN)
    end = tl.load(item + END)
    table = block_ids + tl.load(item + TABLE)
    k_base = kv + layer_offset + head.to(tl.int64) * stride_head

    row = first_row + tl.arange(0, BLOCK_M)
    token = (start + row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    position = context + row // GROUP
    dim = tl.arange(0, BLOCK_D)
    kept = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(q + (token * stride_q_token + query_head * stride_q_head)[:, None] + dim[None, :], mask=kept, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Tiles of keys between `clear` and `edge` are seen by every row.
    last_position = context + (tl.minimum(first_row + BLOCK_M, num_rows) - 1) // GROUP
    clear = tl.maximum(begin, last_position - window + 1) if IS_WINDOWED else begin
    edge = tl.minimum(end, context + first_row // GROUP + 1)
    for first in tl.range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        block = tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
        places = k_base + (block * stride_block + key % BLOCK_SIZE * stride_slot)[:, None] + dim[None, :]
        # What is masked is loaded as zero: a stale NaN times a weight of zero is a NaN.
        held = (key < end)[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(places, mask=held, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        if (first < clear) | (first + BLOCK_N > edge):
            seen = (key[None, :] <= position[:, None]) & (key < end)[None, :]
            if IS_WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.math.exp2(scores * scale - level[:, None])
        decay = tl.math.exp2(peak - level)
        total = total * decay + tl.sum(weights, 1)
        v = tl.load(places + stride_kv, mask=held, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        peak = new_peak

    results = out + (token * stride_out_token + query_head * stride_out_head)[:, None] + dim[None, :]
    if num_parts == 1:
        tl.store(results, _normalised(acc, total), mask=kept)
    else:
        first_part = tl.load(item + FIRST_PART)
        own = _part_of(partials, first_part + tl.load(item + PART), head, BLOCK_M, BLOCK_D)
        within = tl.arange(0, BLOCK_M)
        tl.store(own + within[:, None] * BLOCK_D + dim[None, :], acc)
        tl.store(own + BLOCK_M * BLOCK_D + within, peak)
        tl.store(own + BLOCK_M * (BLOCK_D + 1) + within, total)
        tl.debug_barrier()  # every thread has stored before one of them says so
        counter = arrived + first_part * tl.num_programs(0) + head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
            tl.debug_barrier()
            acc, total = _combined(partials, first_part, num_parts, head, BLOCK_M, BLOCK_D)
            tl.store(results, _normalised(acc, total), mask=kept)
            tl.store(counter, 0)


@triton.jit
def _part_of(partials, part, head, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where a part keeps its sums [BLOCK_M, BLOCK_D], peaks [BLOCK_M] and totals [BLOCK_M]."""
    return partials + (part * tl.num_programs(0) + head).to(tl.int64) * (BLOCK_M * (BLOCK_D + 2))


@triton.jit
def _combined(partials, first_part, num_parts, head, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums and totals of all parts. Read past the first-level cache, which other multiprocessors' stores do not reach."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    within = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)[None, :]
    for i in tl.range(0, num_parts, loop_unroll_factor=4 if BLOCK_M * BLOCK_D <= 4096 else 1):  # loads of small tiles overlap
        part = _part_of(partials, first_part + i, head, BLOCK_M, BLOCK_D)
        part_peak = tl.load(part + BLOCK_M * BLOCK_D + within, cache_modifier=".cg")
        new_peak = tl.maximum(peak, part_peak)
        level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        old, new = tl.math.exp2(peak - level), tl.math.exp2(part_peak - level)
        acc = acc * old[:, None] + tl.load(part + within[:, None] * BLOCK_D + dim, cache_modifier=".cg") * new[:, None]
        total = total * old + tl.load(part + BLOCK_M * (BLOCK_D + 1) + within, cache_modifier=".cg") * new
        peak = new_peak
    return acc, total


@triton.jit
def _normalised(acc, total):
    """acc / total by row; zero where a row saw nothing."""
    return acc / tl.where(total == 0, 1.0, total)[:, None]
