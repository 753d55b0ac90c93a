"""The activation of SwiGLU, over gate's own memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048


@triton.jit
def _silu_mul(gate, up, width, gate_stride, up_stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < width
    places = gate + row * gate_stride + columns
    g = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(places, (silu * u).to(gate.dtype.element_ty), mask=mask)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.silu_mul`, but in place of gate: gate and up [T, I], whose rows may be strided, such as the halves of one product."""
    num_rows, width = gate.shape
    assert gate.stride(1) == up.stride(1) == 1, "elements of a row are not neighbours"
    if gate.numel():
        _silu_mul[(num_rows, triton.cdiv(width, COLUMNS))](gate, up, width, gate.stride(0), up.stride(0), COLUMNS=COLUMNS, num_warps=4)
    return gate
