"""Weight images of random bytes, a source that hands them out sound, damaged or not at all, and a copy that can be held."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from polymux.actors.arena import Arena
from polymux.actors.weights.image import ImageManifest, TensorEntry, checksum
from polymux.actors.weights.residency import Residency
from polymux.transport.bulk_copy import copy_bytes
from polymux.transport.errors import PeerLost
from polymux.transport.image_maps import seal
from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.region import Region
from polymux.transport.units import KIB, ModelName
from polymux.transport.weights import OpenImage

GROUP_BYTES = 4 * KIB
HOLD_S = 10.0  # how long a test's gate waits for what must happen
KV = KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32")


@dataclass
class FakeImages:
    """A store of `sizes` in groups of 4 KiB; `faults` says what happens to the next fetches of a model."""

    sizes: dict[ModelName, int]
    is_sealed: bool = True
    faults: dict[ModelName, str] = field(default_factory=dict)  # lost, damaged, short, renamed
    data: dict[ModelName, bytes] = field(default_factory=dict)
    _fds: dict[ModelName, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for model, num_groups in self.sizes.items():
            self.data[model] = random.Random(model).randbytes(num_groups * GROUP_BYTES)
            self._fds[model] = self._memfd(self.data[model])

    def spec(self, model: str, *, is_pinned: bool = False) -> ModelSpec:
        name = ModelName(model)
        return ModelSpec(
            model=name,
            path="",
            digest=name,
            config_json="{}",
            dtype="float32",
            kv=KV,
            weight_bytes=len(self.data[name]),
            vocab_size=10,
            max_model_len=64,
            eos_token_ids=(),
            is_pinned=is_pinned,
        )

    def fetch(self, model: ModelName) -> OpenImage:
        fault, data = self.faults.get(model), self.data[model]
        if fault == "lost":
            raise PeerLost("the store is gone")
        if fault == "damaged":
            fd = self._memfd(data[:-1] + bytes([data[-1] ^ 1]))
        elif fault == "short":
            fd = self._memfd(data[: len(data) // 2])
        else:
            fd = os.dup(self._fds[model])
        digest = "another" if fault == "renamed" else model
        return OpenImage(manifest_of(digest, data).to_bytes(), fd, os.fstat(fd).st_size)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def _memfd(self, data: bytes) -> int:
        fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, data)
        if self.is_sealed:
            seal(fd)
        return fd


def manifest_of(digest: str, data: bytes) -> ImageManifest:
    """One entry a group."""
    starts = range(0, len(data), GROUP_BYTES)
    entries = tuple(
        TensorEntry(
            name=f"group{i}",
            dtype="float32",
            shape=(GROUP_BYTES // 4,),
            layout="plain",
            offset=start,
            nbytes=GROUP_BYTES,
            checksums=checksum(memoryview(data)[start : start + GROUP_BYTES]),
        )
        for i, start in enumerate(starts)
    )
    groups = tuple((start, GROUP_BYTES) for start in starts)
    return ImageManifest(digest=digest, config_json="{}", dtype="float32", layout="plain", nbytes=len(data), entries=entries, groups=groups)


def residency_of(images: FakeImages, num_groups: int, *, num_lent: int = 0, clock: Callable[[], float] = time.monotonic) -> Residency:
    """An arena whose reserve holds so many groups of weights; beyond it `num_lent` slabs that they may borrow, and two taken by KV."""
    reserve = num_groups * GROUP_BYTES
    arena = Arena(Region.create(reserve + (2 + num_lent) * GROUP_BYTES), weight_reserve_bytes=reserve, slab_bytes=GROUP_BYTES)
    for _ in range(2):
        arena.take_slab()
    residency = Residency(arena, images, clock)
    arena.make_way = residency.vacate
    return residency


@dataclass
class HeldCopy:
    """Copies as the loader does, but from piece `hold_from` on waits until it is let go; `error` is raised in place of that piece."""

    hold_from: int | None = None
    error: Exception | None = None
    num_begun: int = 0
    timed_out: bool = False
    go: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, target: memoryview, source: memoryview) -> None:
        with self._lock:
            piece, self.num_begun = self.num_begun, self.num_begun + 1
        if self.hold_from is not None and piece >= self.hold_from:
            self.held.set()
            self.timed_out |= not self.go.wait(HOLD_S)
            if self.error is not None and piece == self.hold_from:
                raise self.error
        copy_bytes(target, source)
