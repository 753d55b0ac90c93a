"""Hosts as `nvidia-smi topo -m` printed them in public reports, as recordings for `pynvml.py` beside this file.

The table says what joins each pair, and neither addresses nor how many links a GPU has: counted links that go to more peers than 18 could
are on switches, others lead to the peer itself.
"""

from __future__ import annotations

from typing import Any

ANCESTORS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}  # NVML's levels
MAX_LINKS = 18

HOSTS = {  # name of the GPUs, where the table is from, its rows
    "H100 on NVSwitch": ("NVIDIA/nccl issue 1264", [["X" if i == j else "NV18" for j in range(8)] for i in range(8)]),
    "H100 NVL4": ("NVIDIA/nccl issue 1617", [["X" if i == j else "NV6" for j in range(4)] for i in range(4)]),
    "V100 cube mesh": (
        "vllm-project/vllm issue 17152; the pairs among GPUs 0 to 2 by each GPU's six links",
        [
            row.split()
            for row in (
                "X NV1 NV2 NV1 SYS SYS SYS NV2",
                "NV1 X NV1 NV2 SYS SYS NV2 SYS",
                "NV2 NV1 X NV2 SYS NV1 SYS SYS",
                "NV1 NV2 NV2 X NV1 SYS SYS SYS",
                "SYS SYS SYS NV1 X NV2 NV2 NV1",
                "SYS SYS NV1 SYS NV2 X NV1 NV2",
                "SYS NV2 SYS SYS NV2 NV1 X NV1",
                "NV2 SYS SYS SYS NV1 NV2 NV1 X",
            )
        ],
    ),
    "RTX 4090": ("NVIDIA/go-gpuallocator issue 17", [["X" if i == j else "SYS" for j in range(8)] for i in range(8)]),
    "L40S": (
        "warpem/miss-alignment issue 106",
        [row.split() for row in ("X NODE SYS SYS", "NODE X SYS SYS", "SYS SYS X NODE", "SYS SYS NODE X")],
    ),
}


def recording(name: str) -> dict[str, Any]:
    source, rows = HOSTS[name]
    numbers = range(len(rows))
    buses = [f"00000000:{0x18 + number:02X}:00.0" for number in numbers]
    return {
        "source": source,
        "gpus": [
            {
                "name": name,
                "uuid": f"GPU-{number:08d}",
                "bus_id": buses[number],
                "memory_bytes": 80 << 30,
                "nvlinks": _links(rows[number], buses),
            }
            for number in numbers
        ],
        "ancestors": [[0 if i == j else ANCESTORS.get(rows[i][j], ANCESTORS["SYS"]) for j in numbers] for i in numbers],
        "p2p_nvlink": [[0 if rows[i][j].startswith("NV") else 1 for j in numbers] for i in numbers],
        "fabric": None,
    }


def _links(row: list[str], buses: list[str]) -> list[dict[str, Any]]:
    counts = {peer: int(cell[2:]) for peer, cell in enumerate(row) if cell.startswith("NV")}
    if sum(counts.values()) > MAX_LINKS:
        return [{"state": 1, "remote_type": 2, "remote_bus_id": ""} for _ in range(max(counts.values()))]
    return [{"state": 1, "remote_type": 0, "remote_bus_id": buses[peer]} for peer, count in counts.items() for _ in range(count)]
