"""Attention by FlashInfer, whose place a stand-in takes: the reference's at every step, also where a captured one is read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels import choice, ops
from polymux.kernels.gpu import flashinfer_attend
from polymux.kernels.gpu.flashinfer_attend import FlashInferAttention
from polymux.kernels.gpu.plan import StepPlan
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.libraries import Unavailable

from .attend_steps import LAYER, MIXED, Case, Step
from .libraries import stand_in

DTYPES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[ModuleType]:
    with stand_in() as module:
        yield module


def attend(step: Step, plan: StepPlan, window: int | None) -> Tensor:
    """Through the door."""
    out = torch.full_like(step.q, torch.nan, memory_format=torch.contiguous_format)
    with choice.override("attend=flashinfer"):
        ops.attend_planned(step.q, ops.PagedCache(step.kv), LAYER, plan.attention[window], step.scale, out)
    return out


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


def check(case: Case) -> None:
    step = Step(case, torch.device("cpu"))
    assert_close(attend(step, step.plan(FlashInferAttention(step.spec)), case.window), step.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("head_dim", flashinfer_attend.HEAD_DIMS)
def test_a_mixed_step_is_the_references(head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    check(Case(sizes=MIXED, head_dim=head_dim, window=window, dtype=dtype, padding=2))


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("group", range(1, 9))
def test_every_ratio_of_heads_is_the_references(group: int, window: int | None) -> None:
    check(Case(sizes=((1, 40), (37, 20), (2, 15)), group=group, kv_heads=1, head_dim=64, window=window, dtype=torch.float16))


sequences = st.tuples(st.one_of(st.just(1), st.integers(2, 50)), st.one_of(st.just(0), st.integers(1, 300)))


@settings(deadline=None)
@given(
    sizes=st.lists(sequences, max_size=4) | st.lists(st.tuples(st.just(1), st.integers(0, 300)), max_size=6),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from(flashinfer_attend.HEAD_DIMS),
    window=st.one_of(st.none(), st.integers(1, 200)),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 3),
)
def test_any_step_is_the_references(**drawn: object) -> None:
    case = Case(**drawn)  # type: ignore[arg-type]
    if case.sizes or case.padding:
        check(case)


def test_padding_rows_are_zero_beside_sequences_and_alone() -> None:
    for sizes in ([(1, 20)], [(5, 20)], []):
        step = Step(Case(sizes=sizes, padding=3, head_dim=64, dtype=torch.float16), torch.device("cpu"))
        out = attend(step, step.plan(FlashInferAttention(step.spec)), None)
        assert out.isfinite().all() and not out[-3:].any()


def test_spans_may_come_in_any_order() -> None:
    step = Step(Case(sizes=MIXED, head_dim=64, dtype=torch.float16), torch.device("cpu"))
    expected, step.spans = step.expected(), step.spans[::-1]
    assert_close(attend(step, step.plan(FlashInferAttention(step.spec)), None), expected)


@pytest.mark.parametrize("windows", [(None,), (None, 40), (7, 40)])
def test_what_was_captured_reads_the_step_that_is_planned_last(windows: tuple[int | None, ...]) -> None:
    """As a captured graph does: the same calls again, with the objects of the step that was captured."""
    case = Case(sizes=[(1, 5), (1, 900), (1, 2)], head_dim=64, dtype=torch.float16, padding=1)
    steps = Steps(case, windows)
    captured = steps.planned(0)
    replays = [steps.capture(captured, window) for window in windows]
    steps.planned(3, num_rows=8)  # another size has its own buffers and the same workspaces
    for count in (3, 1, 0, 2):
        steps.planned(count)
        for window, replay in zip(windows, replays, strict=True):
            assert_close(replay(), steps.expected(count, window))


class Steps:
    """Steps of some of a case's sequences, planned one after another in the same memory."""

    def __init__(self, case: Case, windows: tuple[int | None, ...]) -> None:
        self._step, self._windows, self._num_rows = Step(case, torch.device("cpu")), windows, len(case.sizes) + case.padding
        self._spans = self._step.spans
        self._planner = ops_planner(self._step, windows)
        self._staging = Staging(2000, torch.device("cpu"))

    def planned(self, count: int, num_rows: int | None = None) -> StepPlan:
        self._staging.begin()
        return self._planner.plan(self._spans[:count], self._windows, self._staging, num_rows or self._num_rows)

    def capture(self, plan: StepPlan, window: int | None) -> Callable[[], Tensor]:
        return lambda: attend(self._step, plan, window)

    def expected(self, count: int, window: int | None) -> Tensor:
        step = self._step
        step.case = replace(step.case, window=window, padding=self._num_rows - count)
        step.spans = self._spans[:count]
        return step.expected()


def ops_planner(step: Step, windows: tuple[int | None, ...]):
    with choice.override("attend=flashinfer"):
        return ops.step_planner(replace(step.spec, windows=windows))


def spec_of(**changes: object):
    step = Step(Case(sizes=[(1, 0)], head_dim=64, dtype=torch.float16), torch.device("cpu"))
    return replace(step.spec, **changes)


def test_a_head_size_that_the_library_lacks_is_refused_with_the_fix() -> None:
    step = Step(Case(sizes=[(1, 0)], head_dim=96, dtype=torch.float16), torch.device("cpu"))
    with pytest.raises(Unavailable, match=r"heads of 96, it has 64, 128, 256: take attend=flashinfer out of POLYMUX_KERNELS"):
        FlashInferAttention(step.spec)


def test_a_dtype_that_the_library_lacks_is_refused_with_the_fix() -> None:
    with pytest.raises(Unavailable, match=r"no attention in torch.float32, it has .*: take attend=flashinfer out"):
        FlashInferAttention(spec_of(dtype=torch.float32))


def test_bits_that_must_not_depend_on_the_batch_are_not_left_to_the_library() -> None:
    with pytest.raises(Unavailable, match="batch_invariant"):
        FlashInferAttention(spec_of(batch_invariant=True))


def test_a_library_that_does_not_compile_here_is_noticed_before_any_step(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*_: object, **__: object) -> None:
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(library.BatchPrefillWithPagedKVCacheWrapper, "plan", plan)
    with pytest.raises(Unavailable, match=r"no nvcc.*flashinfer-jit-cache"):
        FlashInferAttention(spec_of())


def test_a_step_prepared_for_another_implementation_is_not_computed() -> None:
    step = Step(Case(sizes=[(1, 9)], head_dim=64, dtype=torch.float16), torch.device("cpu"))
    plan = step.plan(FlashInferAttention(step.spec))
    with choice.override("attend=triton"), pytest.raises(AssertionError, match="FlashInferPlan was prepared for another"):
        ops.attend_planned(step.q, ops.PagedCache(step.kv), LAYER, plan.attention[None], step.scale, torch.empty_like(step.q))
