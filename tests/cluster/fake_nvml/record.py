"""Record what NVML says of this host, for `pynvml.py` beside this file to play. Needs nvidia-ml-py.

python record.py > recordings/NAME.json
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

sys.path = [one for one in sys.path if Path(one or ".").resolve() != Path(__file__).resolve().parent]  # the real one, not the player
import pynvml as nvml  # noqa: E402


def ask(question: Any, *args: Any) -> Any:
    try:
        return question(*args)
    except nvml.NVMLError:
        return None


def gpu(handle: Any) -> dict[str, Any]:
    links = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = ask(nvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:
            break
        remote = ask(nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        kind = ask(nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        links.append({"state": state, "remote_type": 255 if kind is None else kind, "remote_bus_id": text(remote.busId) if remote else ""})
    return {
        "name": text(nvml.nvmlDeviceGetName(handle)),
        "uuid": text(nvml.nvmlDeviceGetUUID(handle)),
        "bus_id": text(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "nvlinks": links,
    }


def fabric(handle: Any) -> dict[str, Any] | None:
    info = nvml.c_nvmlGpuFabricInfoV_t()
    if ask(nvml.nvmlDeviceGetGpuFabricInfoV, handle, ctypes.byref(info)) is None:
        return None
    return {"cluster": bytes(info.clusterUuid).hex(), "clique": info.cliqueId, "state": info.state}


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def pairs(question: Any, handles: list[Any], same: int, otherwise: int, *args: Any) -> list[list[int]]:
    return [[same if a is b else otherwise if (x := ask(question, a, b, *args)) is None else x for b in handles] for a in handles]


def main() -> None:
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    recording = {
        "source": f"read from a host with driver {text(nvml.nvmlSystemGetDriverVersion())}",
        "gpus": [gpu(handle) for handle in handles],
        "ancestors": pairs(nvml.nvmlDeviceGetTopologyCommonAncestor, handles, 0, nvml.NVML_TOPOLOGY_SYSTEM),
        "p2p_nvlink": pairs(nvml.nvmlDeviceGetP2PStatus, handles, 0, nvml.NVML_P2P_STATUS_UNKNOWN, nvml.NVML_P2P_CAPS_INDEX_NVLINK),
        "fabric": fabric(handles[0]) if handles else None,
    }
    sys.stdout.write(json.dumps(recording) + "\n")


if __name__ == "__main__":
    main()
