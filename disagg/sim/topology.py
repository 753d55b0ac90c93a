"""What joins the GPUs of a simulated cluster, and which way bytes go: PCIe, what is shared behind it, host memory, NVLink, the network."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from polymux.disagg.placement import Link
from polymux.disagg.sim.links import Channel
from polymux.transport.errors import ConfigError

NVLINKS = ("switch", "pairs", "none")
GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """Hosts that are alike. Figures are one way, as a copy is measured, not as links are specified; infinity is in nobody's way."""

    gpus: int = 8
    pcie_gb_per_s: float = 52.0  # of each GPU
    gpus_per_switch: int = 1  # behind one PCIe switch or root port, neighbours
    switch_gb_per_s: float = 52.0  # of that, to host memory, where it has several GPUs
    memory_gb_per_s: float = 460.0  # of a host, both ways together
    nvlink: str = "switch"  # all GPUs of a host; or `pairs` of neighbours; or `none`
    nvlink_gb_per_s: float = 376.0  # of each GPU
    network_gbit_per_s: float = 3072.0  # of a host

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self) if one.name != "nvlink"):
            value, is_count = getattr(self, name), name in ("gpus", "gpus_per_switch")
            if isinstance(value, bool) or not isinstance(value, int if is_count else int | float) or not value > 0:
                what = "a whole number of at least 1" if is_count else "a number above 0"
                raise ConfigError(f"hosts.{name}={value!r} must be {what}", param=f"hosts.{name}")
            if not is_count and value < 0.1:
                raise ConfigError(f"hosts.{name}={value} is too slow to share; it must be at least 0.1", param=f"hosts.{name}")
        if self.nvlink not in NVLINKS:
            raise ConfigError(f"hosts.nvlink={self.nvlink!r} is unknown; there are {', '.join(NVLINKS)}", param="hosts.nvlink")

    @property
    def load_bytes_per_s(self) -> float:
        """Of weights from host memory to a GPU, with nobody else about."""
        shared = self.switch_gb_per_s if self.gpus_per_switch > 1 else math.inf
        return min(self.pcie_gb_per_s, shared, self.memory_gb_per_s) * GB

    def in_groups(self, size: int) -> Hosts:
        """So many neighbouring GPUs are one device, whose links add up. Raises ConfigError where a host is no multiple of them."""
        if self.gpus % size:
            raise ConfigError(f"hosts.gpus={self.gpus} is no multiple of {size}, the GPUs of an instance", param="hosts.gpus")
        per_switch = max(1, self.gpus_per_switch // size)
        num_switches = max(1, size // self.gpus_per_switch)  # that one group reaches
        return replace(
            self,
            gpus=self.gpus // size,
            pcie_gb_per_s=min(self.pcie_gb_per_s * size, self.switch_gb_per_s * num_switches if self.gpus_per_switch > 1 else math.inf),
            gpus_per_switch=per_switch,
            nvlink="none" if self.nvlink == "pairs" and size > 1 else self.nvlink,
            nvlink_gb_per_s=self.nvlink_gb_per_s * size,
        )

    @classmethod
    def parse(cls, data: Any, device: str) -> Hosts:
        """Of a mapping, over the defaults of that kind of device. Raises ConfigError for what is not a setting."""
        known = [one.name for one in fields(cls)]
        if not isinstance(data, dict) or (unknown := sorted(map(str, data.keys() - set(known)))):
            what = unknown if isinstance(data, dict) else repr(data)
            raise ConfigError(f"hosts has unknown settings {what}; there are {', '.join(known)}", param="hosts")
        return replace(HOSTS[device], **data)


# An HGX host each. PCIe 5.0 x16 is specified for 63 GB/s and copies at 52.8 (NVIDIA/nvbandwidth issue 24, H100). NVLink is specified for
# 450 one way on an H100 or H200, 200 on an H800, and copies at 376 (NVIDIA/nccl issue 1264, H100), the H800's in proportion. Eight network
# cards of 400 Gbit/s carry 96% of that. Of two sockets' sixteen channels of DDR5-4800, 614 GB/s, copies reach three quarters.
HOSTS = {"h100": Hosts(), "h200": Hosts(), "h800": Hosts(nvlink_gb_per_s=167.0)}


class Topology:
    """Of so many GPUs in `hosts`, filled in order. Channels are made when they are first used."""

    def __init__(self, hosts: Hosts, num_gpus: int) -> None:
        self.hosts = hosts
        self.num_gpus = num_gpus
        self._channels: dict[str, Channel] = {}

    @property
    def channels(self) -> list[Channel]:
        return list(self._channels.values())

    def host(self, gpu: int) -> int:
        return gpu // self.hosts.gpus

    def into(self, gpu: int) -> tuple[Channel, ...]:
        """From its host's memory."""
        return self._path(self._memory(gpu), self._switch(gpu, "in"), self._pcie(gpu, "in"))

    def out_of(self, gpu: int) -> tuple[Channel, ...]:
        """To its host's memory."""
        return self._path(self._pcie(gpu, "out"), self._switch(gpu, "out"), self._memory(gpu))

    def between(self, source: int, target: int) -> tuple[Channel, ...]:
        """From one GPU's memory to another's. Without NVLink through PCIe switches, which do not touch host memory; none on one GPU."""
        link = self.link(source, target)
        if link is Link.SAME:
            return ()
        if link is Link.NVLINK:
            return self._path(self._nvlink(source, "out"), self._nvlink(target, "in"))
        out, into = self._pcie(source, "out"), self._pcie(target, "in")
        if link is Link.PCIE:
            return self._path(out, into)
        over = (self._switch(source, "out"), self._switch(target, "in"))
        if link is Link.NETWORK:  # its cards are behind the switches that the GPUs are behind
            over = (self._network(source, "out"), self._network(target, "in"))
        return self._path(out, *over, into)

    def link(self, source: int, target: int) -> Link:
        """As a live controller knows it."""
        if source == target:
            return Link.SAME
        if self.host(source) != self.host(target):
            return Link.NETWORK
        first, second = source % self.hosts.gpus, target % self.hosts.gpus
        if self.hosts.nvlink == "switch" or (self.hosts.nvlink == "pairs" and first // 2 == second // 2):
            return Link.NVLINK
        return Link.PCIE if first // self.hosts.gpus_per_switch == second // self.hosts.gpus_per_switch else Link.SOCKET

    def _pcie(self, gpu: int, way: str) -> Channel | None:
        return self._channel(f"gpu {gpu} pcie {way}", self.hosts.pcie_gb_per_s)

    def _switch(self, gpu: int, way: str) -> Channel | None:
        if self.hosts.gpus_per_switch == 1:
            return None
        number = gpu % self.hosts.gpus // self.hosts.gpus_per_switch
        return self._channel(f"host {self.host(gpu)} switch {number} {way}", self.hosts.switch_gb_per_s)

    def _memory(self, gpu: int) -> Channel | None:
        return self._channel(f"host {self.host(gpu)} memory", self.hosts.memory_gb_per_s)

    def _nvlink(self, gpu: int, way: str) -> Channel | None:
        return self._channel(f"gpu {gpu} nvlink {way}", self.hosts.nvlink_gb_per_s)

    def _network(self, gpu: int, way: str) -> Channel | None:
        return self._channel(f"host {self.host(gpu)} network {way}", self.hosts.network_gbit_per_s / 8)

    def _channel(self, name: str, gb_per_s: float) -> Channel | None:
        if math.isinf(gb_per_s):
            return None
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(name, round(gb_per_s * GB))
        return channel

    @staticmethod
    def _path(*channels: Channel | None) -> tuple[Channel, ...]:
        return tuple(channel for channel in channels if channel is not None)
