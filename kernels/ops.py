"""The one door: what models call. A CPU has its own implementations, named here; for other devices `choice.py` says which serves each.

A CPU's pass and a GPU's join different pairs of operations, so some functions below serve one of them: `rotate` and `kv_write` are one
operation on a GPU, `rotate_write`, and there `linear_add` writes over the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymux.kernels import choice, few_rows, onednn, reference
from polymux.kernels import kv_write as _kv_write
from polymux.kernels import linear as _linear
from polymux.kernels import norm_rope_act as _fused
from polymux.kernels.attend_decode import attend_group
from polymux.kernels.attend_plan import AttentionPlan
from polymux.kernels.attend_prefill import attend_chunk
from polymux.kernels.choice import implementation
from polymux.kernels.few_rows import FewRows, Heads, Layer
from polymux.kernels.paged import CacheShape, WritePlan

if TYPE_CHECKING:
    from polymux.kernels.gpu.plan import AttendPlan, AttendSpec, StepPlan, StepPlanner


class PagedCache:
    """One worker's cache of one layout, kv [N, L, 2, Hkv, S, D], with the views and the scratch memory that the operations want."""

    def __init__(self, kv: Tensor) -> None:
        self.kv = kv
        self.shape = CacheShape.of(kv)
        self.rows = self.shape.layer_rows(kv)
        self.strips = self.shape.layer_strips(kv)
        self._scratch = torch.empty(0, dtype=kv.dtype, device=kv.device)

    def scratch(self, plan: AttentionPlan) -> Tensor:
        """Room for the plan's largest tile."""
        tiles = [*(group.tiles for group in plan.groups), *(chunk.tiles for chunk in plan.chunks)]
        wanted = max((tile.strips.shape[0] for tile in chain(*tiles)), default=0) * self.shape.block_size * self.shape.head_dim
        if wanted > self._scratch.shape[0]:
            self._scratch = torch.empty(wanted, dtype=self.kv.dtype, device=self.kv.device)
        return self._scratch


def prepare_few_rows(dtype: torch.dtype) -> None:
    """Compile now what `compile_few_rows` needs for models of `dtype`, where this machine can."""
    if dtype == torch.bfloat16 and few_rows.is_available():
        few_rows.compiled()


def compile_few_rows(layers: Sequence[Layer], final_norm: Tensor, head: Tensor, cache: PagedCache, heads: Heads) -> FewRows | None:
    """Decode steps of few sequences in one call a layer; None where only the operations below can run this model."""
    if not cache.kv.is_cpu or cache.kv.dtype != torch.bfloat16 or not head.is_mkldnn or not few_rows.is_available():
        return None
    try:
        return FewRows(layers, final_norm, head, cache.kv, heads)
    except ValueError:
        return None


def embed(table: Tensor, token_ids: Tensor, hidden_size: int) -> Tensor:
    """Rows [T, hidden_size] of a plain table [V, H] or of a packed one's row view, which has four dimensions."""
    return reference.embed(table, token_ids) if table.dim() == 2 else onednn.embed(table, token_ids)[:, :hidden_size]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.is_cpu and not choice.on_cpu:
        return _fused.rms_norm(x, weight, eps)
    normed: Tensor = implementation("rms_norm", x.device)(x, weight, eps)
    return normed


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds delta to x, both [T, H], in place; returns the norm of the sum. For sums that come from elsewhere: see `linear_add`."""
    if x.is_cpu and not choice.on_cpu:
        return _fused.rms_norm(x.add_(delta), weight, eps)
    normed: Tensor = implementation("add_rms_norm", x.device)(x, delta, weight, eps)
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _fused.rotate(x, cos, sin)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, by_row: bool = False) -> Tensor:
    """`by_row`, here and below: no row's bits may depend on which row it is, among as many."""
    return _linear.linear(x, weight, bias, by_row=by_row) if x.is_cpu else reference.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *, by_row: bool = False) -> Tensor:
    """The residual may be overwritten: a GPU's product adds to it in place, which rounds once and reads it once."""
    if x.is_cpu and not choice.on_cpu:
        return _linear.linear_add(x, weight, bias, residual, by_row=by_row)
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())


def gated_linear(x: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None, *, by_row: bool = False) -> Tensor:
    if x.is_cpu and not choice.on_cpu:
        return _linear.gated_linear(x, gate, gate_bias, up, up_bias, by_row=by_row)
    joined = None if gate_bias is not None or up_bias is not None else _side_by_side(gate, up)
    if joined is not None:
        products = reference.linear(x, joined).chunk(2, dim=1)
    else:
        products = reference.linear(x, gate, gate_bias), reference.linear(x, up, up_bias)
    inner: Tensor = implementation("silu_mul", x.device)(*products)
    return inner


def _side_by_side(first: Tensor, second: Tensor) -> Tensor | None:
    """Two plain weights [N, K] as one [2 N, K], where the second begins at the first one's end."""
    if second.data_ptr() != first.data_ptr() + first.nbytes or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    return first.as_strided((2 * first.shape[0], first.shape[1]), first.stride())


def rotate_write(cache: PagedCache, layer: int, heads: Tensor, norms: Tensor | None, eps: float, table: Tensor, plan: StepPlan) -> Tensor:
    """heads [T, Hq + 2 Hkv, D] of one product to queries [T, Hq, D] and rows of the cache; table [P, D], cosines then sines."""
    places = (plan.positions, plan.slots, plan.num_tokens)
    q: Tensor = implementation("rotate_write", heads.device)(heads, norms, eps, table, *places, cache.rows[layer], cache.shape)
    return q


def step_planner(spec: AttendSpec) -> StepPlanner:
    """Of the steps of one model, by the attention that serves its device. Raises Unavailable where that cannot serve the model."""
    from polymux.kernels.gpu.plan import StepPlanner

    return StepPlanner(spec.shape, choice.preparation(spec.device)(spec))


def attend_planned(q: Tensor, cache: PagedCache, layer: int, plan: AttendPlan, scale: float, out: Tensor) -> None:
    """q [T, Hq, D], whose keys are in the cache already; fills out [T, Hq, D], with zeros where a row is padding."""
    implementation("attend", q.device)(q, cache.kv, layer, plan, scale, out)


def kv_write(cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: WritePlan) -> None:
    """k and v [T, Hkv, D]; rows past those of the plan are padding and are not written."""
    num_tokens = plan.k_rows.shape[0]
    _kv_write.kv_write(cache.rows[layer], k[:num_tokens], v[:num_tokens], plan)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: PagedCache, layer: int, plan: AttentionPlan, scale: float, out: Tensor) -> None:
    """q [T, Hq, D], with k and v [T, Hkv, D] in the cache already; fills out [T, Hq, D] but for padding rows."""
    folded = (-1, k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    strips, scratch = cache.strips[layer], cache.scratch(plan)
    q, out = q.view(folded), out.view(folded)
    for group in plan.groups:
        attend_group(q, strips, group, scratch, scale, out)
    for chunk in plan.chunks:
        attend_chunk(q, k, v, strips, chunk, scratch, scale, out)
