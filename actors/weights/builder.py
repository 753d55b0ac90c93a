"""Build a weight image from a checkpoint: one pass over the bytes, in which they are hashed, packed for this CPU, written and checksummed.

A few threads do all of it, each a piece of a tensor or the packing of one at a time; the calling thread orders it, some `AHEAD_BYTES` ahead
of the tensor whose place in the image is decided and as many behind.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.parallel.shards import cut, rank_config
from polymux.actors.weights.checkpoint import Checkpoint, num_readers
from polymux.actors.weights.image import ALIGNMENT, CHECK_BYTES, DTYPES, LAYOUTS, ImageManifest, TensorEntry, checksum, memory_of
from polymux.actors.weights.parts import EMBEDDING, HEAD, Part, parts_of
from polymux.actors.weights.read_ahead import AHEAD_BYTES, ReadAhead, Reading
from polymux.kernels import few_rows, onednn
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Shard

ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}  # of a process that builds images: torch takes large tensors in huge pages, a tenth faster here

T = TypeVar("T")


def build_image(checkpoint: Checkpoint, fd: int, *, dtype: str, layout: str) -> ImageManifest:
    """The one image of a model that is not split."""
    return build_images(checkpoint, (fd,), dtype=dtype, layout=layout)[0]


def build_images(checkpoint: Checkpoint, fds: Sequence[int], *, dtype: str, layout: str) -> tuple[ImageManifest, ...]:
    """Write the images of a checkpoint's ranks, one for each file or memfd, and describe them. They are of equal size.

    `layout` "onednn" and "auto" are "plain" where this CPU cannot multiply packed weights of `dtype`. A file is cut to its image's size.
    Raises ConfigError for a layout or dtype that there is not and for a model that so many ranks cannot share, CheckpointError from the
    checkpoint's reader, and OSError; nothing writes to the files any more then.
    """
    if layout not in ("auto", *LAYOUTS) or dtype not in DTYPES:
        raise ConfigError(
            f"no weight image of layout {layout!r} and dtype {dtype!r}: layouts are auto, plain, onednn; dtypes {', '.join(DTYPES)}"
        )
    can_pack = layout != "plain" and onednn.is_available(DTYPES[dtype])
    config = checkpoint.config
    shards = [Shard(rank=rank, num_ranks=len(fds)) for rank in range(len(fds))]
    rank_config(config, len(fds))
    as_built = _Form(dtype, "onednn" if can_pack else "plain", config)
    groups = parts_of(config)
    num_threads = num_readers()
    pool = ThreadPoolExecutor(num_threads, "polymux-build", onednn.use_one_thread)
    try:
        reader = ReadAhead(checkpoint, [part for group in groups for part in group], pool)
        parts = _in_order((pool.submit(as_built.blocks_of, reading, shards) for reading in reader), num_threads)
        writers = [_Writer(fd, pool) for fd in fds]
        for group in groups:
            for writer in writers:
                writer.begin_group()
            for _ in group:
                for writer, blocks in zip(writers, next(parts), strict=True):
                    for block in blocks:
                        writer.append(block)
        entries = [writer.finish() for writer in writers]
        digest = reader.digest
    finally:
        pool.shutdown(cancel_futures=True)
    if len({writer.end for writer in writers}) > 1:
        raise ConfigError(f"the {len(fds)} ranks' images differ in size; take engine.weight_layout=plain")
    return tuple(
        ImageManifest(
            digest=digest,
            config_json=checkpoint.config_json,
            dtype=dtype,
            layout=as_built.layout,
            nbytes=writer.end,
            entries=found,
            groups=writer.groups,
            shard=shard,
        )
        for writer, found, shard in zip(writers, entries, shards, strict=True)
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
    config: ArchConfig

    def blocks_of(self, reading: Reading, shards: Sequence[Shard]) -> list[list[_Block]]:
        """One part's blocks, for each rank."""
        whole = reading.joined(DTYPES[self.dtype])
        return [self._blocks_of(reading.part, cut(self.config, reading.part.name, whole, shard)) for shard in shards]

    def _blocks_of(self, part: Part, tensor: Tensor) -> list[_Block]:
        is_table = part.name == HEAD and self.config.tie_word_embeddings
        if not part.is_linear or self.layout == "plain" or not onednn.pays_off(tensor):
            entry = self._entry(part.name, tensor, "plain")
            return [_Block(entry, memory_of(tensor), tensor, replace(entry, name=EMBEDDING) if is_table else None)]
        is_compiled = tensor.dtype == torch.bfloat16 and few_rows.is_available()  # which streams either layout, the usual one faster
        packed = onednn.pack(tensor, for_few_rows=part.name == HEAD and not is_compiled)
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
    _starts: list[int] = field(default_factory=list)  # of the groups
    _entries: list[TensorEntry] = field(default_factory=list)  # without their checksums
    _checksums: dict[int, list[Future[bytes]]] = field(default_factory=dict)  # by offset, of each piece
    _behind: deque[Future[bytes]] = field(default_factory=deque)

    def begin_group(self) -> None:
        self._starts.append(self.end)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        return tuple((start, end - start) for start, end in pairwise([*self._starts, self.end]))

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
