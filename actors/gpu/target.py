"""A weight image on its way to the GPU: copies on a stream of their own, an event behind each, for which the compute stream waits."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from polymux.actors.gpu.pinned import PinnedMaps, address_of, tensor_at
from polymux.actors.gpu.runtime import Event, Runtime, Stream
from polymux.transport.errors import CheckpointError
from polymux.transport.units import MIB

AHEAD_BYTES = 512 * MIB  # copies handed over and not done: how long a cancelled load is waited for, about a hundredth of a second


class ImageTarget:
    """A `weights.load.Target` over device memory. One thread puts, in the image's order; the engine's orders."""

    is_async = True

    def __init__(self, memory: Tensor, runtime: Runtime, stream: Stream, pinned: PinnedMaps) -> None:
        """`memory`: the image's bytes on the device, uint8. Made by the engine thread; copies come after what it handed over before."""
        self._memory = memory
        self._compute, self._stream, self._pinned = runtime.compute, stream, pinned
        self._vacated: Event | None = runtime.compute.record()
        self._arrivals: list[tuple[int, Event]] = []  # (bytes of the image that are there, when), rising
        self._ahead: deque[tuple[int, Event]] = deque()  # bytes of each copy that may be under way
        self._map: int | None = None

    def put(self, begin: int, data: memoryview) -> None:
        if self._map is None:
            self._map = self._pinned.use_buffer(data)
        if self._vacated is not None:
            self._stream.wait(self._vacated)
            self._vacated = None
        at = begin
        for piece in self._pinned.pieces(self._map, address_of(data), len(data)):
            self._stream.copy(self._memory[at : at + len(piece)], piece)
            at += len(piece)
        event = self._stream.record()
        self._arrivals.append((at, event))
        self._ahead.append((len(data), event))
        while sum(nbytes for nbytes, _ in self._ahead) > AHEAD_BYTES:
            self._ahead.popleft()[1].synchronize()

    def read(self, fd: int, begin: int, end: int) -> None:
        raise CheckpointError("a weight image that is not sealed cannot be loaded to a GPU; its store must run the same release")

    def content(self, source: memoryview | None) -> Tensor:
        """What it is filled from: sealed, so the same bytes."""
        assert source is not None
        return tensor_at(address_of(source), len(source)) if len(source) else torch.empty(0, dtype=torch.uint8)

    def order(self, end: int) -> None:
        for arrived, event in tuple(self._arrivals):
            if arrived >= end:
                self._compute.wait(event)
                return
        assert not end, f"bytes before {end} were not put"

    def settle(self) -> None:
        ahead, self._ahead = self._ahead, deque()
        if ahead:
            ahead[-1][1].synchronize()
        if self._map is not None:
            number, self._map = self._map, None
            self._pinned.release(number)
