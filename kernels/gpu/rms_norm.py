"""RMSNorm, alone or after the addition of a residual: each row is read once and stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a tile, at least: rows narrower than that share one


@triton.jit
def _rms_norm(
    x,
    delta,
    weight,
    out,
    num_rows,
    width,
    x_stride,
    delta_stride,
    eps,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    columns = tl.arange(0, WIDTH)[None, :]
    mask = (rows < num_rows) & (columns < width)
    places = x + rows * x_stride + columns
    values = tl.load(places, mask=mask, other=0.0)
    if ADDS:
        added = tl.load(delta + rows * delta_stride + columns, mask=mask, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(places, values, mask=mask)
    wide = values.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)
    scaled = (wide * inverse[:, None]).to(x.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out + rows * width + columns, (scaled * scale).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, for x [T, H] whose rows may be strided and weight [H]. Returns [T, H], contiguous."""
    return _launch(x, x, weight, eps, adds=False)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.add_rms_norm`: adds delta [T, H] to x [T, H] in place and returns the norm of the sum."""
    return _launch(x, delta, weight, eps, adds=True)


def _launch(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, adds: bool) -> Tensor:
    num_rows, width = x.shape
    assert x.stride(1) == delta.stride(1) == 1 and weight.is_contiguous(), "elements of a row are not neighbours"
    out = torch.empty(num_rows, width, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    padded = triton.next_power_of_2(width)
    rows = max(TILE // padded, 1)  # by the width alone, so that a row's sum has one order in every batch
    num_warps = min(max(rows * padded // 512, 2), 16)
    _rms_norm[(triton.cdiv(num_rows, rows),)](
        x, delta, weight, out, num_rows, width, x.stride(0), delta.stride(0), eps, ADDS=adds, ROWS=rows, WIDTH=padded, num_warps=num_warps
    )
    return out
