"""Products with weights on the CPU, packed or plain: a packed weight takes the bias, the activation and the second operand along.

`by_row` asks that the bits of a row do not depend on which row it is. oneDNN's products have that; the BLAS behind plain weights may treat
the last rows otherwise, so there each row becomes a product of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from polymux.kernels import onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, by_row: bool = False) -> Tensor:
    if weight.is_mkldnn:
        return onednn.linear(x, weight, bias)
    if not by_row:
        return F.linear(x, weight, bias)
    product = torch.bmm(x.unsqueeze(1), weight.t().expand(x.shape[0], -1, -1)).squeeze(1)
    return product if bias is None else product.add_(bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, by_row: bool = False) -> Tensor:
    """As `reference.linear_add`; packed, the product and the sum are rounded once."""
    if weight.is_mkldnn:
        return onednn.linear_binary(x, weight, bias, residual, "add")
    return linear(x, weight, bias, by_row=by_row).add_(residual)


def gated_linear(x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, *, by_row: bool = False) -> Tensor:
    """As `reference.gated_linear`; packed, activation and product ride in the two matrix products, which beats one fused product."""
    if gate.is_mkldnn:
        return onednn.linear_binary(x, up, up_bias, onednn.linear(x, gate, gate_bias, "swish"), "mul")
    return F.silu(linear(x, gate, gate_bias, by_row=by_row), inplace=True).mul_(linear(x, up, up_bias, by_row=by_row))
