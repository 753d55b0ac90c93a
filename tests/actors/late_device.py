"""A CPU that says of its results that they come later: what runs ahead of them on a GPU runs ahead of them here."""

from __future__ import annotations

from torch import Tensor

from polymux.actors.device import CpuDevice, Download


class _Later:
    def __init__(self, device: LateDevice, values: tuple[Tensor, ...]) -> None:
        self._device, self._values, self._number = device, values, device.num_launched

    def wait(self) -> tuple[Tensor, ...]:
        self._device.num_behind.append(self._device.num_launched - self._number)
        return self._values


class LateDevice(CpuDevice):
    is_async = True

    def __init__(self) -> None:
        self.num_launched = 0
        self.num_behind: list[int] = []  # of each step that was read: how many had been handed over after it

    def download(self, *values: Tensor) -> Download:
        self.num_launched += 1
        return _Later(self, tuple(value.clone() for value in values))
