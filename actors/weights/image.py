"""The weight image: a model's tensors end to end in one flat buffer, with a manifest; built once, copied anywhere, used in place.

Linear weights lie in the layout that the device multiplies from ("onednn" packs them for this CPU, "plain" is row-major), so that making a
model active is a copy of bytes and never a conversion. With tied embeddings the packed head is also the embedding: single rows are read
out of its blocks, and the table is stored once.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, Protocol

import msgpack
import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.weights.parts import EMBEDDING, HEAD, Part, parts_of
from polymux.kernels import onednn
from polymux.transport.errors import CheckpointError, ConfigError, WireError
from polymux.transport.messages import ITEM_BYTES
from polymux.transport.units import KIB, MIB

ALIGNMENT = 256  # bytes, of every entry
LAYOUTS = ("plain", "onednn")
ENTRY_LAYOUTS = (*LAYOUTS, "rows")  # rows: the packed head seen as an embedding, of shape `onednn.row_view`
MANIFEST_VERSION = 1
MAX_MANIFEST_BYTES = 64 * MIB
MAX_METADATA_BYTES = 16 * KIB
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Source(Protocol):
    """What an image is built from: a checkpoint, its tensors read one at a time."""

    @property
    def config(self) -> ArchConfig: ...
    @property
    def config_json(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the image: bytes [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    offset: int
    nbytes: int
    crc32: int
    metadata: bytes = b""  # of a packed weight: oneDNN's description of its layout


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageManifest:
    """What lies where in an image. `groups` are byte ranges (offset, nbytes) in the order in which a step reads them."""

    digest: str  # of the checkpoint
    config_json: str
    dtype: str
    layout: str
    nbytes: int
    entries: tuple[TensorEntry, ...]
    groups: tuple[tuple[int, int], ...]

    def to_bytes(self) -> bytes:
        entries = [[getattr(entry, item.name) for item in fields(TensorEntry)] for entry in self.entries]
        head = [self.digest, self.config_json, self.dtype, self.layout, self.nbytes]
        return bytes(msgpack.packb([MANIFEST_VERSION, *head, entries, self.groups]))

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageManifest:
        """Raises WireError, naming the field, for anything but a manifest whose ranges and types hold together."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise WireError(f"a weight manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}")
        try:
            values = msgpack.unpackb(data, use_list=False)
        except ValueError as error:
            raise WireError(f"a weight manifest is not msgpack: {error}") from error
        if not isinstance(values, tuple) or len(values) != 8 or values[0] != MANIFEST_VERSION:
            raise WireError(f"a weight manifest is not of version {MANIFEST_VERSION}; sender and receiver must run the same release")
        _, digest, config_json, dtype, layout, nbytes, entries, groups = values
        for name, value, kind in (
            ("digest", digest, str),
            ("config_json", config_json, str),
            ("entries", entries, tuple),
            ("groups", groups, tuple),
        ):
            _check(isinstance(value, kind), name, value)
        _check(dtype in ITEM_BYTES, "dtype", dtype)
        _check(layout in LAYOUTS, "layout", layout)
        _check(_is_size(nbytes), "nbytes", nbytes)
        for group in groups:
            _check(isinstance(group, tuple) and len(group) == 2 and all(map(_is_size, group)) and sum(group) <= nbytes, "groups", group)
        parsed = tuple(_parse_entry(entry, nbytes) for entry in entries)
        return cls(digest=digest, config_json=config_json, dtype=dtype, layout=layout, nbytes=nbytes, entries=parsed, groups=groups)


def build_image(checkpoint: Source, fd: int, *, dtype: str, layout: str) -> ImageManifest:
    """Write the image of a checkpoint to a file or memfd, one tensor in memory at a time, and describe it.

    `layout` "onednn" and "auto" are "plain" where this CPU cannot multiply packed weights of `dtype`. The file is cut to the image's size.
    Raises ConfigError for a layout or dtype that there is not, CheckpointError from the checkpoint's reader, and OSError.
    """
    if layout not in ("auto", *LAYOUTS) or dtype not in DTYPES:
        raise ConfigError(
            f"no weight image of layout {layout!r} and dtype {dtype!r}: layouts are auto, plain, onednn; dtypes {', '.join(DTYPES)}"
        )
    can_pack = layout != "plain" and onednn.is_available(DTYPES[dtype])
    writer = _Writer(checkpoint, fd, dtype, "onednn" if can_pack else "plain")
    groups = []
    for group in parts_of(checkpoint.config):
        start = writer.end
        for part in group:
            writer.add(part)
        groups.append((start, writer.end - start))
    os.ftruncate(fd, writer.end)
    return ImageManifest(
        digest=checkpoint.digest,
        config_json=checkpoint.config_json,
        dtype=dtype,
        layout=writer.layout,
        nbytes=writer.end,
        entries=tuple(writer.entries),
        groups=tuple(groups),
    )


def verify_image(manifest: ImageManifest, weights: Tensor) -> None:
    """Compare every entry's checksum with the bytes [nbytes] of uint8. Raises CheckpointError naming the first tensor that differs."""
    if weights.numel() < manifest.nbytes:
        raise CheckpointError(f"the weight image has {weights.numel()} bytes, its manifest says {manifest.nbytes}; load it again")
    data = _memory_of(weights)
    for entry in {entry.offset: entry for entry in manifest.entries}.values():
        if zlib.crc32(data[entry.offset : entry.offset + entry.nbytes]) != entry.crc32:
            raise CheckpointError(f"the weight image is damaged at {entry.name}, bytes from {entry.offset}; load it again")


@dataclass(slots=True)
class _Writer:
    """Appends parts to the image. Holds one part's tensor and its packed form at most."""

    checkpoint: Source
    fd: int
    dtype: str
    layout: str
    end: int = 0
    entries: list[TensorEntry] = field(default_factory=list)

    def add(self, part: Part) -> None:
        tensor = self._joined(part)
        if not part.is_linear or self.layout == "plain" or not onednn.pays_off(tensor):
            self._append(part.name, tensor, "plain", _memory_of(tensor))
            if part.name == HEAD and self.checkpoint.config.tie_word_embeddings:
                self._alias(self.entries[-1], "plain", tuple(tensor.shape))
            return
        packed = onednn.pack(tensor, for_few_rows=part.name == HEAD)
        self._append(part.name, tensor, "onednn", packed.memory, packed.metadata)
        if part.name == HEAD and self.checkpoint.config.tie_word_embeddings:
            head = self.entries[-1]
            rows = onednn.row_view(torch.frombuffer(packed.memory, dtype=torch.uint8), tensor)
            if rows is not None:
                self._alias(head, "rows", tuple(rows.shape))
            else:
                self._append(EMBEDDING, tensor, "plain", _memory_of(tensor))

    def _joined(self, part: Part) -> Tensor:
        """The part's tensor, contiguous and of the image's dtype."""
        tensors = (self.checkpoint.tensor(name).to(DTYPES[self.dtype]) for name in part.sources)
        return torch.cat(list(tensors)) if len(part.sources) > 1 else next(tensors).contiguous()

    def _append(self, name: str, tensor: Tensor, layout: str, data: memoryview, metadata: bytes = b"") -> None:
        crc32 = 0
        for offset, piece in _pieces(data):
            crc32 = zlib.crc32(piece, crc32)
            _write_all(self.fd, piece, self.end + offset)
        entry = TensorEntry(
            name=name,
            dtype=self.dtype,
            shape=tuple(tensor.shape),
            layout=layout,
            offset=self.end,
            nbytes=len(data),
            crc32=crc32,
            metadata=metadata,
        )
        self.entries.append(entry)
        self.end = -(-(self.end + len(data)) // ALIGNMENT) * ALIGNMENT

    def _alias(self, head: TensorEntry, layout: str, shape: tuple[int, ...]) -> None:
        """The head's bytes are the embedding's as well."""
        self.entries.append(
            TensorEntry(
                name=EMBEDDING,
                dtype=head.dtype,
                shape=shape,
                layout=layout,
                offset=head.offset,
                nbytes=head.nbytes,
                crc32=head.crc32,
            )
        )


def _memory_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs do not say that arrays are buffers


def _pieces(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    for offset in range(0, len(data), MIB):
        yield offset, data[offset : offset + MIB]


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _parse_entry(values: Any, image_bytes: int) -> TensorEntry:
    _check(isinstance(values, tuple) and len(values) == len(fields(TensorEntry)), "entries", values)
    name, dtype, shape, layout, offset, nbytes, crc32, metadata = values
    _check(isinstance(name, str), "entries.name", name)
    _check(dtype in ITEM_BYTES, f"{name}.dtype", dtype)
    _check(layout in ENTRY_LAYOUTS, f"{name}.layout", layout)
    _check(isinstance(shape, tuple) and 0 < len(shape) <= 4 and all(map(_is_size, shape)), f"{name}.shape", shape)
    _check(_is_size(offset) and offset % ALIGNMENT == 0, f"{name}.offset", offset)
    _check(_is_size(nbytes) and offset + nbytes <= image_bytes, f"{name}.nbytes", nbytes)
    needed = prod(shape) * ITEM_BYTES[dtype]
    _check(nbytes >= needed if layout == "onednn" else nbytes == needed, f"{name}.nbytes", nbytes)
    _check(type(crc32) is int and 0 <= crc32 < 1 << 32, f"{name}.crc32", crc32)
    _check(isinstance(metadata, bytes) and len(metadata) <= MAX_METADATA_BYTES, f"{name}.metadata", metadata)
    _check(bool(metadata) == (layout == "onednn"), f"{name}.metadata", metadata)
    return TensorEntry(name=name, dtype=dtype, shape=shape, layout=layout, offset=offset, nbytes=nbytes, crc32=crc32, metadata=metadata)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check(is_right: bool, name: str, value: Any) -> None:
    if not is_right:
        raise WireError(f"a weight manifest's {name} cannot be {value!r:.80}; build the image again")
