"""The operations that only move memory, as shares of a copy's bandwidth, with torch's own beside them; and what sampling costs a step.

Each is run in a captured graph, over more bytes than the cache holds, and compared with its reference once before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from gpu.harness import Target, attempt, copy_bytes_per_s, note, time_s
from gpu.memory_cases import VOCABULARY, Case, cases, picks_of
from polymux.kernels.gpu import pick
from polymux.kernels.row_sampling import RowPick
from polymux.kernels.sample import Draw

BUDGET_S = 45.0
SIZES = {
    "rms_norm": "16384 rows of 4096, bf16",
    "add_rms_norm": "the same with a residual added in place",
    "silu_mul": "8192 rows of 14336 from the halves of one product, bf16",
    "rotate_write": "16384 tokens of Llama 8B: 32 query heads in place, K and V into shuffled blocks",
    "gather_blocks.whole": "1024 blocks of 512 KiB, shuffled",
    "gather_blocks.one_layer": "one of 8 layers of 2048 blocks",
    "gather_blocks.half_the_heads": "4 of 8 KV heads in 4 of 8 layers of 2048 blocks",
    "scatter_blocks.whole": "the reverse",
    "scatter_blocks.one_layer": "the reverse",
    "scatter_blocks.half_the_heads": "the reverse",
    "pick.greedy": "256 rows of 151936 logits, fp32",
    "pick.drawn": "the same at temperature 1, which must read them twice",
}
DRAWS = {
    "greedy": None,
    "temperature": Draw(word=0),
    "top_k_50": Draw(word=0, top_k=50),
    "top_p_95": Draw(word=0, top_p=0.95),
    "top_k_50_top_p_95": Draw(word=0, top_k=50, top_p=0.95),
}
TARGETS = (
    *(Target(name=f"{name}.share_of_copy_bandwidth", claim=size, at_least=0.85) for name, size in SIZES.items()),
    *(
        Target(name=f"sampling.{name}.{rows}_rows_s", claim=f"next tokens of {rows} of the rows of 151936 logits: {name}", unit="s")
        for name in DRAWS
        for rows in (1, 64)
    ),
)


def measure(budget_s: float) -> dict[str, float]:
    torch.manual_seed(0)
    deadline = time.monotonic() + budget_s
    figures = attempt("sampling", _sampling)
    for case in cases():
        figures |= attempt(case.name, partial(_shares, case))
        if time.monotonic() > deadline:
            note(f"memory_bound: out of time after {case.name}")
            break
    return figures


def _shares(case: Case) -> dict[str, float]:
    if not case.same():
        raise AssertionError(f"{case.name} is not what its reference gives")
    least_s, name = case.nbytes / copy_bytes_per_s(), f"{case.name}.share_of_copy_bandwidth"
    figures = {name: least_s / time_s(captured(case.ours))}
    try:
        figures[f"{case.name}.torch.share_of_copy_bandwidth"] = least_s / time_s(case.torch)
    except RuntimeError as error:
        note(f"{case.name}: torch could not run it: {error!r:.200}")
    return figures


def _sampling() -> dict[str, float]:
    """Logits as a trained model has them: most of the probability on a few hundred tokens."""
    figures = {}
    logits = torch.randn(64, VOCABULARY, device="cuda") * 2
    logits[:, torch.randperm(VOCABULARY, device="cuda")[:300]] += torch.linspace(4, 14, 300, device="cuda")
    for name, draw in DRAWS.items():
        for rows in (1, 64):
            picks = picks_of([RowPick(draw=draw, seed=row) for row in range(rows)])
            part = logits[:rows]
            figures[f"sampling.{name}.{rows}_rows_s"] = time_s(captured(lambda part=part, picks=picks: pick.pick(part, picks)))  # type: ignore[misc]
    return figures


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as a graph, after it has been compiled: launches cost what they cost in serving."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
