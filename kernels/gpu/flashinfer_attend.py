"""Attention by FlashInfer: its paged kernels read our blocks where they lie.

One layer of the cache is [N, 2, Hkv, S, D], K and V of one block as far apart as those of any other: its layout "HND", which takes any
distance between blocks. The library plans a step on the host, once for each window, and sends what it planned in the stream's order. A step
that is padded, one token of each sequence, is planned by a wrapper of its size, whose buffers never move and whose launches depend on the
size alone, so a captured graph reads there the tables of the step that is planned last. All other steps share a wrapper that moves freely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymux.kernels.choice import VARIABLE
from polymux.kernels.gpu.plan import AttendPlan, AttendSpec, Batch
from polymux.kernels.gpu.staging import Staging
from polymux.kernels.libraries import Unavailable

LAYOUT = "HND"
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
SCRATCH_BYTES = 256 << 20  # for the partial results of split keys; the library refuses a step that wants more
SCHEDULE_BYTES = 1 << 20  # for what it plans of a step of single tokens: some 20 bytes a row, and as much for each thread block
SPLITS_HEADS = "fa2"  # its kernels that pack the heads of a group into a tile, and whose schedules captured graphs may read
REMEDY = f"take attend=flashinfer out of {VARIABLE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashInferPlan(AttendPlan):
    wrapper: _Wrapper
    num_rows: int  # that the wrapper computes; rows after them are padding
    scale: float


def attend(q: Tensor, kv: Tensor, layer: int, plan: AttendPlan, scale: float, out: Tensor) -> None:
    """As `attend.attend`, of which q and out [T, Hq, D] are fp16 or bf16."""
    assert isinstance(plan, FlashInferPlan), f"{type(plan).__name__} was prepared for another implementation"
    assert scale == plan.scale, "the scale is not the one that was planned with"
    num_rows = plan.num_rows
    if num_rows:
        plan.wrapper.run(q[:num_rows], kv[:, layer], out[:num_rows])
    if num_rows < len(out):
        out[num_rows:].zero_()


class FlashInferAttention:
    """Compiles what the model's steps will want, where the library's package for that is not there: minutes, on a machine's first time."""

    def __init__(self, spec: AttendSpec) -> None:
        """Raises Unavailable where the library cannot serve this model, or cannot be compiled here."""
        _check(spec)
        self._spec = spec
        self._library = _import()
        with torch.inference_mode(False):
            self._tables = torch.zeros(spec.max_blocks, dtype=torch.int32, device=spec.device)  # of padded steps, for all their wrappers
        self._free: dict[int | None, _Wrapper] = {}
        self._fixed: dict[tuple[int | None, int], _Wrapper] = {}
        self._schedules: dict[int | None, Tensor] = {}  # by window: those of a step are all in use at once
        self._try()

    def num_words(self, num_rows: int) -> int:
        return 0

    def stage(self, batch: Batch, window: int | None, num_rows: int | None, staging: Staging) -> Callable[[Tensor], AttendPlan]:
        return lambda block_ids: self._plan(batch, window, num_rows, block_ids)

    def _plan(self, batch: Batch, window: int | None, num_rows: int | None, block_ids: Tensor) -> FlashInferPlan:
        if num_rows is None or (batch.queries.tokens > 1).any():
            wrapper, num_sequences, num_computed = self._free_one(window), len(batch.spans), batch.num_tokens
        else:
            wrapper, num_sequences, num_computed = self._fixed_one(window, num_rows), num_rows, num_rows
        if num_sequences:
            wrapper.plan(self._spec, window, _Tables.of(batch, num_sequences, self._spec.shape.block_size), block_ids)
        return FlashInferPlan(spans=batch.spans, window=window, wrapper=wrapper, num_rows=num_computed, scale=self._spec.scale)

    def _free_one(self, window: int | None) -> _Wrapper:
        found = self._free.get(window)
        if found is None:
            with torch.inference_mode(False):
                found = self._free[window] = _Wrapper(self._library.BatchPrefillWithPagedKVCacheWrapper(self._scratch(), LAYOUT))
        return found

    def _fixed_one(self, window: int | None, num_rows: int) -> _Wrapper:
        found = self._fixed.get((window, num_rows))
        if found is None:
            with torch.inference_mode(False):
                found = self._fixed[window, num_rows] = _Wrapper(self._make_fixed(window, num_rows))
        return found

    def _make_fixed(self, window: int | None, num_rows: int) -> Any:
        def words(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self._spec.device)

        made = self._library.BatchPrefillWithPagedKVCacheWrapper(
            self._scratch(),
            LAYOUT,
            use_cuda_graph=True,
            qo_indptr_buf=words(num_rows + 1),
            paged_kv_indptr_buf=words(num_rows + 1),
            paged_kv_indices_buf=self._tables,
            paged_kv_last_page_len_buf=words(num_rows),
            backend=SPLITS_HEADS,
        )
        if window not in self._schedules:
            self._schedules[window] = torch.zeros(SCHEDULE_BYTES, dtype=torch.uint8, device=self._spec.device)
        made.reset_workspace_buffer(self._scratch(), self._schedules[window])  # in place of eight megabytes for each size
        return made

    def _scratch(self) -> Tensor:
        return self._spec.workspace.for_library(SCRATCH_BYTES)

    def _try(self) -> None:
        """Plan a step of each kind, so that whatever does not work here is said when the model is bound."""
        batch = Batch.of([_OneToken()], self._spec.shape.block_size)
        block_ids = torch.zeros(1, dtype=torch.int32, device=self._spec.device)
        try:
            for window in self._spec.windows:
                for num_rows in (1, None):
                    self._plan(batch, window, num_rows, block_ids)
        except Exception as error:  # whatever the library is, and its compiler
            raise Unavailable(
                f"flashinfer cannot plan attention here ({error!r:.300}): it wants a CUDA toolkit to compile with, or its own package "
                f"flashinfer-jit-cache; or {REMEDY}"
            ) from error


class _Wrapper:
    """One of the library's, which sends its plan from pinned memory of its own: that must have been read before the next is made."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._sent: torch.cuda.Event | None = None

    def plan(self, spec: AttendSpec, window: int | None, tables: _Tables, block_ids: Tensor) -> None:
        if self._sent is not None:
            self._sent.synchronize()
        self._wrapper.plan(
            torch.from_numpy(tables.rows),
            torch.from_numpy(tables.blocks),
            block_ids[: int(tables.blocks[-1])],
            torch.from_numpy(tables.last_lens),
            spec.num_heads,
            spec.shape.num_kv_heads,
            spec.shape.head_dim,
            spec.shape.block_size,
            causal=True,
            sm_scale=spec.scale,
            window_left=-1 if window is None else window - 1,  # how many are seen before the token itself
            q_data_type=spec.dtype,
            kv_data_type=spec.dtype,
        )
        if block_ids.is_cuda:
            self._sent = self._sent or torch.cuda.Event()
            self._sent.record()

    def run(self, q: Tensor, kv: Tensor, out: Tensor) -> None:
        self._wrapper.run(q, kv, out=out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """A step's sequences as the library counts them, on the host. Padding is a sequence of one row without any keys."""

    rows: np.ndarray[Any, np.dtype[np.int32]]  # [B + 1]: where each one's rows begin
    blocks: np.ndarray[Any, np.dtype[np.int32]]  # [B + 1]: where its block ids do
    last_lens: np.ndarray[Any, np.dtype[np.int32]]  # [B]: slots that are used of its last block, one or more

    @classmethod
    def of(cls, batch: Batch, num_sequences: int, block_size: int) -> _Tables:
        queries, count = batch.queries, len(batch.spans)
        rows = np.zeros(num_sequences + 1, np.int32)
        blocks = np.zeros(num_sequences + 1, np.int32)
        last_lens = np.ones(num_sequences, np.int32)
        ends = queries.contexts + queries.tokens
        rows[1 : count + 1] = np.cumsum(queries.tokens)
        blocks[1 : count + 1] = np.cumsum(-(-ends // block_size))
        last_lens[:count] = (ends - 1) % block_size + 1
        rows[count + 1 :] = rows[count] + np.arange(1, num_sequences - count + 1)
        blocks[count + 1 :] = blocks[count]
        return cls(rows=rows, blocks=blocks, last_lens=last_lens)


@dataclass(frozen=True, slots=True)
class _OneToken:
    start: int = 0
    num_tokens: int = 1
    context_len: int = 0
    block_ids: tuple[int, ...] = (0,)


def _check(spec: AttendSpec) -> None:
    if spec.shape.head_dim not in HEAD_DIMS:
        raise Unavailable(f"flashinfer has no attention for heads of {spec.shape.head_dim}, it has {_listed(HEAD_DIMS)}: {REMEDY}")
    if spec.dtype not in DTYPES:
        raise Unavailable(f"flashinfer has no attention in {spec.dtype}, it has {_listed(DTYPES)}: {REMEDY}")
    if spec.batch_invariant:
        raise Unavailable(f"flashinfer's attention does not promise the bits that batch_invariant does: {REMEDY}")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def _import() -> Any:
    try:
        import flashinfer
    except Exception as error:  # a broken package raises anything
        raise Unavailable(f"flashinfer cannot be imported: {error!r:.300}; or {REMEDY}") from error
    return flashinfer
