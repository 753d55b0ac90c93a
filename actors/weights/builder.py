"""Build a weight image from a checkpoint: one pass over the bytes, in which they are hashed, packed for this CPU, written and checksummed.

A few threads do all of it, each a piece of a tensor or the packing of one at a time; the calling thread orders it, some `AHEAD_BYTES` ahead
of the tensor whose place in the image is decided and as many behind.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from polymux.actors.weights.checkpoint import Checkpoint, num_readers
from polymux.actors.weights.image import ALIGNMENT, CHECK_BYTES, DTYPES, LAYOUTS, ImageManifest, TensorEntry, checksum, memory_of
from polymux.actors.weights.parts import EMBEDDING, HEAD, parts_of
from polymux.actors.weights.read_ahead import AHEAD_BYTES, ReadAhead, Reading
from polymux.kernels import onednn
from polymux.transport.errors import ConfigError

ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}  # of a process that builds images: torch takes large tensors in huge pages, a tenth faster here

T = TypeVar("T")


def build_image(checkpoint: Checkpoint, fd: int, *, dtype: str, layout: str) -> ImageManifest:
    """Write the image of a checkpoint to a file or memfd, and describe it.

    `layout` "onednn" and "auto" are "plain" where this CPU cannot multiply packed weights of `dtype`. The file is cut to the image's size.
    Raises ConfigError for a layout or dtype that there is not, CheckpointError from the checkpoint's reader, and OSError; nothing writes to
    the file any more then.
    """
    if layout not in ("auto", *LAYOUTS) or dtype not in DTYPES:
        raise ConfigError(
            f"no weight image of layout {layout!r} and dtype {dtype!r}: layouts are auto, plain, onednn; dtypes {', '.join(DTYPES)}"
        )
    can_pack = layout != "plain" and onednn.is_available(DTYPES[dtype])
    as_built = _Form(dtype, "onednn" if can_pack else "plain", is_tied=checkpoint.config.tie_word_embeddings)
    groups = parts_of(checkpoint.config)
    num_threads = num_readers()
    pool = ThreadPoolExecutor(num_threads, "polymux-build", onednn.use_one_thread)
    try:
        reader = ReadAhead(checkpoint, [part for group in groups for part in group], pool)
        blocks = _in_order((pool.submit(as_built.blocks_of, reading) for reading in reader), num_threads)
        writer = _Writer(fd, pool)
        bounds = []
        for group in groups:
            start = writer.end
            for _ in group:
                for block in next(blocks):
                    writer.append(block)
            bounds.append((start, writer.end - start))
        entries = writer.finish()
        digest = reader.digest
    finally:
        pool.shutdown(cancel_futures=True)
    return ImageManifest(
        digest=digest,
        config_json=checkpoint.config_json,
        dtype=dtype,
        layout=as_built.layout,
        nbytes=writer.end,
        entries=entries,
        groups=tuple(bounds),
    )


def _in_order(work: Iterable[Future[T]], num_begun: int) -> Iterator[T]:
    """Results in the order of `work`, of which so many are begun before the first is waited for."""
    begun: deque[Future[T]] = deque()
    for future in work:
        begun.append(future)
        if len(begun) > num_begun:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


@dataclass(frozen=True, slots=True)
class _Block:
    """Bytes of the image: an entry, its place still open, and perhaps another that is the same bytes. `owner` keeps `data`."""

    entry: TensorEntry
    data: memoryview
    owner: object
    alias: TensorEntry | None = None


@dataclass(frozen=True, slots=True)
class _Form:
    """What becomes of tensors in an image of this dtype and layout."""

    dtype: str
    layout: str
    is_tied: bool

    def blocks_of(self, reading: Reading) -> list[_Block]:
        part, tensor = reading.part, reading.joined(DTYPES[self.dtype])
        is_table = part.name == HEAD and self.is_tied
        if not part.is_linear or self.layout == "plain" or not onednn.pays_off(tensor):
            entry = self._entry(part.name, tensor, "plain")
            return [_Block(entry, memory_of(tensor), tensor, replace(entry, name=EMBEDDING) if is_table else None)]
        packed = onednn.pack(tensor, for_few_rows=part.name == HEAD)
        entry = self._entry(part.name, tensor, "onednn", packed.metadata, nbytes=len(packed.memory))
        if not is_table:
            return [_Block(entry, packed.memory, packed)]
        rows = onednn.row_view(torch.frombuffer(packed.memory, dtype=torch.uint8), tensor)
        if rows is not None:
            alias = replace(entry, name=EMBEDDING, layout="rows", shape=tuple(rows.shape), metadata=b"")
            return [_Block(entry, packed.memory, packed, alias)]
        return [_Block(entry, packed.memory, packed), _Block(self._entry(EMBEDDING, tensor, "plain"), memory_of(tensor), tensor)]

    def _entry(self, name: str, tensor: Tensor, layout: str, metadata: bytes = b"", *, nbytes: int | None = None) -> TensorEntry:
        return TensorEntry(
            name=name,
            dtype=self.dtype,
            shape=tuple(tensor.shape),
            layout=layout,
            offset=0,
            nbytes=tensor.nbytes if nbytes is None else nbytes,
            checksums=b"",
            metadata=metadata,
        )


@dataclass(slots=True)
class _Writer:
    """Appends blocks to the image. What it was given is written by the pool's threads; it waits for the oldest when that is much."""

    fd: int
    pool: Executor
    end: int = 0
    _entries: list[TensorEntry] = field(default_factory=list)  # without their checksums
    _checksums: dict[int, list[Future[bytes]]] = field(default_factory=dict)  # by offset, of each piece
    _behind: deque[Future[bytes]] = field(default_factory=deque)

    def append(self, block: _Block) -> None:
        offset, data = self.end, block.data
        self._entries += [replace(entry, offset=offset) for entry in (block.entry, block.alias) if entry is not None]
        starts = range(0, len(data), CHECK_BYTES)
        pieces = [self.pool.submit(self._write, data[at : at + CHECK_BYTES], offset + at, block.owner) for at in starts]
        self._checksums[offset] = pieces
        self._behind.extend(pieces)
        while len(self._behind) * CHECK_BYTES > AHEAD_BYTES + len(data):
            self._behind.popleft().result()
        self.end = -(-(offset + len(data)) // ALIGNMENT) * ALIGNMENT

    def finish(self) -> tuple[TensorEntry, ...]:
        """Once all is written."""
        checksums = {offset: b"".join(piece.result() for piece in pieces) for offset, pieces in self._checksums.items()}
        os.ftruncate(self.fd, self.end)
        return tuple(replace(entry, checksums=checksums[entry.offset]) for entry in self._entries)

    def _write(self, data: memoryview, offset: int, owner: object) -> bytes:
        """`owner` is let go when the bytes are written."""
        del owner
        found = checksum(data)
        while data:
            written = os.pwrite(self.fd, data, offset)
            data, offset = data[written:], offset + written
        return found
