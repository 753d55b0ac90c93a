"""Blocks to and from a slab, against plain indexing: any layers, any heads, any order of blocks."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.kernels import reference
from polymux.kernels.gpu import blocks


def slab_for(part: torch.Tensor, num_blocks: int, around: tuple[int, int]) -> torch.Tensor:
    """Ones, among `around` other heads of the same slab."""
    before, after = around
    num_layers, sides, num_heads, slots, dim = part.shape[1:]
    slab = torch.ones(num_blocks, num_layers, sides, before + num_heads + after, slots, dim, dtype=part.dtype, device=part.device)
    return slab[:, :, :, before : before + num_heads]


@st.composite
def ranges(draw: st.DrawFn, size: int) -> slice:
    first, end = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    return draw(st.sampled_from([slice(None), slice(first, end)]))


@settings(max_examples=40, deadline=None)
@given(
    layers=ranges(3),
    heads=ranges(4),
    around=st.sampled_from([(0, 0), (0, 3), (2, 1)]),
    num_blocks=st.integers(0, 5),
    head_dim=st.sampled_from([24, 64, 96]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    order=st.randoms(use_true_random=False),
)
def test_what_is_gathered_is_what_is_scattered(
    layers: slice,
    heads: slice,
    around: tuple[int, int],
    num_blocks: int,
    head_dim: int,
    dtype: torch.dtype,
    order: Random,
    device: torch.device,
) -> None:
    kv = torch.randn(9, 3, 2, 4, 16, head_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ids = torch.tensor(order.sample(range(9), num_blocks), dtype=torch.int32, device=device)
    part = kv[:, layers, :, heads]
    found, expected = (slab_for(part, num_blocks, around) for _ in range(2))
    blocks.gather_blocks(kv, ids, found, layers, heads)
    reference.gather_blocks(kv, ids, expected, layers, heads)
    assert torch.equal(found, expected) and torch.equal(found, part[ids.long()])
    whole = found._base if found._base is not None else found
    assert (whole == 1).sum() - (found == 1).sum() == whole.numel() - found.numel(), "other heads of the slab were written"
    other, other_expected = torch.zeros_like(kv), torch.zeros_like(kv)
    blocks.scatter_blocks(other, ids, found, layers, heads)
    reference.scatter_blocks(other_expected, ids, found, layers, heads)
    assert torch.equal(other, other_expected)
    assert torch.equal(other[:, layers, :, heads][ids.long()], part[ids.long()])
