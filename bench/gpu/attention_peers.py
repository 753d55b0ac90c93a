"""A benchmark's attention step by other libraries: the last layer of it, as a function to call and to time."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gpu.attention_cases import NUM_LAYERS, SIZE, Step

Peer = Callable[[], Tensor]  # returns [T, Hq, D]


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

    return run


def flashinfer(step: Step) -> Peer | None:
    """FlashInfer, on the same cache; None where it is not installed."""
    if find_spec("flashinfer") is None:
        return None
    import flashinfer as library

    def starts(counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=step.device)

    heads, dtypes = step.case.heads, {"q_data_type": step.dtype, "kv_data_type": step.dtype}
    kv = step.kv[:, NUM_LAYERS - 1].contiguous()
    ends = torch.tensor([span.context_len + span.num_tokens for span in step.spans], dtype=torch.int32, device=step.device)
    ids = torch.tensor([i for span in step.spans for i in span.block_ids], dtype=torch.int32, device=step.device)
    tables = (starts([len(span.block_ids) for span in step.spans]), ids, (ends - 1) % SIZE + 1)
    shape = (heads.num_heads, heads.num_kv_heads, heads.head_dim, SIZE)
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device=step.device)
    if all(num_tokens == 1 for num_tokens, _ in step.case.sizes):
        decode = library.BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=True)
        decode.plan(*tables, *shape, sm_scale=step.scale, **dtypes)
        return lambda: decode.run(step.q, kv)
    rows = starts([span.num_tokens for span in step.spans])
    prefill = library.BatchPrefillWithPagedKVCacheWrapper(scratch, "HND")
    prefill.plan(rows, *tables, *shape, causal=True, sm_scale=step.scale, **dtypes)
    return lambda: prefill.run(step.q, kv)
