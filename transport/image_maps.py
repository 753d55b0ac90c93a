"""A worker's view of its node's weight images: mapped once, so that loading one again costs the copy and no page faults.

Only images that are sealed are mapped: their bytes can neither change nor be cut off under the reader, so one checked once stays good.
A map keeps its image's memory alive, even when the store has evicted it; so a map goes when its image was not loaded for a while.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
KEEP_S = 60.0

_MAX_VERIFIED = 4096  # images remembered as verified

ImageId = tuple[int, int]  # device and inode: one memfd, for as long as somebody has it


def seal(fd: int) -> None:
    """From now on nobody can change the memfd's bytes or size. It was made with MFD_ALLOW_SEALING."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def is_sealed(fd: int) -> bool:
    """False also for what is no memfd at all."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False


@dataclass(slots=True)
class _Map:
    view: memoryview
    used_s: float


class ImageMaps:
    """The maps of one worker, and which images it has verified. Thread-safe; time is an argument."""

    def __init__(self, keep_s: float = KEEP_S, on_drop: Callable[[memoryview], None] = lambda _: None) -> None:
        """`on_drop` is told of each map that goes, while it is still mapped."""
        self._keep_s = keep_s
        self._on_drop = on_drop
        self._maps: dict[ImageId, _Map] = {}
        self._verified: dict[tuple[ImageId, bytes], None] = {}  # with the manifest that it was compared with; oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._maps)

    def open(self, fd: int, now_s: float) -> tuple[ImageId, memoryview] | None:
        """The image's id and all of its bytes; None when it is not sealed, or empty."""
        status = os.fstat(fd)
        if not status.st_size or not is_sealed(fd):
            return None
        image_id = (status.st_dev, status.st_ino)
        with self._lock:
            found = self._maps.get(image_id)
            if found is None:
                found = self._maps[image_id] = _Map(memoryview(mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)), now_s)
            found.used_s = now_s
            return image_id, found.view

    def is_verified(self, image_id: ImageId, manifest: bytes) -> bool:
        with self._lock:
            return (image_id, _digest(manifest)) in self._verified

    def mark_verified(self, image_id: ImageId, manifest: bytes) -> None:
        """All bytes of the image were compared with the manifest's checksums."""
        with self._lock:
            self._verified[image_id, _digest(manifest)] = None
            if len(self._verified) > _MAX_VERIFIED:
                del self._verified[next(iter(self._verified))]

    def expire(self, now_s: float) -> None:
        """Drop the maps that were not opened for `keep_s`. Views in use stay valid until they are let go."""
        with self._lock:
            for image_id in [image_id for image_id, found in self._maps.items() if now_s - found.used_s >= self._keep_s]:
                self._on_drop(self._maps.pop(image_id).view)

    def clear(self) -> None:
        with self._lock:
            while self._maps:
                self._on_drop(self._maps.popitem()[1].view)


def _digest(manifest: bytes) -> bytes:
    return hashlib.blake2b(manifest, digest_size=16).digest()
