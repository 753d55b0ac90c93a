"""Paged attention of one layer, against what this GPU's memory and matrix units do, with torch's own and FlashInfer's beside it.

Decode reads keys and values once and computes little, so it is compared with a copy's bandwidth; prefill computes, and is compared with a
matrix product. Each step goes over the layers of one cache, in a captured graph, so launches cost what they cost in serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpu.attention_cases import LLAMA_8B, NUM_LAYERS, QWEN_7B, QWEN_HALF_B, Case, Heads, Step, graph_of
from gpu.attention_peers import Peer, flashinfer, sdpa
from gpu.harness import Target, attempt, copy_bytes_per_s, matrix_flops_per_s, note, time_s
from polymux.kernels.libraries import why_not

BUDGET_S = 75.0
ROUNDS = 12
TOLERANCE = 2e-2  # of the norm of the difference to torch's own attention, in bf16

MODELS = (LLAMA_8B, QWEN_7B)
DECODE = {  # batch, context
    "32x2k": (32, 2048),
    "64x2k": (64, 2048),
    "32x8k": (32, 8192),
    "128x4k": (128, 4096),
}
PREFILL = {
    "prompt_8k": ((8192, 0),),
    "prompts_4x2k": ((2048, 0),) * 4,
    "chunk_2k_on_6k": ((2048, 6144),),
}
TARGETS = (
    Target(
        name="decode.share_of_copy_bandwidth",
        claim="decode attention's bytes a second over a copy's, the worst of batches from 32 and contexts from 2k of Llama 8B and Qwen 7B",
        at_least=0.85,
    ),
    Target(
        name="decode.ragged.share_of_copy_bandwidth",
        claim="the same for 64 sequences of 512 to 8k tokens, Llama 8B",
        at_least=0.85,
    ),
    *(
        Target(name=f"prefill.{name}.share_of_matrix_rate", claim=f"its rate over a bf16 product's, Llama 8B: {text}", at_least=0.6)
        for name, text in (
            ("prompt_8k", "a prompt of 8192 tokens"),
            ("prompts_4x2k", "four of 2048"),
            ("chunk_2k_on_6k", "a chunk of 2048 on a cached prefix of 6144"),
        )
    ),
    Target(
        name="decode.llama_8b.64x2k.flashinfer.share_of_copy_bandwidth",
        claim="by FlashInfer, where it is installed: 64 sequences of 2k, Llama 8B, its wrapper's captured graph on our blocks",
    ),
    Target(
        name="prefill.prompt_8k.flashinfer.share_of_matrix_rate",
        claim="by FlashInfer, where it is installed: a prompt of 8192 tokens, Llama 8B",
    ),
    Target(name="decode.one_sequence_s", claim="a sequence of 4096 tokens, Qwen 0.5B, one layer", unit="s"),
)


def measure(budget_s: float) -> dict[str, float]:
    torch.manual_seed(0)
    deadline = time.monotonic() + budget_s
    figures: dict[str, float] = {}
    if why_not("flashinfer"):
        note(f"attention: {why_not('flashinfer')}")
    for name, work in _parts():
        figures |= attempt(name, work)
        if time.monotonic() > deadline:
            note(f"attention: out of time after {name}")
            break
    batches = [f"decode.{heads.name}.{name}.share_of_copy_bandwidth" for heads in MODELS for name in DECODE]
    if all(name in figures for name in batches):
        figures["decode.share_of_copy_bandwidth"] = min(figures[name] for name in batches)
    return figures


def _parts() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """What takes each case's figures. What is promised comes first, and last a library that may have to be compiled."""
    problems = list(_problems())
    for one in problems:
        yield one.name, partial(_ours, one)
    yield "decode.one_sequence", _one_sequence
    if not why_not("flashinfer"):
        for one in problems:
            yield f"{one.name}.flashinfer", partial(_by_flashinfer, one)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    name: str
    case: Case

    @property
    def figure(self) -> str:
        return "share_of_copy_bandwidth" if self.case.is_decode else "share_of_matrix_rate"

    @property
    def least_s(self) -> float:
        """What the hardware needs for it."""
        return self.case.kv_bytes / copy_bytes_per_s() if self.case.is_decode else self.case.flops / matrix_flops_per_s()


def _problems() -> Iterator[Problem]:
    for heads in MODELS:
        for name, (batch, context) in DECODE.items():
            yield Problem(name=f"decode.{heads.name}.{name}", case=_batch(heads, batch, context))
    contexts = torch.linspace(512, 8192, 64).int()[torch.randperm(64)].tolist()
    yield Problem(name="decode.ragged", case=Case(heads=LLAMA_8B, sizes=tuple((1, context - 1) for context in contexts)))
    for name, sizes in PREFILL.items():
        yield Problem(name=f"prefill.{name}", case=Case(heads=LLAMA_8B, sizes=sizes))


def _batch(heads: Heads, batch: int, context: int) -> Case:
    return Case(heads=heads, sizes=((1, context - 1),) * batch)


def _one_sequence() -> dict[str, float]:
    seconds, _ = _time_ours(Step(case=_batch(QWEN_HALF_B, 1, 4096)))
    return {"decode.one_sequence_s": seconds}


def _ours(problem: Problem) -> dict[str, float]:
    """The time that the hardware needs over the time that was taken, by ours and by torch's own."""
    step = Step(case=problem.case)
    seconds, result = _time_ours(step)
    return {f"{problem.name}.{problem.figure}": problem.least_s / seconds} | _by_peer(problem, "sdpa", sdpa, step, result)


def _by_flashinfer(problem: Problem) -> dict[str, float]:
    step = Step(case=problem.case)
    step.ours(step.plan())()
    return _by_peer(problem, "flashinfer", flashinfer, step, step.out)


def _time_ours(step: Step) -> tuple[float, Tensor]:
    """Seconds of one layer, and the last layer's result."""
    graph = graph_of(step.ours(step.plan()))
    return time_s(graph.replay, rounds=ROUNDS) / NUM_LAYERS, step.out


def _by_peer(problem: Problem, name: str, make: Callable[[Step], Peer | None], step: Step, ours: Tensor) -> dict[str, float]:
    """Another library's figure, if it can compute this; its result must agree with ours."""
    try:
        peer = make(step)
        theirs = None if peer is None else peer.run()
    except (RuntimeError, TypeError, AttributeError, OSError, ImportError, ValueError) as error:
        note(f"{problem.name}: {name} could not run it: {error!r:.200}")
        return {}
    if peer is None or theirs is None:
        return {}
    difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not difference < TOLERANCE:
        raise AssertionError(f"{problem.name}: ours and {name}'s differ by {difference:.2g} of their norm")
    return {f"{problem.name}.{name}.{problem.figure}": problem.least_s / (time_s(peer.run, rounds=ROUNDS) / peer.num_layers)}
