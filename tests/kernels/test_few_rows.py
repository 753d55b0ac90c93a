"""The compiled decode step against the reference operations, over shapes that fill no vector and contexts that fill no block."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels import few_rows, onednn, reference
from polymux.kernels.few_rows import MAX_ROWS, FewRows, Heads

pytestmark = pytest.mark.skipif(not few_rows.is_available(), reason="numba, or packed bf16, is not here")
EPS, NUM_BLOCKS, SLOTS = 1e-5, 16, 16  # blocks for each of so many rows, of which 13 are used at most


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's weights, dense or packed."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def packed(self) -> Layer:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("qkv", "output", "gate", "up", "down"):
            values[name] = onednn.pack(values[name]).owner
        return Layer(**values)

    def wide(self) -> Layer:
        return Layer(**{f.name: None if getattr(self, f.name) is None else getattr(self, f.name).float() for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Case:
    num_kv_heads: int
    group: int
    head_dim: int
    size: int
    inner: int
    with_bias: bool
    with_head_norms: bool
    lengths: list[int]
    window: int | None
    num_threads: int
    may_use_tiles: bool

    def layer(self) -> Layer:
        heads, kv = self.num_kv_heads * self.group, self.num_kv_heads
        rows = {"qkv": (heads + 2 * kv) * self.head_dim, "output": self.size, "gate": self.inner, "up": self.inner, "down": self.size}
        columns = {"qkv": self.size, "output": heads * self.head_dim, "gate": self.size, "up": self.size, "down": self.inner}
        weights = {name: bf16(rows[name], columns[name]) * columns[name] ** -0.5 for name in rows}
        biases = {f"{name}_bias": bf16(rows[name]) if self.with_bias else None for name in rows}
        norms = {"input_norm": 1 + bf16(self.size) / 8, "post_norm": 1 + bf16(self.size) / 8}
        head_norms = 1 + bf16(heads + kv, self.head_dim) / 8 if self.with_head_norms else None
        return Layer(**weights, **biases, **norms, head_norms=head_norms)


cases = st.builds(
    Case,
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 17]),
    head_dim=st.sampled_from([32, 64]),
    size=st.integers(8, 150),
    inner=st.integers(8, 300),
    with_bias=st.booleans(),
    with_head_norms=st.booleans(),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=MAX_ROWS),
    window=st.none() | st.integers(1, 100),
    num_threads=st.integers(1, 3),
    may_use_tiles=st.booleans(),
)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def reference_layer(layer: Layer, x: Tensor, kv: Tensor, case: Case, tables: list[list[int]], cos: Tensor, sin: Tensor) -> Tensor:
    """In fp32, but for K and V, which are rounded as the cache is; kv is written."""
    num_heads, size = case.num_kv_heads * case.group, case.head_dim
    hidden = reference.rms_norm(x, layer.input_norm, EPS)
    heads = reference.linear(hidden, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, size)
    qk, v = heads[:, : num_heads + case.num_kv_heads], heads[:, num_heads + case.num_kv_heads :]
    if layer.head_norms is not None:
        qk = reference.rms_norm(qk, layer.head_norms, EPS)
    qk = reference.rotate(qk, cos, sin)
    attended = torch.empty(x.shape[0], num_heads, size)
    for row, (length, table) in enumerate(zip(case.lengths, tables, strict=True)):
        at = torch.tensor([table[length // SLOTS]]), torch.tensor([length % SLOTS])
        reference.kv_write(kv, 0, qk[row : row + 1, num_heads:].to(kv.dtype), v[row : row + 1].to(kv.dtype), *at)
        q = qk[row : row + 1, :num_heads]
        attended[row] = reference.attend(q, kv, 0, table, length, case.window, size**-0.5)
    x = reference.linear_add(attended.flatten(1), layer.output, layer.output_bias, x)
    hidden = reference.rms_norm(x, layer.post_norm, EPS)
    hidden = reference.gated_linear(hidden, layer.gate, layer.gate_bias, layer.up, layer.up_bias)
    return reference.linear_add(hidden, layer.down, layer.down_bias, x)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.03, atol=0.03 * float(expected.float().abs().max()))


@settings(max_examples=60, deadline=None)
@given(case=cases, seed=st.integers(0, 1000))
def test_a_step_is_what_the_reference_computes(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(case.num_threads)
    layer, num_rows = case.layer(), len(case.lengths)
    final_norm, head = 1 + bf16(case.size) / 8, bf16(101, case.size) * case.size**-0.5
    kv = bf16(16 * NUM_BLOCKS, 1, 2, case.num_kv_heads, SLOTS, case.head_dim)
    order = iter(torch.randperm(kv.shape[0]).tolist())
    tables = [[next(order) for _ in range(length // SLOTS + 1)] for length in case.lengths]
    x, angles = bf16(num_rows, case.size), torch.randn(num_rows, 1, case.head_dim // 2)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1).bfloat16(), angles.sin().bfloat16()
    expected_kv = kv.clone()
    for table, length in zip(tables, case.lengths, strict=True):
        if length % SLOTS == 0:
            expected_kv[table[-1], 0] = 0  # a block that the token begins
    expected = reference_layer(layer.wide(), x.float(), expected_kv, case, tables, cos.float(), sin.float())
    heads = Heads(num_heads=case.num_kv_heads * case.group, eps=EPS, scale=case.head_dim**-0.5, windows=[case.window])
    compiled = FewRows([layer.packed()], final_norm, onednn.pack(head).owner, kv, heads)
    if not case.may_use_tiles:
        compiled.without_tiles()
    compiled.begin(x, tables, case.lengths, cos, sin)
    compiled.layers(0, 1)
    assert_close(x, expected)
    assert_close(kv, expected_kv)
    assert_close(compiled.logits(), reference.linear(reference.rms_norm(x, final_norm, EPS), head))


@pytest.mark.parametrize("shape", [(48, 100), (33, 70), (896, 64), (7, 1030), (500, 31)])
@pytest.mark.parametrize("for_few_rows", [False, True])
def test_the_described_layout_is_the_one_found_by_comparing_rows(shape: tuple[int, int], for_few_rows: bool) -> None:
    weight = bf16(*shape)
    packed = onednn.pack(weight, for_few_rows=for_few_rows)
    view, layout = onednn.row_view(torch.frombuffer(packed.memory, dtype=torch.uint8), weight), onednn.pair_layout(packed.owner)
    assert view is not None
    assert layout is not None
    assert tuple(view.shape[1:]) == (layout.pairs, layout.block, 2)


def test_a_plain_weight_has_no_layout_of_pairs() -> None:
    assert onednn.pair_layout(bf16(32, 32)) is None


@pytest.mark.parametrize("has_dot", [False, True])
@pytest.mark.parametrize(("num_rows", "num_blocks", "lines"), [(1, 4, 2), (3, 2, 2), (4, 1, 4)])
def test_sums_of_pairs_with_and_without_the_instruction(
    num_rows: int, num_blocks: int, lines: int, has_dot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba import njit

    from polymux.kernels import packed_dot

    if has_dot and not packed_dot.HAS_DOT:
        pytest.skip("this CPU has no such instruction")
    monkeypatch.setattr(packed_dot, "HAS_DOT", has_dot)
    dots = packed_dot.dot_group(num_rows, num_blocks, lines)

    @njit  # type: ignore[untyped-decorator]
    def run(weight: int, stride: int, x: int, pairs: int, out: int) -> None:
        dots(weight, stride, x, pairs, out)

    block, pairs = 16 * lines, 37
    weight = torch.empty(num_blocks * pairs * block * 2 + 32, dtype=torch.bfloat16)
    weight = weight[-weight.data_ptr() % 64 // 2 :][: num_blocks * pairs * block * 2].view(num_blocks, pairs, block, 2)
    weight.copy_(bf16(*weight.shape))
    x, out = bf16(num_rows, 2 * pairs), np.zeros((num_blocks, packed_dot.MAX_ROWS, block), np.float32)
    run(weight.data_ptr(), 4 * pairs * block, x.data_ptr(), pairs, out.ctypes.data)
    expected = torch.einsum("bpnk,rpk->brn", weight.float(), x.float().view(num_rows, pairs, 2))
    torch.testing.assert_close(torch.from_numpy(out[:, :num_rows]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lines", [2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ending", ["plain", "rounded", "added"])
def test_sums_go_where_they_are_to_with_a_bias_or_none(ending: str, biased: bool, lines: int) -> None:
    from numba import njit

    from polymux.kernels import packed_sums

    end = packed_sums.end_rows(packed_sums.Ending(ending), lines)

    @njit  # type: ignore[untyped-decorator]
    def run(sums: int, rows: int, out: int, pitch: int, bias: int) -> None:
        end(sums, rows, out, pitch, bias)

    num_rows, columns = 3, 16 * lines
    sums, bias = torch.randn(num_rows, columns), bf16(columns) if biased else None
    out = torch.full((num_rows, columns + 5), 7.0, dtype=torch.bfloat16 if ending == "added" else torch.float32)
    run(sums.data_ptr(), num_rows, out.data_ptr(), out.stride(0) * out.itemsize, 0 if bias is None else bias.data_ptr())
    expected = sums + bias.float() if bias is not None else sums
    expected = {"plain": expected, "rounded": expected.bfloat16().float(), "added": (expected + 7.0).bfloat16()}[ending]
    assert torch.equal(out[:, :columns], expected)
    assert torch.equal(out[:, columns:], torch.full((num_rows, 5), 7.0, dtype=out.dtype))


@pytest.mark.parametrize("lines", [2, 4])
def test_gates_open_by_silu_at_any_size_of_number(lines: int) -> None:
    from numba import njit

    from polymux.kernels import packed_sums

    end = packed_sums.end_gated_rows(lines)

    @njit  # type: ignore[untyped-decorator]
    def run(gates: int, ups: int, rows: int, out: int, pitch: int) -> None:
        end(gates, ups, rows, out, pitch)

    columns = 16 * lines
    gates, ups = torch.linspace(-300, 300, 3 * columns).view(3, columns), torch.randn(3, columns)
    gates[0, 0] = math.nan
    out = torch.zeros(3, columns, dtype=torch.bfloat16)
    run(gates.data_ptr(), ups.data_ptr(), 3, out.data_ptr(), 2 * columns)
    torch.testing.assert_close(out, (torch.nn.functional.silu(gates) * ups).bfloat16(), rtol=1e-2, atol=1e-30, equal_nan=True)
