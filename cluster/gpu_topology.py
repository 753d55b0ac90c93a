"""The GPUs of a host and what joins them, as the driver's own library (NVML) tells it; plain data, so that a recording serves as well.

Needs nvidia-ml-py (extra `gpu`); to ask it creates no context on any GPU. What a driver or a container does not answer is
taken for the slower case.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymux.disagg.placement import Link

FABRIC_COMPLETED = 3  # the state of a GPU that has joined its NVLink fabric


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. `index` is by PCI bus, as CUDA counts with CUDA_DEVICE_ORDER=PCI_BUS_ID."""

    index: int
    name: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGpus:
    """A host's GPUs and the link of each pair. `fabric` names the NVLink fabric that reaches beyond the host, where there is one."""

    gpus: tuple[Gpu, ...]
    links: tuple[tuple[Link, ...], ...]  # [i][j], by index
    fabric: str = ""

    def link(self, one: int, other: int) -> Link:
        """NVML may know fewer GPUs than a scheduler counts: then nothing is known of the others."""
        if one == other:
            return Link.SAME
        return self.links[one][other] if max(one, other) < len(self.links) else Link.SYSTEM

    def index(self, gpu_id: str) -> int | None:
        """Of a GPU that a scheduler names by number or by uuid."""
        if gpu_id.isdecimal():
            return int(gpu_id)
        return next((gpu.index for gpu in self.gpus if gpu.uuid == gpu_id), None)

    def domains(self) -> tuple[tuple[int, ...], ...]:
        """GPUs that NVLink joins, each group in ascending order; one that it does not reach is alone."""
        groups: list[set[int]] = []
        for i in range(len(self.gpus)):
            near = {i} | {j for j in range(len(self.gpus)) if self.link(i, j) is Link.NVLINK}
            touching = [group for group in groups if group & near]
            groups = [group for group in groups if not group & near] + [near.union(*touching)]
        return tuple(sorted(tuple(sorted(group)) for group in groups))

    def nearest(self, count: int) -> Link:
        """The best link that any so many GPUs have between each two of them, as far as groups of NVLink and nearer ones tell."""
        for link in sorted(Link, reverse=True):
            near = [{j for j in range(len(self.gpus)) if self.link(i, j) >= link} for i in range(len(self.gpus))]
            if any(len(group) >= count and all(group <= near[j] for j in group) for group in near):
                return link
        return Link.NETWORK

    def describe(self) -> str:
        """One line for people: "8 x NVIDIA H200, 141 GB each, NVLink joins all"."""
        if not self.gpus:
            return "no GPU"
        count, domains = len(self.gpus), self.domains()
        head = f"{count} x {self.gpus[0].name}, {self.gpus[0].memory_bytes / 1e9:.0f} GB each"
        if count == 1:
            return head
        if len(domains) == 1:
            return f"{head}, NVLink joins all"
        if len(domains) == count:
            worst = min(self.link(i, j) for i in range(count) for j in range(i))
            across = {Link.SYSTEM: "PCIe and the link between sockets", Link.SOCKET: "PCIe of one socket"}.get(worst, "PCIe switches")
            return f"{head}, no NVLink, joined by {across}"
        return f"{head}, NVLink joins {' and '.join('-'.join(map(str, group)) for group in domains)}"


def read() -> tuple[HostGpus, str]:
    """This host's GPUs; with none found, why: the library is missing, or what it said."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return HostGpus(gpus=(), links=()), "nvidia-ml-py is not installed (extra gpu)"
    try:
        with _session(nvml):
            return read_with(nvml), ""
    except nvml.NVMLError as error:
        return HostGpus(gpus=(), links=()), f"NVML: {error}"


def why_unusable() -> str:
    """Why no worker of this environment could compute on this host's GPUs; empty if it could."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    if runpy.run_path(str(Path(found.origin).with_name("version.py"))).get("cuda") is None:  # seconds sooner than importing it all
        return "this torch is built without CUDA"
    import torch

    return "" if torch.cuda.is_available() else "torch finds none"


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def read_with(nvml: Any) -> HostGpus:
    """What an initialised NVML says. Raises its NVMLError where not even the GPUs can be listed."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    gpus = tuple(
        Gpu(
            index=i,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        )
        for i, handle in enumerate(handles)
    )
    nvlinks = [_NvLinks(nvml, handle) for handle in handles]
    links = tuple(
        tuple(Link.SAME if i == j else _link(nvml, (handles[i], handles[j]), (nvlinks[i], nvlinks[j])) for j in range(len(handles)))
        for i in range(len(handles))
    )
    return HostGpus(gpus=gpus, links=links, fabric=_fabric(nvml, handles[0]) if handles else "")


class _NvLinks:
    """The other ends of a GPU's active NVLinks: GPUs by PCI address, or switches."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.address = _bus(nvml.nvmlDeviceGetPciInfo(handle).busId)
        self.peers: set[str] = set()
        self.has_switch = False
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            if not _ask(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link):
                continue
            kind = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
            if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                self.has_switch = True
            elif kind == nvml.NVML_NVLINK_DEVICE_TYPE_GPU:
                peer = _ask(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
                self.peers |= {_bus(peer.busId)} if peer is not None else set()


def _link(nvml: Any, handles: tuple[Any, Any], nvlinks: tuple[_NvLinks, _NvLinks]) -> Link:
    one, other = nvlinks
    if other.address in one.peers or (one.has_switch and other.has_switch):
        return Link.NVLINK
    status = _ask(nvml, nvml.nvmlDeviceGetP2PStatus, *handles, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    if status == nvml.NVML_P2P_STATUS_OK:  # a virtual machine may show the fact, and hide the other end
        return Link.NVLINK
    ancestor = _ask(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, *handles)
    if ancestor is None:
        return Link.SYSTEM
    if ancestor <= nvml.NVML_TOPOLOGY_MULTIPLE:
        return Link.PCIE
    return Link.SOCKET if ancestor <= nvml.NVML_TOPOLOGY_NODE else Link.SYSTEM


def _fabric(nvml: Any, handle: Any) -> str:
    """The fabric of several hosts that a GPU has joined, as cluster and clique; empty on all others."""
    info = nvml.c_nvmlGpuFabricInfoV_t()
    if _ask(nvml, nvml.nvmlDeviceGetGpuFabricInfoV, handle, ctypes.byref(info)) is None or info.state != FABRIC_COMPLETED:
        return ""
    cluster = bytes(info.clusterUuid).hex()
    return f"{cluster}.{info.cliqueId}" if cluster.strip("0") else ""


def _ask(nvml: Any, question: Callable[..., Any], *args: Any) -> Any:
    """None where the driver does not know."""
    try:
        return question(*args)
    except nvml.NVMLError:
        return None


def _bus(address: str | bytes) -> str:
    """A PCI address without the zeros that some answers put before the domain."""
    domain, _, rest = _text(address).lower().partition(":")
    return f"{int(domain, 16):x}:{rest}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
