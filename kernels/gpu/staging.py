"""What a step needs from the host, laid end to end in one buffer and sent to the device in one copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WORD_BYTES = 4
ALIGNMENT = 4  # words: pieces begin at multiples of 16 bytes

Words = NDArray[np.int32]


class Staging:
    """A device buffer of int32 words that never moves, filled through a ring of `depth` pinned host buffers.

    `begin`, then as many `take` as there are pieces, then `send`. Equal sequences of sizes get equal addresses, so a CUDA graph that read
    the pieces of one step reads those of the next. One buffer serves one stream: it is overwritten in that stream's order.
    """

    def __init__(self, num_words: int, device: torch.device, depth: int = 2) -> None:
        pinned = device.type == "cuda"
        self._target = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._sources = [torch.zeros(num_words, dtype=torch.int32, pin_memory=pinned) for _ in range(depth)]
        self._views: list[Words] = [source.numpy() for source in self._sources]
        self._copied = [torch.cuda.Event() for _ in range(depth)] if pinned else []
        self._turn = self._used = 0

    @property
    def num_words(self) -> int:
        return self._target.shape[0]

    def begin(self) -> None:
        """Start the next step's pieces. Waits only where the copy of `depth` steps ago has not been made."""
        self._turn, self._used = (self._turn + 1) % len(self._sources), 0
        if self._copied:
            self._copied[self._turn].synchronize()

    def take(self, num_words: int) -> tuple[Words, Tensor]:
        """The next `num_words`, as the host's array to fill before `send` and as the device's tensor to read after it."""
        begin = self._used
        if begin + num_words > self.num_words:
            raise ValueError(f"a step's tables want {begin + num_words} words of a staging buffer of {self.num_words}; build it larger")
        self._used = begin + -(-num_words // ALIGNMENT) * ALIGNMENT
        return self._views[self._turn][begin : begin + num_words], self._target[begin : begin + num_words]

    def send(self) -> None:
        """Copy what was taken, in the order of the current stream; the host does not wait."""
        used = min(self._used, self.num_words)
        self._target[:used].copy_(self._sources[self._turn][:used], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
