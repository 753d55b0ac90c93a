"""Streams, events and memory of a GPU, as few calls as the rest of `actors/gpu` needs; tests put a device in its place that is as late as
its events allow."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from polymux.actors.gpu.driver import Driver, driver
from polymux.transport.errors import ConfigError


class Event(Protocol):
    def synchronize(self) -> None:
        """Return once it has happened. Lets go of the interpreter's lock."""


class Stream(Protocol):
    """Work in order. From any thread."""

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None:
        """What comes later in this stream is done after the event."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy contiguous bytes between host and device, or within one. Pageable host memory is read before this returns."""


class Runtime(Protocol):
    device: torch.device

    @property
    def compute(self) -> Stream:
        """Where the steps go, in order."""

    def enter(self) -> None:
        """The calling thread's tensor operations go to `compute`."""

    def stream(self) -> Stream: ...

    def allocate(self, nbytes: int) -> Tensor:
        """One allocation of its own, uint8 [nbytes], given back with its last view."""

    def pin(self, values: Tensor) -> Tensor:
        """A copy of a host tensor in memory of torch's that the device reads at full speed."""

    def pinned_like(self, values: Tensor) -> Tensor:
        """Such memory of the shape of a device tensor, not filled."""

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Pin mapped host memory. Raises PolymuxError where that cannot be."""

    def unregister(self, address: int) -> None: ...

    def synchronize(self) -> None:
        """Wait for all streams."""


class _TorchStream:
    def __init__(self, stream: torch.cuda.Stream, *, blocking: bool) -> None:
        self.stream = stream
        self._blocking = blocking

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=self._blocking)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self.stream.wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)


class _Allocation:
    """Device memory that torch wraps, and keeps for as long as it has a view of it."""

    def __init__(self, memory: Driver, nbytes: int) -> None:
        self._driver = memory
        self._address = memory.allocate(nbytes)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "strides": None,
            "version": 2,
        }

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._driver.free(self._address)


class TorchRuntime:
    """The GPU that torch calls `ordinal`; its compute stream is not the default one, which cannot be captured."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises ConfigError where torch sees no such GPU."""
        if not torch.cuda.is_available() or ordinal >= torch.cuda.device_count():
            raise ConfigError(f"device=cuda: torch {torch.__version__} sees no GPU {ordinal} in this process; use device=cpu")
        self.device = torch.device("cuda", ordinal)
        torch.cuda.set_device(self.device)
        self._driver = driver(ordinal)
        self._compute = _TorchStream(torch.cuda.Stream(self.device), blocking=False)  # type: ignore[no-untyped-call]

    @property
    def compute(self) -> Stream:
        return self._compute

    def enter(self) -> None:
        torch.cuda.set_device(self.device)
        self._compute.stream.wait_stream(torch.cuda.current_stream(self.device))  # what was made before, by whoever made it
        torch.cuda.set_stream(self._compute.stream)

    def stream(self) -> Stream:
        return _TorchStream(torch.cuda.Stream(self.device), blocking=True)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int) -> Tensor:
        return torch.as_tensor(_Allocation(self._driver, nbytes), device=self.device)

    def pin(self, values: Tensor) -> Tensor:
        return values.pin_memory()

    def pinned_like(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        self._driver.register(address, nbytes, read_only=read_only)

    def unregister(self, address: int) -> None:
        self._driver.unregister(address)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
