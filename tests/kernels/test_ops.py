"""Every operation of the door against its reference, over shapes, dtypes and layouts of the weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from polymux.actors.model_runner import SequenceSlice
from polymux.kernels import onednn, ops, reference
from polymux.kernels.paged import plan_writes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def test_a_thread_that_works_alone_leaves_the_others_their_threads() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=onednn.use_one_thread) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[expected.dtype], atol=TOLERANCE[expected.dtype] * scale)


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weight bound over a copy of its packed bytes, and those bytes, which must outlive it."""
    source = onednn.pack(weight)
    memory = torch.empty(len(source.memory) + onednn.ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % onednn.ALIGNMENT
    memory = memory[start : start + len(source.memory)]
    memory.copy_(torch.frombuffer(source.memory, dtype=torch.uint8))
    return onednn.bind(memory, source.metadata, tuple(weight.shape), weight.dtype), memory


def weights(layout: str, *shapes: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Dense weights, the same in the layout, and what keeps those alive."""
    if layout == "onednn" and not onednn.is_available(dtype):
        pytest.skip(f"this CPU has no packed product in {dtype}")
    dense = [torch.randn(shape).to(dtype) for shape in shapes]
    if layout == "plain":
        return dense, dense, []
    bound = [packed(weight) for weight in dense]
    return dense, [weight for weight, _ in bound], [memory for _, memory in bound]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 64), (17, 100), (5, 6, 32)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1:]).to(dtype)
    kept = x.clone()
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert torch.equal(x, kept)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert not ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotate_reads_strided_heads(dtype: torch.dtype) -> None:
    heads = torch.randn(7, 9, 24).to(dtype)
    angles = torch.randn(7, 1, 12)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1).to(dtype), angles.sin().to(dtype)
    found = ops.rotate(heads[:, :6], cos, sin)
    assert found.is_contiguous()
    assert_close(found, reference.rotate(heads[:, :6], cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "onednn"])
@pytest.mark.parametrize("num_rows", [1, 5, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products(with_bias: bool, num_rows: int, layout: str, dtype: torch.dtype) -> None:
    (w, gate, up), (w_, gate_, up_), _alive = weights(layout, (48, 100), (56, 100), (56, 100), dtype=dtype)
    x, residual = torch.randn(num_rows, 100).to(dtype), torch.randn(num_rows, 48).to(dtype)
    b, gate_b, up_b = (torch.randn(size).to(dtype) if with_bias else None for size in (48, 56, 56))
    assert_close(ops.linear(x, w_, b), reference.linear(x, w, b))
    assert_close(ops.linear_add(x, w_, b, residual), reference.linear_add(x, w, b, residual))
    assert_close(ops.gated_linear(x, gate_, gate_b, up_, up_b), reference.gated_linear(x, gate, gate_b, up, up_b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "onednn"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_by_row_a_row_has_the_same_bits_wherever_it_lies(num_threads: int, layout: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(num_threads)
    _, (w, gate, up), _alive = weights(layout, (48, 100), (515, 100), (515, 100), dtype=dtype)
    row, residual, bias = (torch.randn(size).to(dtype) for size in (100, 48, 48))
    seen: dict[str, list[Tensor]] = {"linear": [], "add": [], "gated": []}
    for place in range(16):
        x, other = torch.randn(16, 100).to(dtype), torch.randn(16, 48).to(dtype)
        x[place], other[place] = row, residual
        seen["linear"].append(ops.linear(x, w, bias, by_row=True)[place])
        seen["add"].append(ops.linear_add(x, w, bias, other, by_row=True)[place])
        seen["gated"].append(ops.gated_linear(x, gate, None, up, None, by_row=True)[place])
    for name, rows in seen.items():
        assert all(torch.equal(found, rows[0]) for found in rows), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (515, 100), (96, 33)])
def test_single_rows_are_read_out_of_a_packed_table(shape: tuple[int, int], dtype: torch.dtype) -> None:
    if not onednn.is_available(dtype):
        pytest.skip(f"this CPU has no packed product in {dtype}")
    table = torch.randn(shape).to(dtype)
    _, memory = packed(table)
    view = onednn.row_view(memory, table)
    assert view is not None
    ids = torch.randint(shape[0], (40,))
    assert torch.equal(ops.embed(view, ids, shape[1]), reference.embed(table, ids))
    assert torch.equal(ops.embed(table, ids, shape[1]), reference.embed(table, ids))


def test_rows_are_not_looked_for_in_bytes_of_another_table() -> None:
    table = torch.randn(64, 64)
    assert onednn.row_view(torch.randn(64, 64).view(-1).view(torch.uint8), table) is None


@pytest.mark.parametrize("kv", DTYPES, indirect=True)
def test_kv_write_scatters_to_slots_and_zeroes_the_rest_of_new_blocks(kv: Tensor) -> None:
    spans = [
        SequenceSlice(start=0, num_tokens=5, context_len=0, block_ids=(7,)),
        SequenceSlice(start=5, num_tokens=20, context_len=14, block_ids=(2, 0, 5)),
    ]
    k, v = (torch.randn(25, 2, 24).to(kv.dtype) for _ in range(2))
    expected, cache = kv.clone(), ops.PagedCache(kv)
    blocks = [7] * 5 + [2] * 2 + [0] * 16 + [5] * 2
    slots = [*range(5), 14, 15, *range(16), 0, 1]
    reference.kv_write(expected, 1, k, v, torch.tensor(blocks), torch.tensor(slots))
    expected[7, 1, :, :, 5:] = 0
    expected[5, 1, :, :, 2:] = 0
    ops.kv_write(cache, 1, k, v, plan_writes(spans, cache.shape, kv.device))
    assert torch.equal(kv, expected)
