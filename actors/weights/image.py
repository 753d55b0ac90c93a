"""The weight image: a model's tensors end to end in one flat buffer, with a manifest; built once, copied anywhere, used in place.

Linear weights lie in the layout that the device multiplies from ("onednn" packs them for this CPU, "plain" is row-major), so that making a
model active is a copy of bytes and never a conversion. With tied embeddings the packed head is also the embedding: single rows are read
out of its blocks, and the table is stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import msgpack
import torch
from blake3 import blake3
from torch import Tensor

from polymux.transport.errors import CheckpointError, WireError
from polymux.transport.messages import ITEM_BYTES, WHOLE, Shard
from polymux.transport.units import KIB, MIB

ALIGNMENT = 256  # bytes, of every entry
LAYOUTS = ("plain", "onednn")
ENTRY_LAYOUTS = (*LAYOUTS, "rows")  # rows: the packed head seen as an embedding, of shape `onednn.row_view`
MANIFEST_VERSION = 3
MAX_MANIFEST_BYTES = 64 * MIB
MAX_METADATA_BYTES = 16 * KIB
CHECK_BYTES = 4 * MIB  # of an entry, under one checksum
CHECKSUM_BYTES = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the image: bytes [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    offset: int
    nbytes: int
    checksums: bytes  # `checksum` of each `CHECK_BYTES` of it, end to end
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
    shard: Shard = WHOLE  # which rank's part of the model this is

    def to_bytes(self) -> bytes:
        entries = [[getattr(entry, item.name) for item in fields(TensorEntry)] for entry in self.entries]
        head = [self.digest, self.config_json, self.dtype, self.layout, self.nbytes, self.shard.rank, self.shard.num_ranks]
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
        if not isinstance(values, tuple) or len(values) != 10 or values[0] != MANIFEST_VERSION:
            raise WireError(f"a weight manifest is not of version {MANIFEST_VERSION}; sender and receiver must run the same release")
        _, digest, config_json, dtype, layout, nbytes, rank, num_ranks, entries, groups = values
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
        _check(_is_size(rank) and _is_size(num_ranks) and rank < num_ranks, "shard", (rank, num_ranks))
        for group in groups:
            _check(isinstance(group, tuple) and len(group) == 2 and all(map(_is_size, group)) and sum(group) <= nbytes, "groups", group)
        parsed = tuple(_parse_entry(entry, nbytes) for entry in entries)
        return cls(
            digest=digest,
            config_json=config_json,
            dtype=dtype,
            layout=layout,
            nbytes=nbytes,
            entries=parsed,
            groups=groups,
            shard=Shard(rank=rank, num_ranks=num_ranks),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Bytes [begin, end) of an image must have this checksum."""

    entry: TensorEntry
    begin: int
    end: int
    checksum: bytes

    def __call__(self, weights: Tensor) -> None:
        """`weights` are all bytes of the image. Raises CheckpointError naming the tensor. Lets go of the interpreter's lock."""
        if checksum(memory_of(weights[self.begin : self.end])) != self.checksum:
            raise CheckpointError(f"the weight image is damaged at {self.entry.name}, bytes from {self.begin}; load it again")


def checks_of(manifest: ImageManifest) -> Iterator[Check]:
    """One for each piece of the image, each independent of the others, in the image's order."""
    for entry in {entry.offset: entry for entry in manifest.entries}.values():
        for number, begin in enumerate(range(entry.offset, entry.offset + entry.nbytes, CHECK_BYTES)):
            end = min(begin + CHECK_BYTES, entry.offset + entry.nbytes)
            found = entry.checksums[number * CHECKSUM_BYTES : (number + 1) * CHECKSUM_BYTES]
            yield Check(entry=entry, begin=begin, end=end, checksum=found)


def checksum(data: memoryview) -> bytes:
    return blake3(data).digest(CHECKSUM_BYTES)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs do not say that arrays are buffers


def _parse_entry(values: Any, image_bytes: int) -> TensorEntry:
    _check(isinstance(values, tuple) and len(values) == len(fields(TensorEntry)), "entries", values)
    name, dtype, shape, layout, offset, nbytes, checksums, metadata = values
    _check(isinstance(name, str), "entries.name", name)
    _check(dtype in ITEM_BYTES, f"{name}.dtype", dtype)
    _check(layout in ENTRY_LAYOUTS, f"{name}.layout", layout)
    _check(isinstance(shape, tuple) and 0 < len(shape) <= 4 and all(map(_is_size, shape)), f"{name}.shape", shape)
    _check(_is_size(offset) and offset % ALIGNMENT == 0, f"{name}.offset", offset)
    _check(_is_size(nbytes) and offset + nbytes <= image_bytes, f"{name}.nbytes", nbytes)
    needed = prod(shape) * ITEM_BYTES[dtype]
    _check(nbytes >= needed if layout == "onednn" else nbytes == needed, f"{name}.nbytes", nbytes)
    _check(isinstance(checksums, bytes), f"{name}.checksums", checksums)
    _check(len(checksums) == -(-nbytes // CHECK_BYTES) * CHECKSUM_BYTES, f"{name}.checksums", checksums)
    _check(isinstance(metadata, bytes) and len(metadata) <= MAX_METADATA_BYTES, f"{name}.metadata", metadata)
    _check(bool(metadata) == (layout == "onednn"), f"{name}.metadata", metadata)
    return TensorEntry(
        name=name, dtype=dtype, shape=shape, layout=layout, offset=offset, nbytes=nbytes, checksums=checksums, metadata=metadata
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check(is_right: bool, name: str, value: Any) -> None:
    if not is_right:
        raise WireError(f"a weight manifest's {name} cannot be {value!r:.80}; build the image again")
