"""What the doctor says of GPUs: of hosts that it is shown, and of this one."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from polymux.cluster.config import ClusterConfig
from polymux.cluster.gpu_topology import Gpu, HostGpus
from polymux.deploy import doctor, doctor_gpu
from polymux.deploy.doctor_gpu import Host
from polymux.deploy.findings import Finding, Level
from polymux.disagg.placement import Link
from polymux.kernels.choice import Choice, override
from polymux.kernels.libraries import why_not
from polymux.transport.units import GIB

from ..kernels.gpu.libraries import stand_in

PAIR = HostGpus(
    gpus=tuple(Gpu(index=i, name="NVIDIA H200", uuid=f"GPU-{i}", memory_bytes=141 * GIB) for i in range(2)),
    links=((Link.SAME, Link.NVLINK), (Link.NVLINK, Link.SAME)),
)
NONE = HostGpus(gpus=(), links=())
BARE = Host(gpus=NONE, why_unlisted="nvidia-ml-py is not installed", why_unusable="this torch is built without CUDA")
GOOD = Host(gpus=PAIR, why_unlisted="", why_unusable="", num_visible=2, versions="CUDA 13.0, NCCL 2.29.7", nccl_version=22907)
CONFIG = ClusterConfig()
RANKS = ClusterConfig.from_dict({"pools": {"prefill": {"tensor_parallel": 2}, "decode": {"tensor_parallel": 2}}})


def transport(host: Host, *overrides: str) -> Finding:
    config = ClusterConfig.load(overrides=overrides, environ={})
    return doctor_gpu.transport(config, host, is_cuda=not host.why_unusable)


@pytest.mark.parametrize(
    ("finding", "level", "found", "fix"),
    [
        (doctor_gpu.gpu(BARE), Level.OK, "none (nvidia-ml-py is not installed)", ""),
        (doctor_gpu.gpu(GOOD), Level.OK, "2 x NVIDIA H200, 151 GB each, NVLink joins all, CUDA 13.0, NCCL 2.29.7", ""),
        (doctor_gpu.gpu(replace(GOOD, gpus=NONE, why_unlisted="no library")), Level.NOTE, "2 x unknown", "polymux[gpu]"),
        (doctor_gpu.gpu(replace(GOOD, why_unusable="torch finds none")), Level.NOTE, "idle: torch finds none", "torch with CUDA"),
        (doctor_gpu.gpu(replace(GOOD, gpus=replace(PAIR, fabric="ab.1"))), Level.NOTE, "NVLink fabric", "ray.io/gpu-domain=ab.1"),
        (doctor_gpu.device(CONFIG, BARE), Level.OK, "prefill on cpu (no usable GPU", ""),
        (doctor_gpu.device(CONFIG, GOOD), Level.OK, "decode on cuda, 1 GPU a worker (2 usable GPUs)", ""),
        (doctor_gpu.device(CONFIG, replace(GOOD, num_visible=1)), Level.OK, "prefill on cuda, 1/2 GPU a worker", ""),
        (doctor_gpu.device(RANKS, replace(GOOD, num_visible=4)), Level.OK, "decode on cuda, 2 GPUs a worker (2 GPUs of one host", ""),
        (doctor_gpu.device(RANKS, GOOD), Level.MISSING, "no worker could start", "ask for 4 GPUs, and 2 are usable; lower them"),
        (doctor_gpu.device(CONFIG, replace(BARE, gpus=PAIR)), Level.OK, "built without CUDA", ""),
        (transport(BARE), Level.OK, "local, shm, tcp: the first", ""),
        (transport(GOOD), Level.OK, "local, cuda_ipc, nccl: the first", ""),
        (transport(replace(GOOD, nccl_version=0, why_no_nccl="too old")), Level.TIGHT, "no NCCL: too old", "polymux[nccl]"),
        (transport(BARE, "transport.backend=tcp"), Level.OK, "tcp, as configured", ""),
        (transport(GOOD, "transport.backend=shm"), Level.MISSING, "shm moves no KV here", "auto"),
    ],
    ids=lambda value: f"{value.name}: {value.found}" if isinstance(value, Finding) else "",
)
def test_what_a_host_has_is_told_with_what_to_do(finding: Finding, level: Level, found: str, fix: str) -> None:
    assert finding.level is level
    assert found in finding.found
    assert fix in finding.fix and bool(finding.fix) == (level is not Level.OK)


def test_a_wish_that_cannot_be_met_is_missing() -> None:
    config = ClusterConfig.load(overrides=["pools.prefill.device=cuda"], environ={})
    finding = doctor_gpu.device(config, BARE)
    assert finding.level is Level.MISSING and "set it to auto or cpu" in finding.fix


def test_a_library_is_shown_where_it_is_installed_and_where_it_serves() -> None:
    with stand_in():
        (beside,) = doctor_gpu.kernels(is_cuda=True)
        assert beside.found.endswith("triton (ours; flashinfer 0.7.2 serves if POLYMUX_KERNELS has attend=flashinfer): attend")
        with override("attend=flashinfer"):
            (chosen,) = doctor_gpu.kernels(is_cuda=True)
    assert "flashinfer (POLYMUX_KERNELS says so): attend" in chosen.found and chosen.level is Level.OK


@pytest.mark.skipif(not why_not("flashinfer"), reason="flashinfer is installed")
def test_a_library_that_is_asked_for_and_not_there_is_missing_with_the_fix() -> None:
    with override("attend=flashinfer"):
        (finding,) = doctor_gpu.kernels(is_cuda=True)
    assert finding.level is Level.MISSING and "flashinfer is not installed: pip install 'polymux[flashinfer]'" in finding.fix


def test_kernels_are_grouped_by_what_serves_them() -> None:
    alike = [Choice(operation=name, implementation="torch", reason="a CPU") for name in ("a", "b")]
    assert doctor_gpu.served(alike).found == "torch (a CPU)"
    mixed = [*alike, Choice(operation="c", implementation="triton", reason="the fastest here")]
    assert doctor_gpu.served(mixed).found == "torch (a CPU): a, b; triton (the fastest here): c"


def test_this_host_is_told_in_four_lines() -> None:
    assert [one.name for one in doctor_gpu.examine(CONFIG)] == ["gpu", "device", "kernels", "kv transport"]


def test_without_the_servers_libraries_the_doctor_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polymux.deploy.cli_config", None)  # which is the first to import them
    (finding,) = [one for one in doctor.examine({}) if one.name == "gpu"]
    assert finding.level is Level.NOTE and "cannot ask" in finding.found
