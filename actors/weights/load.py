"""One weight image on its way into the arena: piece by piece in layer order, so that the first layers compute while the last still come.

The work is cut into steps: open, the copies, and, for an image not yet checked here, the checksums at the end. Whoever has time takes
the next one: the loader's thread, and the engine's while it waits for bytes. A step that is claimed is finished by its claimer.

A piece counts as landed when it and all before it were copied; that is noted, and waited for, under one lock, which orders the copier's
writes before the reader's reads. An image that was never verified counts as landed only as a whole, and once its checksums agree.
A wait is woken by what ends it, not by every piece: on a virtual machine a wake-up costs as much as a megabyte of copying.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

from polymux.actors.weights.image import Check, ImageManifest, checks_of
from polymux.transport.bulk_copy import copy_bytes, piece_bytes
from polymux.transport.errors import CheckpointError, ModelLoading, PolymuxError
from polymux.transport.image_maps import ImageId, ImageMaps
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName
from polymux.transport.weights import OpenImage, read_image

LOAD_S = 180.0  # for an image to come in, whatever it takes to build it
MAX_MANIFESTS = 64  # that are kept parsed
_PAGE_BYTES = 4096

Work = Callable[[], None]


class ImageSource(Protocol):
    """Where weight images come from: the node's weight store. Called from the loader's thread as well as the engine's."""

    def fetch(self, model: ModelName) -> OpenImage: ...


Fetch = Callable[[ModelName], OpenImage]


class Target(Protocol):
    """Device memory in which an image is put together. Called from any thread that works on the load, from one at a time for each piece."""

    is_async: bool  # bytes that were put may still be on their way: `settle` waits for them, `order` makes computing wait

    def put(self, begin: int, data: memoryview) -> None:
        """Bytes of the image from `begin` on. `data` must stay as it is until `settle`."""

    def read(self, fd: int, begin: int, end: int) -> None:
        """As `put`, from a file. Raises CheckpointError when it ends before."""

    def content(self, source: memoryview | None) -> Tensor:
        """The image's bytes where a checksum can read them, uint8: the target's own, or those that it was filled from."""

    def order(self, end: int) -> None:
        """What is handed to the device from now on is done after the bytes before `end`, which were put, have arrived. Engine thread."""

    def settle(self) -> None:
        """Return once everything that was put is there."""


class HostTarget:
    """Host memory: what was put is there."""

    is_async = False

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def put(self, begin: int, data: memoryview) -> None:
        copy_bytes(self._memory[begin : begin + len(data)], data)

    def read(self, fd: int, begin: int, end: int) -> None:
        read_image(fd, self._memory[begin:end], begin, end - begin)

    def content(self, source: memoryview | None) -> Tensor:
        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def order(self, end: int) -> None:
        return

    def settle(self) -> None:
        return


class Load:
    """Steps over one target range; `changed` is the lock of everything here, notified when a step opens new ones or ends a wait."""

    def __init__(
        self,
        spec: ModelSpec,
        fetch: Fetch,
        target: Target,
        maps: ImageMaps,
        changed: threading.Condition,
        *,
        is_urgent: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.is_urgent = is_urgent
        self.was_prefetch = not is_urgent
        self.began_s = clock()
        self.first_layer_s: float | None = None  # from the beginning to the first layer's last byte
        self.ended_s: float | None = None
        self.copy_s = 0.0  # spent in copies, by all threads together
        self.error: PolymuxError | None = None
        self._fetch, self._target, self._maps, self._clock = fetch, target, maps, clock
        self._changed = changed
        self._image: OpenImage | None = None
        self._image_id: ImageId | None = None
        self._bytes: memoryview | None = None  # the image, mapped; None: read it through its descriptor
        self._manifest: ImageManifest | None = None
        self._pieces: list[tuple[int, int]] = []
        self._checks: list[Check] = []  # none, if the image was verified before
        self._is_opened = self._is_verified = False
        self._is_opening = self._is_cancelled = False
        self._num_claimed = self._num_claimed_checks = 0
        self._num_checked = 0
        self._copied: set[int] = set()  # pieces past the landed ones
        self._num_landed = 0
        self._num_running = self._num_copying = 0
        self._is_settled, self._is_settling = not target.is_async, False
        self._first_copy_s: float | None = None
        self._awaited: list[int] = []  # bytes that must have landed, one entry for each wait under way

    # -- for the reader -----------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> ImageManifest:
        assert self._manifest is not None, "the image is not open yet"
        return self._manifest

    @property
    def bytes_per_s(self) -> float:
        """Of the copies so far."""
        with self._changed:
            return self._landed_bytes() / self.copy_s if self.copy_s > 0 else 0.0

    @property
    def is_under_way(self) -> bool:
        return self.ended_s is None and self.error is None and not self._is_cancelled

    @property
    def is_finished(self) -> bool:
        """Every byte is in place and good."""
        return self.ended_s is not None

    @property
    def is_everywhere(self) -> bool:
        """And on every rank of an instance its first layer, as far as the ranks have said. Raises what one of them met."""
        return self.is_finished

    @property
    def is_async(self) -> bool:
        """A group that is in place for `wait` may still be on its way; computing waits for it where `order` was called."""
        return self._target.is_async

    def order(self, num_groups: int | None) -> None:
        """Computing that is handed over from now on comes after the first `num_groups`, for which somebody has waited."""
        if self._target.is_async:
            with self._changed:
                end = self._bytes_of(num_groups)
            self._target.order(end)

    def wait(self, num_groups: int | None = None, *, helps: bool = True) -> float:
        """Until the first `num_groups` groups of the manifest are in place, or all; helps meanwhile. Returns the seconds it took.

        Raises what the load met: CheckpointError, what the source raised, or ModelLoading after `LOAD_S`.
        """
        if self.is_finished:
            return 0.0
        began_s = self._clock()
        with self._changed:
            while not self._has(num_groups):
                remaining_s = began_s + LOAD_S - self._clock()
                step = self._claim(num_groups) if helps and not self._target.is_async else None
                if step is not None:
                    self._changed.release()
                    try:
                        self._run(step)
                    finally:
                        self._changed.acquire()
                elif not self._await(num_groups, remaining_s):
                    raise ModelLoading(f"the weights of {self.spec.model} did not arrive within {LOAD_S:.0f} s")
        return self._clock() - began_s

    def _await(self, num_groups: int | None, timeout_s: float) -> bool:
        """Sleep until there may be news for a reader of so many groups; False when the time is up."""
        awaited = self._bytes_of(num_groups) if self._is_opened else 0
        self._awaited.append(awaited)
        try:
            return timeout_s > 0 and self._changed.wait(timeout_s)
        finally:
            self._awaited.remove(awaited)

    def cancel(self) -> None:
        """Stop, and return once nobody writes to the target any more. May be called twice, and after the end."""
        with self._changed:
            self._is_cancelled = True
            self._changed.wait_for(lambda: not self._num_copying)  # other steps write nothing, and may take long
            self._close_if_idle()
        self._target.settle()

    # -- for whoever works on it --------------------------------------------------------------------------------------

    def claim(self) -> Work | None:
        """The next step, to be called without the lock; None when there is none at present. The caller holds `changed`."""
        step = self._claim(None)
        return None if step is None else partial(self._run, step)

    def _claim(self, num_groups: int | None) -> Work | None:
        if self.error is not None or self._is_cancelled or self.is_finished:
            return None
        step: Work | None = None
        if not self._is_opened:
            if not self._is_opening:
                self._is_opening, step = True, self._open
        elif self._num_claimed < len(self._pieces) and self._pieces[self._num_claimed][0] < self._bytes_of(num_groups):
            step = partial(self._copy, self._num_claimed)
            self._num_claimed += 1
            self._num_copying += 1
        elif self._num_landed == len(self._pieces) and not self._is_settled and not self._is_settling:
            self._is_settling, step = True, self._settle
        elif self._num_landed == len(self._pieces) and self._num_claimed_checks < len(self._checks):
            step = partial(self._verify, self._checks[self._num_claimed_checks])
            self._num_claimed_checks += 1
        self._num_running += step is not None
        return step

    def _run(self, step: Work) -> None:
        error: PolymuxError | None = None
        try:
            step()
        except PolymuxError as reason:
            error = reason
        except Exception as reason:
            error = PolymuxError(f"loading {self.spec.model} failed: {type(reason).__name__}: {reason}")
        with self._changed:
            self.error = self.error or error
            self._num_running -= 1
            is_whole = self._is_verified and self._is_settled and self._num_landed == len(self._pieces)
            if self.ended_s is None and self.error is None and is_whole:
                self.ended_s = self._clock()
            self._close_if_idle()
            if step == self._open or self._has_news():
                self._changed.notify_all()

    # -- the steps ----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            image = self._fetch(self.spec.model)
            try:
                manifest = _parsed(image.manifest)
                self._check(manifest, image)
                found = self._maps.open(image.fd, self._clock())
            except BaseException:
                image.close()
                raise
            is_known = found is not None and self._maps.is_verified(found[0], image.manifest)
            checks = [] if is_known else list(checks_of(manifest))
            pieces = cut(manifest, piece_bytes(manifest.nbytes))
            with self._changed:
                self._image, self._manifest, self._pieces, self._is_opened = image, manifest, pieces, True
                self._checks, self._is_verified = checks, not checks
                if found is not None:
                    self._image_id, self._bytes = found
        finally:
            with self._changed:
                self._is_opening = False

    def _check(self, manifest: ImageManifest, image: OpenImage) -> None:
        if manifest.digest != self.spec.digest or manifest.nbytes != self.spec.weight_bytes:
            raise CheckpointError(
                f"the weight image of {self.spec.model} has digest {manifest.digest} and {manifest.nbytes} bytes, not {self.spec.digest} "
                f"and {self.spec.weight_bytes}; register it again"
            )
        if image.nbytes < manifest.nbytes:
            raise CheckpointError(
                f"the weight image of {self.spec.model} ends {manifest.nbytes - image.nbytes} bytes early; register it again"
            )

    def _copy(self, piece: int) -> None:
        begin, end = self._pieces[piece]
        began_s = self._clock()
        try:
            if self._bytes is not None:
                self._target.put(begin, self._bytes[begin:end])
            else:
                assert self._image is not None
                self._target.read(self._image.fd, begin, end)
        finally:
            with self._changed:
                self._num_copying -= 1
        now_s = self._clock()
        with self._changed:
            self._first_copy_s = began_s if self._first_copy_s is None else self._first_copy_s
            self.copy_s += now_s - began_s
            self._copied.add(piece)
            while self._num_landed in self._copied:
                self._copied.remove(self._num_landed)
                self._num_landed += 1
            if self.first_layer_s is None and self._landed_bytes() >= self._bytes_of(2):
                self.first_layer_s = now_s - self.began_s

    def _settle(self) -> None:
        self._target.settle()
        now_s = self._clock()
        with self._changed:
            assert self._first_copy_s is not None
            self._is_settled, self.copy_s = True, now_s - self._first_copy_s  # the copies ran while nobody waited for them

    def _verify(self, check: Check) -> None:
        check(self._target.content(self._bytes))
        with self._changed:
            self._num_checked += 1
            if self._num_checked < len(self._checks):
                return
        if self._image_id is not None:
            assert self._image is not None
            self._maps.mark_verified(self._image_id, self._image.manifest)
        with self._changed:
            self._is_verified = True

    # -- under the lock -----------------------------------------------------------------------------------------------

    def _has(self, num_groups: int | None) -> bool:
        if self.error is not None:
            raise self.error
        if self._is_cancelled:
            raise PolymuxError(f"the load of {self.spec.model} was cancelled")
        if num_groups is None or not self._is_verified:
            return self.is_finished
        return self._landed_bytes() >= self._bytes_of(num_groups)

    def _has_news(self) -> bool:
        """Whether somebody who waits could now go on: a reader, a canceller, or a worker for whom there are checksums to compare."""
        if self.error is not None or self._is_cancelled or self._num_landed == len(self._pieces):
            return True
        return any(self._landed_bytes() >= awaited for awaited in self._awaited)

    def _landed_bytes(self) -> int:
        return self._pieces[self._num_landed - 1][1] if self._num_landed else 0

    def _bytes_of(self, num_groups: int | None) -> int:
        """Up to which byte a reader of so many groups, or of all, must wait."""
        groups = self.manifest.groups
        if num_groups is None or num_groups >= len(groups) or not self._is_verified:
            return self.manifest.nbytes
        return sum(groups[num_groups - 1])

    def _close_if_idle(self) -> None:
        if self._image is not None and not self._num_running and (self._is_cancelled or self.error is not None or self.is_finished):
            self._image.close()
            self._image = self._bytes = None


@lru_cache(maxsize=MAX_MANIFESTS)
def _parsed(manifest: bytes) -> ImageManifest:
    """A millisecond for a hundred tensors, and switches bring the same ones again and again."""
    return ImageManifest.from_bytes(manifest)


def cut(manifest: ImageManifest, nbytes: int) -> list[tuple[int, int]]:
    """The image in pieces [begin, end) of at least `nbytes`, where so many are left; one ends with a group's last page when it can."""
    ends = {-(-sum(group) // _PAGE_BYTES) * _PAGE_BYTES for group in manifest.groups}  # copies of whole pages are a little faster
    pieces: list[tuple[int, int]] = []
    begin = 0
    while begin < manifest.nbytes:
        end = begin + -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
        near = [e for e in ends if end <= e < end + nbytes // 2]
        end = min(near, default=end)
        if manifest.nbytes - end < nbytes // 2:
            end = manifest.nbytes
        pieces.append((begin, end))
        begin = end
    return pieces
