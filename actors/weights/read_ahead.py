"""A checkpoint's tensors in the order in which an image wants them, read and hashed by several threads ahead of who packs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from polymux.actors.weights.checkpoint import PIECE_BYTES, Checkpoint
from polymux.actors.weights.image import memory_of
from polymux.actors.weights.parts import Part
from polymux.actors.weights.safetensors_file import TORCH_DTYPES
from polymux.transport.units import MIB

AHEAD_BYTES = 64 * MIB


class ReadAhead:
    """Iterate over it for each part's tensors, in memory; after the last, `digest` is the checkpoint's.

    Holds `AHEAD_BYTES` and a part beside what is given out.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Sequence[Part], pool: Executor) -> None:
        self._checkpoint = checkpoint
        self._parts = parts
        self._pool = pool
        self._hashes: dict[str, list[bytes]] = {}

    def __iter__(self) -> Iterator[Reading]:
        coming = deque(self._parts)
        begun: deque[Reading] = deque()
        while coming or begun:
            reading = begun.popleft() if begun else Reading(self._checkpoint, coming.popleft(), self._pool)
            while coming and sum(other.memory.nbytes for other in begun) < AHEAD_BYTES:
                begun.append(Reading(self._checkpoint, coming.popleft(), self._pool))
            self._hashes |= {name: [piece.result() for piece in pieces] for name, pieces in reading.pieces.items()}
            yield reading
            del reading  # its memory, before more is read

    @property
    def digest(self) -> str:
        return self._checkpoint.digest_of(self._hashes)


class Reading:
    """One part on its way: its tensors' bytes end to end in one memory."""

    def __init__(self, checkpoint: Checkpoint, part: Part, pool: Executor) -> None:
        self.part = part
        self._stored = {name: checkpoint.tensors[name][1] for name in part.sources}
        self._begins: dict[str, int] = {}
        end = 0
        for name, stored in self._stored.items():
            item_bytes = TORCH_DTYPES[stored.dtype].itemsize
            self._begins[name] = -(-end // item_bytes) * item_bytes  # no gap but where dtypes are mixed
            end = self._begins[name] + stored.nbytes
        self.memory = torch.empty(end, dtype=torch.uint8)
        self.pieces = {name: self._read(checkpoint, name, pool) for name in self._stored}

    def _read(self, checkpoint: Checkpoint, name: str, pool: Executor) -> list[Future[bytes]]:
        file, stored = checkpoint.tensors[name]
        file.will_read(stored.offset, stored.nbytes)
        data = memory_of(self._bytes_of(name))
        starts = checkpoint.pieces(name)
        return [pool.submit(checkpoint.read_piece, name, begin, data[begin : begin + PIECE_BYTES]) for begin in starts]

    def joined(self, dtype: torch.dtype) -> Tensor:
        """All rows of all sources; a source named twice is there twice."""
        dtypes = {TORCH_DTYPES[stored.dtype] for stored in self._stored.values()}
        if len(dtypes) == 1 and len(self._stored) == len(self.part.sources):
            columns = next(iter(self._stored.values())).shape[1:]
            return self.memory.view(dtypes.pop()).view(-1, *columns).to(dtype)
        tensors = {name: self._bytes_of(name).view(TORCH_DTYPES[s.dtype]).view(s.shape).to(dtype) for name, s in self._stored.items()}
        return torch.cat([tensors[name] for name in self.part.sources])

    def _bytes_of(self, name: str) -> Tensor:
        return self.memory[self._begins[name] : self._begins[name] + self._stored[name].nbytes]
