"""A benchmark's attention step by other libraries, as functions to call and to time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu.attention_cases import NUM_LAYERS, Step, graph_of
from polymux.kernels.libraries import why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    run: Callable[[], Tensor]  # computes so many layers, and returns the last one's [T, Hq, D]
    num_layers: int


def sdpa(step: Step) -> Peer | None:
    """torch's own, on keys that lie in order already; None for sequences of unequal lengths, which it does not take."""
    if len(set(step.case.sizes)) > 1:
        return None
    num_tokens, context = step.case.sizes[0]
    tables = torch.tensor([span.block_ids for span in step.spans], device=step.device)
    blocks = step.kv[tables, NUM_LAYERS - 1]  # [B, n, 2, Hkv, S, D]
    k, v = (blocks[:, :, i].transpose(1, 2).flatten(2, 3)[:, :, : context + num_tokens].contiguous() for i in range(2))
    q = step.q.view(len(step.spans), num_tokens, *step.q.shape[1:]).transpose(1, 2).contiguous()
    mask = None
    if num_tokens > 1 and context:
        mask = torch.ones(num_tokens, context + num_tokens, dtype=torch.bool, device=step.device).tril(context)
    is_causal = num_tokens > 1 and not context

    def run() -> Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=step.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(step.q.shape)

    return Peer(run=run, num_layers=1)


def flashinfer(step: Step) -> Peer | None:
    """As it would serve: on the same cache, over its layers in turn, decode steps as a captured graph. None where it is not installed."""
    if why_not("flashinfer"):
        return None
    from polymux.kernels.gpu.flashinfer_attend import FlashInferAttention, attend

    plan, out = step.plan_by(FlashInferAttention(step.spec)), torch.empty_like(step.q)

    def layers() -> Tensor:
        for layer in range(NUM_LAYERS):
            attend(step.q, step.kv, layer, plan, step.scale, out)
        return out

    if not step.case.is_decode or step.device.type != "cuda":
        return Peer(run=layers, num_layers=NUM_LAYERS)
    graph = graph_of(layers)

    def replay() -> Tensor:
        graph.replay()
        return out

    return Peer(run=replay, num_layers=NUM_LAYERS)
