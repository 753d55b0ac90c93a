"""Blocks to and from a slab, against plain indexing: any layers, any heads, any order of blocks."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.kernels import reference
from polymux.kernels.gpu import blocks


@st.composite
def ranges(draw: st.DrawFn, size: int) -> slice:
    first, end = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    return draw(st.sampled_from([slice(None), slice(first, end)]))


@settings(max_examples=40, deadline=None)
@given(
    layers=ranges(3),
    heads=ranges(4),
    num_blocks=st.integers(0, 5),
    head_dim=st.sampled_from([24, 64, 96]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    order=st.randoms(use_true_random=False),
)
def test_what_is_gathered_is_what_is_scattered(
    layers: slice, heads: slice, num_blocks: int, head_dim: int, dtype: torch.dtype, order: Random, device: torch.device
) -> None:
    kv = torch.randn(9, 3, 2, 4, 16, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ids = torch.tensor(order.sample(range(9), num_blocks), dtype=torch.int32, device=device)
    part = kv[:, layers, :, heads]
    found, expected = (torch.zeros(num_blocks, *part.shape[1:], dtype=dtype, device=device) for _ in range(2))
    blocks.gather_blocks(kv, ids, found, layers, heads)
    reference.gather_blocks(kv, ids, expected, layers, heads)
    assert torch.equal(found, expected)
    other, other_expected = torch.zeros_like(kv), torch.zeros_like(kv)
    blocks.scatter_blocks(other, ids, found, layers, heads)
    reference.scatter_blocks(other_expected, ids, found, layers, heads)
    assert torch.equal(other, other_expected)
    assert torch.equal(other[:, layers, :, heads][ids.long()], part[ids.long()])
