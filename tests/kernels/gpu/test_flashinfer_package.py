"""The real FlashInfer, where it is installed: it takes what we pass and the stand-in takes no more; on a GPU it computes the reference."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gpu.attention_cases import NUM_LAYERS, Case, Heads, Step, graph_of
from polymux.kernels import reference
from polymux.kernels.gpu.flashinfer_attend import DTYPES, HEAD_DIMS, FlashInferAttention, attend
from polymux.kernels.gpu.plan import StepPlan, StepPlanner
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.paged import CacheShape

from .libraries import stand_in

WINDOWS = (None, 1, 700)


@pytest.fixture(scope="module", autouse=True)
def real() -> ModuleType:
    return pytest.importorskip("flashinfer", exc_type=ImportError)


@pytest.mark.parametrize("method", ["__init__", "reset_workspace_buffer", "plan", "run"])
def test_the_stand_ins_parameters_are_the_librarys(method: str, real: ModuleType) -> None:
    with stand_in() as module:
        ours = inspect.signature(getattr(module.BatchPrefillWithPagedKVCacheWrapper, method)).parameters
    theirs = inspect.signature(getattr(real.BatchPrefillWithPagedKVCacheWrapper, method)).parameters
    by_place = [name for name, parameter in ours.items() if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert by_place == list(theirs)[: len(by_place)]
    for name, parameter in ours.items():
        assert name in theirs
        found = theirs[name].default
        assert (found is inspect.Parameter.empty) == (parameter.default is inspect.Parameter.empty), name
        if not isinstance(parameter.default, torch.dtype):  # theirs are strings
            assert found == parameter.default, name


def expected(step: Step, window: int | None, layer: int) -> Tensor:
    rows = []
    for span in step.spans:
        q = step.q[span.start : span.start + span.num_tokens]
        rows.append(reference.attend(q, step.kv, layer, span.block_ids, span.context_len, window, step.scale))
    return torch.cat(rows)


def planned(step: Step, windows: tuple[int | None, ...], num_rows: int) -> StepPlan:
    spec = replace(step.spec, windows=windows)
    planner = StepPlanner(CacheShape.of(step.kv), FlashInferAttention(spec))
    staging = Staging(planner.num_words(num_rows, step.kv.shape[0], len(windows)), step.device)
    staging.begin()
    return planner.plan(step.spans, windows, staging, num_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_mixed_steps_and_windows_are_the_references(head_dim: int, dtype: torch.dtype) -> None:
    heads = Heads(name="", num_heads=14, num_kv_heads=2, head_dim=head_dim)
    for sizes in (((1, 4000), (700, 1300), (1, 0), (130, 0), (1, 17)), ((1, 4000), (1, 0), (1, 15), (1, 16))):
        step = Step(case=Case(heads=heads, sizes=sizes), dtype=dtype)
        num_tokens = step.q.shape[0]
        q = torch.cat((step.q, torch.zeros_like(step.q[:2])))  # two rows of padding
        plan = planned(step, WINDOWS, num_tokens + 2)
        for window in WINDOWS:
            out = torch.full_like(q, torch.nan)
            attend(q, step.kv, NUM_LAYERS - 1, plan.attention[window], step.scale, out)
            torch.testing.assert_close(out[:num_tokens], expected(step, window, NUM_LAYERS - 1), rtol=2e-2, atol=2e-2)
            assert not out[num_tokens:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("windows", [(None,), (None, 300)])
def test_a_captured_step_serves_other_contexts_and_sizes_share_their_workspace(windows: tuple[int | None, ...]) -> None:
    heads = Heads(name="", num_heads=8, num_kv_heads=2, head_dim=128)
    step = Step(case=Case(heads=heads, sizes=((1, 3000), (1, 500), (1, 20), (1, 1))))
    device, spans, num_rows = step.device, step.spans, 8
    planner = StepPlanner(CacheShape.of(step.kv), FlashInferAttention(replace(step.spec, windows=windows)))
    staging = Staging(planner.num_words(2 * num_rows, step.kv.shape[0], len(windows)), device)
    q = torch.zeros(num_rows, *step.q.shape[1:], dtype=step.q.dtype, device=device)
    q[:4] = step.q
    outs = {window: torch.empty_like(q) for window in windows}

    def plan_of(count: int, rows: int = num_rows) -> StepPlan:
        staging.begin()
        return planner.plan(spans[:count], windows, staging, rows)

    captured = plan_of(0)

    def run() -> None:
        for window, out in outs.items():
            attend(q, step.kv, NUM_LAYERS - 1, captured.attention[window], step.scale, out)

    graph = graph_of(run)
    plan_of(4, 2 * num_rows)
    for count in (4, 1, 3, 0):
        plan_of(count)
        for out in outs.values():
            out.fill_(torch.nan)
        graph.replay()
        for window, out in outs.items():
            if count:
                step.spans = spans[:count]
                torch.testing.assert_close(out[:count], expected(step, window, NUM_LAYERS - 1), rtol=2e-2, atol=2e-2)
            assert not out[count:].any()


@pytest.mark.gpu
def test_steps_that_the_host_hands_over_ahead_keep_their_own_tables() -> None:
    """Plans are made while the device is busy with steps before them."""
    heads = Heads(name="", num_heads=8, num_kv_heads=2, head_dim=128)
    step = Step(case=Case(heads=heads, sizes=tuple((1, 200 * i) for i in range(1, 9))))
    planner = StepPlanner(CacheShape.of(step.kv), FlashInferAttention(step.spec))
    staging = Staging(planner.num_words(8, step.kv.shape[0]), step.device)
    spans, full = step.spans, expected(step, None, 0)
    found = []
    busy = torch.randn(8192, 8192, device=step.device)
    for count in (8, 2, 5, 1, 7, 3) * 5:
        busy = busy @ busy * 1e-2
        staging.begin()
        plan = planner.plan(spans[:count], [None], staging, 8).attention[None]
        out = torch.empty_like(step.q)
        attend(step.q, step.kv, 0, plan, step.scale, out)
        found.append((count, out))
    for count, out in found:
        torch.testing.assert_close(out[:count], full[:count], rtol=2e-2, atol=2e-2)
