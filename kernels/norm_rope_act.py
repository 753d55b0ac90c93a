"""RMSNorm and rotary embedding on the CPU, in as few passes over memory as torch allows. SwiGLU is part of its products: see linear.py."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`; half the passes, since the norm is one reduction and the scaling works in place."""
    x32 = x.float()
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    inverse = torch.addcmul(_scalar(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    scaled = x32 * inverse if x32 is x else x32.mul_(inverse).to(x.dtype)
    return scaled.mul_(weight)


@cache
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rotate`; x may be strided, the result is contiguous. In half precision each half is rounded twice, not thrice."""
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin, value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin)
    return turned
