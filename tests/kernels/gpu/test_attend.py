"""Paged attention of a step against its reference: mixed batches, windows, ratios, head sizes, split keys, padding and stale memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.actors.model_runner import SequenceSlice
from polymux.kernels import reference
from polymux.kernels.gpu.attend import attend
from polymux.kernels.gpu.config import Chip
from polymux.kernels.gpu.plan import StepPlan
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.gpu.tiled import TiledAttention

from .attend_steps import LAYER, MIXED, NUM_LAYERS, SIZE, Case, Sizes
from .attend_steps import Step as AnyStep

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
DTYPES = [torch.float16] if torch.cuda.is_available() else list(TOLERANCE)  # each combination is compiled on a GPU


class Step(AnyStep):
    def planned(self, staging: Staging | None = None) -> StepPlan:
        chip = Chip(num_sms=self.case.num_sms, shared_bytes=Chip.of(self.device).shared_bytes)
        return self.plan(TiledAttention(self.spec, chip=chip), staging)

    def attend(self, plan: StepPlan) -> Tensor:
        out = torch.full_like(self.q, torch.nan, memory_format=torch.contiguous_format)
        attend(self.q, self.kv, LAYER, plan.attention[self.case.window], self.scale, out)
        return out


def check(case: Case, device: torch.device) -> StepPlan:
    step = Step(case, device)
    plan = step.planned()
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(step.attend(plan), step.expected(), rtol=tolerance, atol=tolerance)
    assert not plan.attention[case.window].workspace.arrived.any(), "a tile's parts are still counted"
    return plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_mixed_step_is_the_references(head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
    check(Case(sizes=MIXED, head_dim=head_dim, window=window, dtype=dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", range(1, 9))
def test_every_ratio_of_heads_packs_without_waste(group: int, dtype: torch.dtype, device: torch.device) -> None:
    check(Case(sizes=((1, 40), (37, 20), (2, 15)), group=group, kv_heads=1, dtype=dtype), device)


sequences = st.tuples(st.one_of(st.just(1), st.integers(2, 50)), st.one_of(st.just(0), st.integers(1, 300)))


@settings(max_examples=6 if torch.cuda.is_available() else 10, deadline=None)
@given(
    sizes=st.lists(sequences, min_size=1, max_size=3),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 24, 64]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 3),
    num_sms=st.sampled_from([1, 8, 64]),
)
def test_any_step_is_the_references(device: torch.device, **drawn: object) -> None:
    check(Case(**drawn), device)  # type: ignore[arg-type]


def test_fp32_is_exact_to_its_rounding(device: torch.device) -> None:
    check(Case(sizes=MIXED, head_dim=64, window=40), device)


def test_long_contexts_are_cut_into_parts_and_summed_again(device: torch.device) -> None:
    for sizes in ([(1, 1100), (1, 3)], [(20, 1000)]):
        plan = check(Case(sizes=sizes, num_sms=8), device)
        launches = plan.attention[None]
        assert max(int(launch.items[:, 9].max()) for launch in (launches.decode, launches.prefill) if launch) > 2


def test_a_row_that_sees_nothing_and_a_padding_row_are_zero(device: torch.device) -> None:
    step = Step(Case(sizes=[(1, 20)], padding=3), device)
    out = step.attend(step.planned())
    assert out[0].isfinite().all() and not out[1:].any()


def test_a_step_of_padding_alone_is_zero(device: torch.device) -> None:
    step = Step(Case(sizes=[], padding=2), device)
    assert not step.attend(step.planned()).any()


def test_plans_of_as_many_rows_share_addresses_and_grids_whatever_the_contexts(device: torch.device) -> None:
    staging = Staging(4000, device)
    seen = set()
    for sizes in ([(1, 5)], [(1, 900), (1, 2), (1, 77)], []):
        step = Step(Case(sizes=sizes, padding=4 - len(sizes)), device)
        plan = step.planned(staging)
        torch.testing.assert_close(step.attend(plan), step.expected())
        attention = plan.attention[None]
        assert attention.decode is not None and attention.prefill is None
        tensors = (plan.num_tokens, plan.positions, plan.slots, attention.decode.items)
        seen.add((*((t.data_ptr(), t.shape) for t in tensors), attention.block_ids.data_ptr(), attention.decode.config))
    assert len(seen) == 1


def test_an_invariant_row_has_the_same_bits_alone_in_a_batch_and_in_a_chunk(device: torch.device) -> None:
    def attend_with(sizes: Sizes) -> Tensor:
        step = Step(Case(sizes=sizes, batch_invariant=True, group=2), device)
        step.kv, step.q = kv, q[: sum(tokens for tokens, _ in sizes)]
        step.spans = tuple(
            SequenceSlice(start=s.start, num_tokens=s.num_tokens, context_len=s.context_len, block_ids=ids)
            for s, ids in zip(step.spans, (range(12), range(12, 24)), strict=False)
        )
        return step.attend(step.planned())

    kv = torch.randn(24, NUM_LAYERS, 2, 2, SIZE, 32, device=device)
    q = torch.randn(1, 4, 32, device=device).expand(80, -1, -1)
    alone = attend_with([(1, 150)])[0]
    assert torch.equal(attend_with([(1, 150), (7, 33)])[0], alone)
    assert torch.equal(attend_with([(60, 100)])[50], alone)
    assert torch.equal(attend_with([(9, 142)])[8], alone)


def test_blocks_far_into_a_large_arena_are_found(device: torch.device) -> None:
    """Elements past 2 ** 31: only the pages of the last block are ever touched."""
    block_words = NUM_LAYERS * 2 * SIZE * 16
    kv = torch.empty((1 << 31) // block_words + 2, NUM_LAYERS, 2, 1, SIZE, 16, dtype=torch.float16, device=device)
    last = kv.shape[0] - 1
    kv[last] = torch.randn(kv.shape[1:])
    step = Step(Case(sizes=[(3, 10)], kv_heads=1, group=1, head_dim=16, dtype=torch.float16), device)
    small, step.kv = kv[last:].clone(), kv
    step.spans = (SequenceSlice(start=0, num_tokens=3, context_len=10, block_ids=[last]),)
    expected = reference.attend(step.q, small, LAYER, [0], 10, None, step.scale)
    torch.testing.assert_close(step.attend(step.planned()), expected, rtol=1e-2, atol=1e-2)
