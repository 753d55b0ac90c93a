"""The benchmark's problems are what it says: its step, computed by ours, is torch's own attention over the same keys in order."""

from __future__ import annotations

import pytest
import torch

from gpu.attention_cases import NUM_LAYERS, Case, Heads, Step
from gpu.attention_peers import sdpa

HEADS = Heads(name="small", num_heads=6, num_kv_heads=2, head_dim=32)


@pytest.mark.parametrize("sizes", [((1, 40),) * 3, ((33, 0),) * 2, ((20, 50),)])
def test_a_benchmarks_step_is_torchs_own_attention(sizes: tuple[tuple[int, int], ...], device: torch.device) -> None:
    step = Step(case=Case(heads=HEADS, sizes=sizes), device=device, dtype=torch.float32)
    step.ours(step.plan())()
    theirs = sdpa(step).run()
    torch.testing.assert_close(step.out, theirs, rtol=1e-4, atol=1e-4)


def test_a_case_counts_what_must_be_read_and_computed() -> None:
    case = Case(heads=HEADS, sizes=((1, 9), (3, 2)))
    assert case.kv_bytes == (10 + 5) * 2 * 32 * 2 * 2
    assert case.flops == 4 * (10 + 3 + 4 + 5) * 6 * 32
    assert NUM_LAYERS > 1
