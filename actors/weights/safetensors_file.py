"""One safetensors file: its header checked byte for byte before anything is believed, its tensors read one at a time.

Tensors are read with `pread` into their own memory. The safetensors library maps the file instead, and every page that was ever read then
counts as this process's until the last tensor is gone: a whole checkpoint, by the time an image is built.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from polymux.transport.errors import CheckpointError
from polymux.transport.units import KIB

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
READ_BYTES = 512 * KIB  # at a time: still in the core's cache when they are hashed
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # what a model may be stored in
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # what may lie beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes lie in its file, and what they are."""

    name: str
    dtype: str  # as the header spells it: "BF16"
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A file whose header has been checked against its size. No descriptor is held; a file that changes later is an error when read."""

    path: Path
    tensors: dict[str, StoredTensor]
    identity: tuple[int, int, int, int]  # device, inode, size, time of change

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Raises CheckpointError for a file that is missing, truncated, or whose header does not describe exactly its bytes."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); download it again") from error
        try:
            stat = os.fstat(fd)
            prefix = os.pread(fd, 8, 0)
            header_bytes = int.from_bytes(prefix, "little")
            data_start = 8 + header_bytes
            if len(prefix) == 8 and header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header claims {header_bytes} bytes, more than the format's {MAX_HEADER_BYTES}; "
                    "not a safetensors file, or a damaged one: download it again"
                )
            if len(prefix) < 8 or data_start > stat.st_size:
                raise _truncated(path, stat.st_size, "its header is incomplete")
            header = os.pread(fd, header_bytes, 8)  # all of it: regular files give what they have
        finally:
            os.close(fd)
        entries = _parse_header(path, header)
        tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in entries.items()}
        _check_ranges(path, tensors, data_start, stat.st_size)
        return cls(path=path, tensors=tensors, identity=_identity(stat))

    @property
    def nbytes(self) -> int:
        return self.identity[2]

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own. Raises CheckpointError when the file has changed since it was opened."""
        stored = self.tensors[name]
        data = torch.empty(stored.nbytes, dtype=torch.uint8)
        self.read_into(stored.offset, memoryview(data.numpy()))  # type: ignore[arg-type]
        return data.view(TORCH_DTYPES[stored.dtype]).reshape(stored.shape)

    def read_into(self, offset: int, into: memoryview) -> bytes:
        """Fill `into` with the bytes from `offset`: their BLAKE3, taken as they pass. Lets go of the interpreter's lock."""
        fd, found = self._reopen(), blake3()
        try:
            done = 0
            while done < len(into):
                count = os.preadv(fd, [into[done : done + READ_BYTES]], offset + done)
                if count == 0:
                    raise _truncated(self.path, offset + done, "it ended while it was read")
                found.update(into[done : done + count])
                done += count
        finally:
            os.close(fd)
        return found.digest()

    def will_read(self, offset: int, nbytes: int) -> None:
        """Let the disk begin. Raises CheckpointError as a read would."""
        fd = self._reopen()
        try:
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)

    def _reopen(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: is gone since it was checked ({error.strerror}); register the model again") from error
        if _identity(os.fstat(fd)) != self.identity:
            os.close(fd)
            raise CheckpointError(f"{self.path}: has changed since it was checked; register the model again")
        return fd


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _truncated(path: Path, size: int, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: is truncated at {size} bytes ({why}); download it again")


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its header is not JSON ({error}); not a safetensors file, or a damaged one: download it again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header is a {type(entries).__name__}, not an object; download it again")
    entries.pop("__metadata__", None)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
            all(map(_is_size, (*shape, begin, end))) and begin <= end
        ):
            pass
        case _:
            raise CheckpointError(f"{path}: tensor {name}: its header entry {str(entry)[:120]} is malformed; download the file again")
    wanted = prod(shape) * ITEM_BYTES.get(dtype, 0)
    if dtype in ITEM_BYTES and wanted != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name}: {dtype} of shape {shape} takes {wanted} bytes and its entry gives it {end - begin}; "
            "download the file again"
        )
    return StoredTensor(name=name, dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=end - begin)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check_ranges(path: Path, tensors: dict[str, StoredTensor], data_start: int, file_bytes: int) -> None:
    """As the format demands, the tensors fill the file from the header to its end: no overlap, no hole, nothing past the end."""
    at, before = data_start, "the header"
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.nbytes)):
        end = stored.offset + stored.nbytes
        if end > file_bytes:
            raise _truncated(path, file_bytes, f"tensor {stored.name} should end at {end}")
        if stored.offset != at:
            fault = "overlaps" if stored.offset < at else "leaves a hole after"
            raise CheckpointError(f"{path}: tensor {stored.name} {fault} {before}; the file is damaged: download it again")
        at, before = end, f"tensor {stored.name}"
    if at != file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - at} bytes follow {before}, which no tensor owns; the file is damaged: download it again"
        )
