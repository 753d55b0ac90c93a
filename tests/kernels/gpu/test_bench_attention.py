"""The benchmark's problems are what it says: its step, computed by ours, is torch's own attention over the same keys in order."""

from __future__ import annotations

import pytest
import torch

from gpu.attention_cases import NUM_LAYERS, Case, Heads, Step
from gpu.attention_peers import flashinfer, sdpa
from polymux.kernels import reference

from .libraries import stand_in

HEADS = Heads(name="small", num_heads=6, num_kv_heads=2, head_dim=32)


@pytest.mark.parametrize("sizes", [((1, 40),) * 3, ((33, 0),) * 2, ((20, 50),)])
def test_a_benchmarks_step_is_torchs_own_attention(sizes: tuple[tuple[int, int], ...], device: torch.device) -> None:
    step = Step(case=Case(heads=HEADS, sizes=sizes), device=device, dtype=torch.float32)
    step.ours(step.plan())()
    theirs = sdpa(step).run()
    torch.testing.assert_close(step.out, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [((1, 40), (1, 7)), ((20, 50), (1, 3))])
def test_a_library_that_serves_is_measured_as_it_serves(sizes: tuple[tuple[int, int], ...]) -> None:
    heads = Heads(name="small", num_heads=6, num_kv_heads=2, head_dim=64)
    step = Step(case=Case(heads=heads, sizes=sizes), device=torch.device("cpu"), dtype=torch.float16)
    with stand_in():
        peer = flashinfer(step)
        assert peer is not None and peer.num_layers == NUM_LAYERS
        theirs = peer.run()
    spans = [(span, step.q[span.start : span.start + span.num_tokens]) for span in step.spans]
    expected = [reference.attend(q, step.kv, NUM_LAYERS - 1, span.block_ids, span.context_len, None, step.scale) for span, q in spans]
    torch.testing.assert_close(theirs, torch.cat(expected), rtol=2e-3, atol=2e-3)


def test_a_case_counts_what_must_be_read_and_computed() -> None:
    case = Case(heads=HEADS, sizes=((1, 9), (3, 2)))
    assert case.kv_bytes == (10 + 5) * 2 * 32 * 2 * 2
    assert case.flops == 4 * (10 + 3 + 4 + 5) * 6 * 32
    assert NUM_LAYERS > 1
