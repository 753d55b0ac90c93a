"""Norms, activation, and rotation with KV write against their references: odd sizes, GQA ratios, head sizes, padding and empty batches."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels import reference
from polymux.kernels.gpu import rms_norm, rotate_write, silu_mul
from polymux.kernels.paged import CacheShape

DTYPES = st.sampled_from([torch.float32, torch.float16])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
EPS = 1e-5


def random(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(0, 20), width=st.sampled_from([1, 24, 64, 100, 896, 1024, 1500]), extra=st.sampled_from([0, 8]), dtype=DTYPES)
def test_norms(num_rows: int, width: int, extra: int, dtype: torch.dtype, device: torch.device) -> None:
    x, delta = (random(seed, num_rows, width + extra, dtype=dtype, device=device)[:, :width] for seed in (1, 2))
    weight = random(3, width, dtype=dtype, device=device)
    expected_sum = x.clone()
    expected = reference.add_rms_norm(expected_sum, delta, weight, EPS)
    assert_close(rms_norm.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    assert_close(rms_norm.add_rms_norm(x, delta, weight, EPS), expected)
    assert torch.equal(x, expected_sum)


def test_the_norm_of_zeros_is_zero(device: torch.device) -> None:
    assert not rms_norm.rms_norm(torch.zeros(2, 8, device=device), torch.ones(8, device=device), EPS).any()


@settings(max_examples=15, deadline=None)
@given(num_rows=st.integers(0, 9), width=st.sampled_from([1, 100, 2048, 2500]), are_halves=st.booleans(), dtype=DTYPES)
def test_silu_mul(num_rows: int, width: int, are_halves: bool, dtype: torch.dtype, device: torch.device) -> None:
    product = random(4, num_rows, 2 * width, dtype=dtype, device=device) * 5
    gate, up = product.chunk(2, dim=1) if are_halves else (product[:, :width].contiguous(), product[:, width:].contiguous())
    kept, expected = up.clone(), reference.silu_mul(gate, up)
    assert_close(silu_mul.silu_mul(gate, up), expected)
    assert torch.equal(up, kept)


def tokens_of(spans: list[tuple[int, int]], blocks: Iterator[int]) -> Iterator[tuple[list[int], int]]:
    """The tokens of (context, tokens) spans: each one's block table and position."""
    for context, num_tokens in spans:
        table = [next(blocks) for _ in range(-(-(context + num_tokens) // 16))]
        yield from ((table, position) for position in range(context, context + num_tokens))


@settings(max_examples=30, deadline=None)
@given(
    head_dim=st.sampled_from([2, 24, 64, 96, 128, 256]),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    spans=st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 2, 15, 16, 17, 33])), max_size=3),
    padding=st.integers(0, 2),
    has_norms=st.booleans(),
    dtype=DTYPES,
    order=st.randoms(use_true_random=False),
)
def test_rotate_write(
    head_dim: int,
    num_kv_heads: int,
    group: int,
    spans: list[tuple[int, int]],
    padding: int,
    has_norms: bool,
    dtype: torch.dtype,
    order: Random,
    device: torch.device,
) -> None:
    shape = CacheShape(num_layers=2, num_kv_heads=num_kv_heads, block_size=16, head_dim=head_dim)
    blocks = iter(order.sample(range(20), 20))
    places = [(position, table[position // 16] * 16 + position % 16) for table, position in tokens_of(spans, blocks)]
    num_tokens, num_all = len(places), num_kv_heads * (group + 2)
    total = num_tokens + padding
    heads = random(5, total, num_all, head_dim, dtype=dtype, device=device)
    norms = random(6, num_all - num_kv_heads, head_dim, dtype=dtype, device=device) if has_norms else None
    table = random(7, 60, head_dim, dtype=dtype, device=device)
    positions, slots = torch.tensor([*places, *[(0, 0)] * padding], dtype=torch.int32, device=device).view(-1, 2).t().contiguous()
    count = torch.tensor([num_tokens], dtype=torch.int32, device=device)
    kv = random(8, 20, 2, 2, num_kv_heads, 16, head_dim, dtype=dtype, device=device)
    expected_kv = kv.clone()
    expected = reference.rotate_write(heads, norms, EPS, table, positions, slots, count, shape.layer_rows(expected_kv)[1], shape)
    found = rotate_write.rotate_write(heads, norms, EPS, table, positions, slots, count, shape.layer_rows(kv)[1], shape)
    assert found.shape == (total, num_kv_heads * group, head_dim)
    assert_close(found[:num_tokens], expected[:num_tokens])
    assert_close(kv, expected_kv)
