"""What joins a host's GPUs, read from recordings of NVML: all on NVSwitch, PCIe only, and pairs with bridges."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from polymux.cluster import gpu_topology
from polymux.cluster.gpu_topology import HostGpus
from polymux.disagg.placement import Link

PLAYER = Path(__file__).parent / "fake_nvml"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PLAYER)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    player = importlib.import_module("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", player)
    assert Path(player.__file__ or "").parent == PLAYER
    return player


def read(nvml: Any, name: str) -> HostGpus:
    nvml.load(name)
    found, why = gpu_topology.read()
    assert why == ""
    return found


def test_switches_join_every_pair(nvml: Any) -> None:
    host = read(nvml, "nvswitch-8")
    assert host.domains() == (tuple(range(8)),)
    assert {host.link(i, j) for i in range(8) for j in range(8) if i != j} == {Link.NVLINK}
    assert host.link(3, 3) is Link.SAME
    assert host.describe() == "8 x NVIDIA H200, 151 GB each, NVLink joins all"


def test_without_nvlink_the_way_over_pcie_tells_near_from_far(nvml: Any) -> None:
    host = read(nvml, "pcie-8")
    assert len(host.domains()) == 8
    assert [host.link(0, j) for j in (1, 2, 3, 4)] == [Link.PCIE, Link.SOCKET, Link.SOCKET, Link.SYSTEM]
    assert host.describe() == "8 x NVIDIA L40S, 48 GB each, no NVLink, joined by PCIe and the link between sockets"


def test_bridges_join_pairs_whatever_their_numbers(nvml: Any) -> None:
    host = read(nvml, "bridged-4")
    assert host.domains() == ((0, 2), (1, 3))
    assert host.link(0, 1) is Link.SOCKET and host.link(0, 3) is Link.SYSTEM
    assert host.describe().endswith("NVLink joins 0-2 and 1-3")


LINKS = {"NV": Link.NVLINK, "PI": Link.PCIE, "PX": Link.PCIE, "PH": Link.SOCKET, "NO": Link.SOCKET, "SY": Link.SYSTEM}


def published(nvml: Any, name: str) -> tuple[HostGpus, list[list[str]]]:
    topo = importlib.import_module("topo")
    nvml._recording.update(topo.recording(name))
    return gpu_topology.read()[0], topo.HOSTS[name][1]


@pytest.mark.parametrize("name", ["H100 on NVSwitch", "H100 NVL4", "V100 cube mesh", "RTX 4090", "L40S"])
def test_real_hosts_are_read_as_the_drivers_own_tool_shows_them(nvml: Any, name: str) -> None:
    host, rows = published(nvml, name)
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    assert [host.link(i, j) for i, j in pairs] == [LINKS[rows[i][j][:2]] for i, j in pairs]


def test_links_that_the_driver_hides_are_found_by_what_it_says_of_peers(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", lambda *_: 255)
    host, rows = published(nvml, "V100 cube mesh")
    assert all((host.link(i, j) is Link.NVLINK) == rows[i][j].startswith("NV") for i in range(8) for j in range(8) if i != j)


def test_links_are_symmetric(nvml: Any) -> None:
    for name in ("nvswitch-8", "pcie-8", "bridged-4"):
        host = read(nvml, name)
        assert all(host.link(i, j) is host.link(j, i) for i in range(len(host.gpus)) for j in range(len(host.gpus)))


def test_what_a_driver_does_not_tell_is_taken_for_the_slowest(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise nvml.NVMLError("Not Supported")

    for name in ("NvLinkState", "TopologyCommonAncestor", "P2PStatus"):
        monkeypatch.setattr(nvml, f"nvmlDeviceGet{name}", silent)
    assert read(nvml, "nvswitch-8").link(0, 1) is Link.SYSTEM


def test_a_virtual_machine_may_hide_the_switch_and_still_say_that_nvlink_works(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", lambda *_: 255)
    assert read(nvml, "nvswitch-8").link(0, 7) is Link.NVLINK


def test_a_fabric_of_several_hosts_has_a_name(nvml: Any) -> None:
    host = read(nvml, "nvswitch-8")
    assert host.fabric == ""
    cluster = "00112233445566778899aabbccddeeff"
    for state, name in ((3, f"{cluster}.7"), (2, "")):  # completed; still joining
        nvml._recording["fabric"] = {"cluster": cluster, "clique": 7, "state": state}
        assert gpu_topology.read()[0].fabric == name


def test_a_host_without_driver_or_library_says_so(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml._recording["gpus"] = []
    assert gpu_topology.read() == (HostGpus(gpus=(), links=()), "NVML: Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in gpu_topology.read()[1]


def test_gpus_are_found_by_number_and_by_uuid(nvml: Any) -> None:
    host = read(nvml, "bridged-4")
    assert host.index("3") == 3
    assert host.index(host.gpus[2].uuid) == 2
    assert host.index("MIG-1") is None


def test_the_player_offers_what_the_library_does(nvml: Any) -> None:
    """Every name that is used is one of nvidia-ml-py, where that is installed, and its constants are the library's."""
    used = set(re.findall(r"nvml\.(\w+)", Path(gpu_topology.__file__ or "").read_text())) - {"NVMLError"}
    assert used and not [name for name in used if not hasattr(nvml, name)]
    sys.path.remove(str(PLAYER))
    del sys.modules["pynvml"]
    try:
        real: ModuleType = importlib.import_module("pynvml")
    except ImportError:
        pytest.skip("nvidia-ml-py is not installed")
    assert not [name for name in used if not hasattr(real, name)]
    assert {name: getattr(real, name) for name in used if name.isupper()} == {name: getattr(nvml, name) for name in used if name.isupper()}


def test_recordings_say_where_they_come_from() -> None:
    for path in (PLAYER / "recordings").glob("*.json"):
        assert json.loads(path.read_text())["source"]
