"""The copier: one thread that moves KV blocks between two memories of a worker while its engine computes.

Blocks of a copy under way are the copy's: neither end may be freed, read or written before `on_done` was called. It is called
exactly once for every copy that was submitted, on the engine thread (`post` brings it there), whatever becomes of the copier.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from polymux.transport.errors import Cancelled, Overloaded, PolymuxError
from polymux.transport.units import MIB

log = logging.getLogger("polymux.copier")

MAX_PIECE_BYTES = 8 * MIB  # about a millisecond: how long a stop waits, and how long one call keeps its core
STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The end of a copy. With `error` set, the target holds nothing of use and the source is whole."""

    num_blocks: int
    nbytes: int
    began_s: float  # monotonic; from its first byte, not from its submission
    ended_s: float
    error: PolymuxError | None = None


OnDone = Callable[[Copied], None]
CopyBlocks = Callable[
    [Tensor, Sequence[int], Tensor, Sequence[int]], Generator[None, None, None]
]  # called by `submit`, iterated by the thread


def copy_blocks(source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]) -> Generator[None, None, None]:
    """Copy blocks between two memories of equal blocks, a piece at each `next`. Each block is contiguous; where all of both memories are,
    neighbours on both sides become one copy.

    By memmove, which holds no lock and starts no threads: torch's own copy would take the compute threads' cores.
    """
    assert source.shape[1:] == target.shape[1:] and source[0].is_contiguous() and target[0].is_contiguous()
    from_bytes, to_bytes = (kv.stride(0) * kv.element_size() for kv in (source, target))
    nbytes = source[0].nbytes
    for source_id, target_id, count in runs(source_ids, target_ids, longest_run(source, target)):
        ctypes.memmove(target.data_ptr() + target_id * to_bytes, source.data_ptr() + source_id * from_bytes, count * nbytes)
        yield


def longest_run(source: Tensor, target: Tensor) -> int:
    """How many neighbouring blocks may be one copy."""
    return max(MAX_PIECE_BYTES // source[0].nbytes, 1) if source.is_contiguous() and target.is_contiguous() else 1


def runs(source_ids: Sequence[int], target_ids: Sequence[int], max_run: int) -> list[tuple[int, int, int]]:
    """(source, target, count) of neighbours on both sides, in order."""
    found: list[tuple[int, int, int]] = []
    for source, target in zip(source_ids, target_ids, strict=True):
        if found:
            first, second, count = found[-1]
            if count < max_run and source == first + count and target == second + count:
                found[-1] = (first, second, count + 1)
                continue
        found.append((source, target, 1))
    return found


@dataclass(slots=True, eq=False)
class _Copy:
    pieces: Generator[None, None, None]
    num_blocks: int
    nbytes: int
    on_done: OnDone


class Copier:
    """First come, first served, at most `max_queued` at once. `submit` and `close` are the engine thread's."""

    def __init__(self, post: Callable[[Callable[[], None]], None], *, copy: CopyBlocks = copy_blocks, max_queued: int = 4096) -> None:
        self._post = post
        self._copy = copy
        self._max_queued = max_queued
        self._queue: deque[_Copy] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="polymux-copier", daemon=True)
        self._thread.start()

    def submit(self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int], on_done: OnDone) -> None:
        """Copy block `source_ids[i]` of `source` to block `target_ids[i]` of `target`, both `BlockPool.kv` of one model.

        Of an instance of several ranks the arena's is rank 0's share of each block, and the host's is the whole block.

        Raises Overloaded when too many wait, or the copier is closed; `on_done` is not called then.
        """
        assert len(source_ids) == len(target_ids)
        with self._changed:
            if self._is_closing or len(self._queue) >= self._max_queued:
                raise Overloaded(f"the copier is closed, or {self._max_queued} copies wait for it")
            pieces = self._copy(source, source_ids, target, target_ids)
            nbytes = len(source_ids) * max(source[0].nbytes, target[0].nbytes)
            self._queue.append(_Copy(pieces, len(source_ids), nbytes, on_done))
            self._changed.notify()

    def close(self) -> bool:
        """End the copy under way after its piece, and all that wait, with Cancelled. False when its thread does not end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(STOP_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            began_s = time.monotonic()
            error = self._try(copy)
            done = Copied(num_blocks=copy.num_blocks, nbytes=copy.nbytes, began_s=began_s, ended_s=time.monotonic(), error=error)
            self._post(partial(copy.on_done, done))
            del copy  # it holds views of both memories

    def _next(self) -> _Copy | None:
        with self._changed:
            while not self._queue and not self._is_closing:
                self._changed.wait()
            return self._queue.popleft() if self._queue else None

    def _try(self, copy: _Copy) -> PolymuxError | None:
        try:
            for _ in copy.pieces:
                if self._is_closing:
                    break
            return Cancelled("the worker is stopping") if self._is_closing else None
        except PolymuxError as error:
            return error
        except Exception as error:
            log.exception("copier.failed")
            return PolymuxError(f"copying {copy.num_blocks} KV blocks failed: {type(error).__name__}: {error}")
        finally:
            copy.pieces.close()  # whatever it has under way ends first
