"""Products with weights on the CPU, packed or plain: a packed weight takes the bias, the activation and the second operand along."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from polymux.kernels import onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return onednn.linear(x, weight, bias) if weight.is_mkldnn else F.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """As `reference.linear_add`; packed, the product and the sum are rounded once."""
    if weight.is_mkldnn:
        return onednn.linear_binary(x, weight, bias, residual, "add")
    return F.linear(x, weight, bias).add_(residual)


def gated_linear(x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None) -> Tensor:
    """As `reference.gated_linear`; packed, activation and product ride in the two matrix products, which beats one fused product."""
    if gate.is_mkldnn:
        return onednn.linear_binary(x, up, up_bias, onednn.linear(x, gate, gate_bias, "swish"), "mul")
    return F.silu(F.linear(x, gate, gate_bias), inplace=True).mul_(F.linear(x, up, up_bias))
