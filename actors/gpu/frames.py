"""Where the inputs and outputs of planned steps lie: in buffers that never move, so that captured graphs find them.

A decode step reads, on the device, the tokens that the step before it drew there (`feed`), and writes its own to the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polymux.actors.models.config import ArchConfig
from polymux.kernels import ops
from polymux.kernels.gpu.plan import AttendSpec, StepPlanner, Workspace
from polymux.kernels.gpu.staging import ALIGNMENT, Staging
from polymux.kernels.libraries import Unavailable
from polymux.kernels.paged import CacheShape, Span
from polymux.kernels.row_sampling import PICK_WORDS
from polymux.transport.errors import ConfigError

ROW_COUNTS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)  # a decode step is padded to one of these
ROW_STEP = 32  # beyond the last of them


def padded_rows(num_rows: int) -> int:
    if num_rows <= ROW_COUNTS[-1]:
        return next(count for count in ROW_COUNTS if count >= num_rows)
    return -(-num_rows // ROW_STEP) * ROW_STEP


class Frame:
    """Of one architecture shape and dtype; models that are alike share it, since steps are one after another."""

    def __init__(
        self, config: ArchConfig, vocab_size: int, shape: CacheShape, dtype: torch.dtype, shared: FrameSettings, device: torch.device
    ) -> None:
        """`vocab_size`: of the logits; `config` may be a rank's share. Raises ConfigError where the attention asked for cannot serve it."""
        self.num_rows = padded_rows(shared.max_num_seqs)
        self.windows = tuple(dict.fromkeys(config.windows))
        self.block_size = shape.block_size
        num_blocks = self.num_rows * -(-config.max_position_embeddings // shape.block_size)
        spec = AttendSpec(
            shape=shape,
            num_heads=config.num_heads,
            dtype=dtype,
            scale=config.head_dim**-0.5,
            windows=self.windows,
            max_blocks=num_blocks,
            device=device,
            workspace=shared.workspace,
            batch_invariant=shared.batch_invariant,
        )
        self.planner = _planner(spec)
        own_words = (2 + PICK_WORDS) * self.num_rows + 3 * ALIGNMENT
        self.decode = Staging(self.planner.num_words(self.num_rows, num_blocks, len(self.windows)) + own_words, device)
        self._prefill: Staging | None = None
        self._device = device
        self.feed = torch.zeros(2 * self.num_rows, dtype=torch.int64, device=device)  # drawn by the last step; then, known to the host
        self.results = torch.zeros(2 * self.num_rows, dtype=torch.int64, device=device)  # tokens, then whether their logits were finite
        self.logits = torch.zeros(self.num_rows, vocab_size, dtype=torch.float32, device=device)

    def prefill(self, num_rows: int, spans: Sequence[Span]) -> Staging:
        """Room for a step that no graph reads: it may be another buffer each time."""
        num_blocks = sum(-(-(span.context_len + span.num_tokens) // self.block_size) for span in spans)
        wanted = self.planner.num_words(num_rows, num_blocks, len(self.windows)) + 2 * num_rows + 2 * ALIGNMENT
        if self._prefill is None or self._prefill.num_words < wanted:
            self._prefill = Staging(2 * wanted, self._device)
        return self._prefill


def _planner(spec: AttendSpec) -> StepPlanner:
    try:
        return ops.step_planner(spec)
    except Unavailable as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameSettings:
    """What the frames of one worker have in common."""

    workspace: Workspace
    max_num_seqs: int
    batch_invariant: bool
