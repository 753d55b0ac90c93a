"""NVML as a recording plays it: what nvidia-ml-py offers of it to `gpu_topology.py`, under the same names and with the same errors.

`record.py` beside this file makes a recording of a host. Which one is played is said by `load`, or by POLYMUX_NVML_RECORDING where the
process is not the test's own.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_NVLINK_MAX_LINKS = 36
NVML_NVLINK_DEVICE_TYPE_GPU = 0
NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
NVML_TOPOLOGY_MULTIPLE = 20
NVML_TOPOLOGY_NODE = 40
NVML_P2P_CAPS_INDEX_NVLINK = 2
NVML_P2P_STATUS_OK = 0

_recording: dict[str, Any] = {"gpus": [], "ancestors": [], "p2p_nvlink": [], "fabric": None}


class NVMLError(Exception):
    pass


class c_nvmlGpuFabricInfoV_t(ctypes.Structure):
    _fields_ = [("clusterUuid", ctypes.c_uint8 * 16), ("cliqueId", ctypes.c_uint32), ("state", ctypes.c_uint8)]


def load(name: str) -> None:
    _recording.update(json.loads((Path(__file__).parent / "recordings" / f"{name}.json").read_text()))


def nvmlInit() -> None:
    name = os.environ.get("POLYMUX_NVML_RECORDING")
    if name:
        load(name)
    if not _recording["gpus"]:
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown() -> None:
    pass


def nvmlDeviceGetCount() -> int:
    return len(_recording["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetName(handle: int) -> str:
    return str(_recording["gpus"][handle]["name"])


def nvmlDeviceGetUUID(handle: int) -> str:
    return str(_recording["gpus"][handle]["uuid"])


def nvmlDeviceGetMemoryInfo(handle: int) -> SimpleNamespace:
    return SimpleNamespace(total=_recording["gpus"][handle]["memory_bytes"])


def nvmlDeviceGetPciInfo(handle: int) -> SimpleNamespace:
    return SimpleNamespace(busId=_recording["gpus"][handle]["bus_id"])


def _nvlink(handle: int, link: int) -> dict[str, Any]:
    links: list[dict[str, Any]] = _recording["gpus"][handle]["nvlinks"]
    if link >= len(links):
        raise NVMLError("Not Supported")
    return links[link]


def nvmlDeviceGetNvLinkState(handle: int, link: int) -> int:
    return int(_nvlink(handle, link)["state"])


def nvmlDeviceGetNvLinkRemoteDeviceType(handle: int, link: int) -> int:
    return int(_nvlink(handle, link)["remote_type"])


def nvmlDeviceGetNvLinkRemotePciInfo(handle: int, link: int) -> SimpleNamespace:
    return SimpleNamespace(busId=_nvlink(handle, link)["remote_bus_id"])


def nvmlDeviceGetTopologyCommonAncestor(one: int, other: int) -> int:
    return int(_recording["ancestors"][one][other])


def nvmlDeviceGetP2PStatus(one: int, other: int, index: int) -> int:
    assert index == NVML_P2P_CAPS_INDEX_NVLINK
    return int(_recording["p2p_nvlink"][one][other])


def nvmlDeviceGetGpuFabricInfoV(handle: int, pointer: Any) -> int:
    fabric = _recording["fabric"]
    if fabric is None:
        raise NVMLError("Not Supported")
    info = pointer._obj
    info.clusterUuid[:] = list(bytes.fromhex(fabric["cluster"]))
    info.cliqueId, info.state = fabric["clique"], fabric["state"]
    return 0
