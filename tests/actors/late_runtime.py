"""A GPU's streams and events on host memory, where copies are made as late as they may be, or in any order that the events allow, and
steps as early.

What a copy reads and writes is looked at when it is made. So bytes are wrong wherever an event is missing.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polymux.transport.errors import PolymuxError


@dataclass(eq=False)
class Operation:
    do: Callable[[], None]
    needs: list[Operation]
    is_copy: bool = False
    is_done: bool = False


class LateEvent:
    cuda_event = 0

    def __init__(self, runtime: LateRuntime, last: Operation | None) -> None:
        self.last = last
        self._runtime = runtime

    def synchronize(self) -> None:
        self._runtime.finish(self.last)


class LateStream:
    def __init__(self, runtime: LateRuntime) -> None:
        self._runtime = runtime
        self._last: Operation | None = None

    def record(self) -> LateEvent:
        return LateEvent(self._runtime, self._last)

    def wait(self, event: LateEvent) -> None:
        self.put(lambda: None, event.last)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.is_contiguous() and source.is_contiguous() and target.nbytes == source.nbytes

        def do() -> None:
            target.copy_(source)

        self.put(do, is_copy=True)

    def put(self, do: Callable[[], None], *others: Operation | None, is_copy: bool = False) -> None:
        with self._runtime.lock:
            self._last = Operation(do, [one for one in (self._last, *others) if one is not None], is_copy)
            self._runtime.waiting.append(self._last)
            if self._runtime.is_eager and self is self._runtime.compute:
                self._runtime.do_what_can_be(self._last)


@dataclass(eq=False)
class LateRuntime:
    """A `gpu.runtime.Runtime`. `seed` None: a copy that is not asked for is never made; else it may be at any time.

    `is_eager`: steps are done at once where no event holds them, and copies take a moment; else steps are as late as copies.
    """

    seed: int | None = None
    can_pin: bool = True
    is_eager: bool = False
    registered: dict[int, tuple[int, bool]] = field(default_factory=dict)
    waiting: list[Operation] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.compute = LateStream(self)
        self.device = torch.device("cpu")

    def enter(self) -> None:
        return

    def stream(self) -> LateStream:
        return LateStream(self)

    def allocate(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pin(self, values: Tensor) -> Tensor:
        return values.clone()

    def pinned_like(self, values: Tensor) -> Tensor:
        return torch.empty_like(values)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        if not self.can_pin:
            raise PolymuxError("cuMemHostRegister_v2 failed with CUDA_ERROR_NOT_SUPPORTED (801)")
        assert not any(address < at + size and at < address + nbytes for at, (size, _) in self.registered.items()), "pinned twice"
        self.registered[address] = (nbytes, read_only)

    def unregister(self, address: int) -> None:
        with self.lock:
            assert not any(one.is_copy for one in self.waiting), "unpinned under copies"
            del self.registered[address]

    def synchronize(self) -> None:
        with self.lock:
            for operation in list(self.waiting):
                self.finish(operation)

    def finish(self, last: Operation | None) -> None:
        """Do what this needs, and, with a seed, some of the rest before it."""
        if self.is_eager and threading.current_thread() is not threading.main_thread():
            time.sleep(0.002)
        with self.lock:
            if self.seed is not None:
                for operation in self._random.sample(self.waiting, len(self.waiting)):
                    if self._random.random() < 0.3:
                        self._do(operation)
            if last is not None:
                self._do(last)

    def do_what_can_be(self, operation: Operation) -> None:
        if _is_free(operation):
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        todo = [operation]
        while todo:
            one = todo[-1]
            behind = [need for need in one.needs if not need.is_done]
            if behind:
                todo += behind
                continue
            todo.pop()
            if not one.is_done:
                one.do()
                one.is_done = True
                self.waiting.remove(one)
                if self.is_eager:
                    todo += [other for other in self.waiting if one in other.needs and not other.is_copy and _is_free(other)]


def _is_free(operation: Operation) -> bool:
    return all(need.is_done for need in operation.needs)
