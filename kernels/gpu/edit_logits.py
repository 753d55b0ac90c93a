"""Penalties, biases and bans, an element of the logits for each entry of a list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polymux.kernels.row_sampling import Edits

ENTRIES = 256


@triton.jit
def _edit(logits, rows, ids, values, penalties, num_entries, row_stride, num_rows, KIND: tl.constexpr, ENTRIES: tl.constexpr):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    mask = entry < num_entries
    row = tl.load(rows + entry, mask=mask, other=0).to(tl.int64)
    places = logits + row * row_stride + tl.load(ids + entry, mask=mask, other=0)
    if KIND == "ban":
        tl.store(places, float("-inf"), mask=mask)
    else:
        old = tl.load(places, mask=mask, other=0.0)
        value = tl.load(values + entry, mask=mask, other=0.0)
        if KIND == "bias":
            tl.store(places, old + value, mask=mask)
        else:
            repetition = tl.load(penalties + row, mask=mask, other=1.0)
            frequency = tl.load(penalties + num_rows + row, mask=mask, other=0.0)
            presence = tl.load(penalties + 2 * num_rows + row, mask=mask, other=0.0)
            new = tl.where(old > 0, tl.div_rn(old, repetition), old * repetition)
            new = new - value * frequency
            tl.store(places, new - tl.where(value > 0, presence, 0.0), mask=mask)


def edit_(logits: Tensor, edits: Edits) -> None:
    """As `row_sampling.edit_`, to the bit: products and sums are rounded one by one."""
    for kind, entries in (("ban", edits.banned), ("bias", edits.biased), ("penalty", edits.penalized)):
        if entries is None or not len(entries[0]):
            continue
        rows, ids, *values = entries
        penalties = logits if edits.penalties is None else edits.penalties
        assert logits.stride(1) == 1 and (kind != "penalty" or (edits.penalties is not None and penalties.is_contiguous()))
        _edit[(triton.cdiv(len(rows), ENTRIES),)](
            logits,
            rows,
            ids,
            values[0] if values else logits,
            penalties,
            len(rows),
            logits.stride(0),
            logits.shape[0],
            KIND=kind,
            ENTRIES=ENTRIES,
            num_warps=2,
            enable_fp_fusion=False,
        )
