"""Stands in for FlashInfer where it cannot run: its wrapper of paged attention as documented, computed by plain torch.

What the library's kernels read on the device is read here from the same buffers, at each run: the block tables, and the schedule that
`plan` leaves in the wrapper's integer workspace. So a run that is repeated finds what was planned last, and a workspace that another plan
has overwritten is noticed. What the library does not take raises here too.
"""

from __future__ import annotations

import torch
from torch import Tensor

__version__ = "0.7.2"

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 8 << 20


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout in ("NHD", "HND") and backend in ("auto", "fa2", "fa3")
        buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf)
        if use_cuda_graph and any(buffer is None for buffer in buffers):
            raise ValueError("CUDA graph mode wants its buffers")
        self.device = float_workspace_buffer.device
        self._layout, self._is_fixed = kv_layout, use_cuda_graph
        self._rows, self._blocks, self._indices, self._last_lens = buffers
        self._max_rows: int | None = None
        self.reset_workspace_buffer(float_workspace_buffer, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device))

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        self._int_workspace = int_workspace_buffer

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        assert all(t.dtype == torch.int32 and t.is_cpu for t in host) and paged_kv_indices.dtype == torch.int32
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1 > 1
        assert (qo_indptr.diff() >= 0).all() and (paged_kv_indptr.diff() >= 0).all()
        assert len(paged_kv_indices) == paged_kv_indptr[-1] and paged_kv_indices.device == self.device
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        if head_dim_qk not in HEAD_DIMS or q_data_type not in DTYPES or kv_data_type not in (None, q_data_type):
            raise ValueError(f"no kernel for heads of {head_dim_qk} in {q_data_type} over {kv_data_type}")
        if num_qo_heads % num_kv_heads:
            raise ValueError("the heads do not divide")
        self._num_rows = int(qo_indptr[-1])
        if self._is_fixed:
            self._fill(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        else:
            self._rows, self._blocks, self._last_lens = (t.to(self.device, copy=True) for t in host)
            self._indices = paged_kv_indices
        schedule = torch.cat((torch.tensor([window_left]), qo_indptr, paged_kv_indptr)).to(torch.int32)
        self._scheduled = self._int_workspace.view(torch.int32)[: len(schedule)]
        self._scheduled.copy_(schedule)
        self._heads, self._kv_heads, self._head_dim, self._page_size = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self._causal, self._window_left, self._dtype = causal, window_left, q_data_type
        self._scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale

    def _fill(self, rows: Tensor, blocks: Tensor, indices: Tensor, last_lens: Tensor) -> None:
        if len(rows) != len(self._rows):
            raise ValueError("the batch size is fixed in CUDA graph mode")
        if self._max_rows is None:
            self._max_rows = self._num_rows
        if self._num_rows > self._max_rows or len(indices) > len(self._indices):
            raise ValueError("more than the buffers hold")
        self._rows.copy_(rows)
        self._blocks.copy_(blocks)
        self._indices[: len(indices)].copy_(indices)
        self._last_lens.copy_(last_lens)

    def run(self, q: Tensor, paged_kv_cache: Tensor, *, out: Tensor | None = None) -> Tensor:
        assert q.dtype == paged_kv_cache.dtype == self._dtype and q.shape == (self._num_rows, self._heads, self._head_dim)
        assert q.stride(2) == paged_kv_cache.stride(4) == 1
        pages = paged_kv_cache if self._layout == "HND" else paged_kv_cache.transpose(2, 3)
        assert pages.shape[1:] == (2, self._kv_heads, self._page_size, self._head_dim)
        assert out is None or (out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous())
        window_left, *counted = self._scheduled.tolist()
        rows, blocks = self._rows.tolist(), self._blocks.tolist()
        assert window_left == self._window_left and counted == rows + blocks, "the workspace holds another plan"
        out = torch.empty_like(q) if out is None else out
        for i, last_len in enumerate(self._last_lens.tolist()):
            own = self._indices[blocks[i] : blocks[i + 1]].long()
            length = max(len(own) - 1, 0) * self._page_size + last_len if len(own) else 0
            k, v = pages[own].permute(1, 2, 0, 3, 4).reshape(2, self._kv_heads, -1, self._head_dim)[:, :, :length].float()
            out[rows[i] : rows[i + 1]] = self._attend(q[rows[i] : rows[i + 1]].float(), k, v).to(q.dtype)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D] over k and v [Hkv, C, D], whose last T are the queries' own."""
        (num_rows, _, _), (_, length, _) = q.shape, k.shape
        if not length:
            return torch.zeros_like(q)
        group = self._heads // self._kv_heads
        scores = torch.einsum("thd,hcd->thc", q, k.repeat_interleave(group, 0)) * self._scale
        position = torch.arange(length - num_rows, length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None]
        seen = key <= position if self._causal else torch.ones_like(key <= position)
        if self._window_left >= 0:
            seen = seen & (key >= position - self._window_left)
        weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        return torch.einsum("thc,hcd->thd", weights, v.repeat_interleave(group, 0))
