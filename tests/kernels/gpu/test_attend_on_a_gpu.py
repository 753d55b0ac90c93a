"""What only a GPU shows of attention: bf16, captured steps, parts that finish in any order, and caches past 2 ** 31 elements."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpu.attention_cases import Case, Heads, Step, graph_of
from polymux.kernels import reference
from polymux.kernels.gpu.attend import attend
from polymux.kernels.gpu.config import Chip, Tiles
from polymux.kernels.gpu.plan import StepPlanner
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.gpu.tiled import TiledAttention
from polymux.kernels.paged import CacheShape

pytestmark = pytest.mark.gpu
LAYER = 3


def expected(step: Step, spans: Sequence | None = None) -> Tensor:
    rows = []
    for span in step.spans if spans is None else spans:
        q = step.q[span.start : span.start + span.num_tokens]
        rows.append(reference.attend(q, step.kv, LAYER, span.block_ids, span.context_len, None, step.scale))
    return torch.cat(rows)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_bf16_is_the_references(head_dim: int) -> None:
    heads = Heads(name="", num_heads=14, num_kv_heads=2, head_dim=head_dim)
    step = Step(case=Case(heads=heads, sizes=((1, 4000), (700, 1300), (1, 0), (130, 0), (1, 17))))
    step.ours(step.plan())()
    torch.testing.assert_close(step.out, expected(step), rtol=2e-2, atol=2e-2)


def test_parts_that_finish_in_any_order_give_the_same_bits() -> None:
    heads = Heads(name="", num_heads=8, num_kv_heads=4, head_dim=128)
    step = Step(case=Case(heads=heads, sizes=((1, 30000), (1, 7000), (40, 20000), (1, 100))))
    tiles = Tiles.choose(128, 2, 2, Chip.of(step.device), batch_invariant=False)
    plan = step.plan(tiles)
    run = step.ours(plan)
    run()
    first = step.out.clone()
    torch.testing.assert_close(first, expected(step), rtol=2e-2, atol=2e-2)
    for _ in range(200):
        step.out.fill_(torch.nan)
        run()
        assert torch.equal(step.out, first)
    assert not plan.workspace.arrived.any()


def test_a_captured_step_serves_other_contexts() -> None:
    heads = Heads(name="", num_heads=8, num_kv_heads=2, head_dim=128)
    step = Step(case=Case(heads=heads, sizes=((1, 3000), (1, 500), (1, 20), (1, 1))))
    device, num_rows = step.device, 8
    planner = StepPlanner(CacheShape.of(step.kv), TiledAttention(step.spec))
    staging = Staging(planner.num_words(num_rows, step.kv.shape[0]), device)
    q = torch.zeros(num_rows, *step.q.shape[1:], dtype=step.q.dtype, device=device)
    out = torch.empty_like(q)

    def planned(count: int):
        staging.begin()
        plan = planner.plan(step.spans[:count], [None], staging, num_rows)
        return plan.attention[None]

    q[:4] = step.q
    captured = planned(0)
    graph = graph_of(lambda: attend(q, step.kv, LAYER, captured, step.scale, out))
    for count in (4, 1, 3):
        planned(count)
        out.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(out[:count], expected(step, step.spans[:count]), rtol=2e-2, atol=2e-2)
        assert not out[count:].any()
