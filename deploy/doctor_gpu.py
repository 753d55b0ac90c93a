"""What workers would compute on here, with which kernels, and how KV would move between them: the doctor's checks that concern GPUs.

`look` asks this host; the other functions turn what it found into findings, so that a test can show them any host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polymux.cluster import gpu_topology
from polymux.cluster.config import ClusterConfig
from polymux.cluster.devices import GpuHost, choose, describe
from polymux.cluster.gpu_topology import HostGpus
from polymux.deploy.findings import Finding, Level
from polymux.kernels.choice import Choice
from polymux.transport.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """This host as the driver, torch and NCCL tell it."""

    gpus: HostGpus
    why_unlisted: str  # why NVML lists none; empty if it does
    why_unusable: str  # why no worker can compute on them; empty if it can
    num_visible: int = 0  # GPUs that torch sees
    versions: str = ""  # of CUDA and NCCL
    nccl_version: int = 0
    why_no_nccl: str = ""


def look() -> Host:
    """Ask. Imports torch only where it could see a GPU."""
    gpus, why_unlisted = gpu_topology.read()
    why_unusable = gpu_topology.why_unusable()
    if why_unusable:
        return Host(gpus=gpus, why_unlisted=why_unlisted, why_unusable=why_unusable)
    import torch

    from polymux.transport.nccl.api import Nccl, load_error, version_text

    nccl_version, why_no_nccl = 0, ""
    try:
        nccl_version = Nccl.load().version
    except Exception as error:  # whatever the library is, the doctor goes on
        why_no_nccl = str(load_error(error))
    return Host(
        gpus=gpus,
        why_unlisted=why_unlisted,
        why_unusable="",
        num_visible=torch.cuda.device_count(),
        versions=f"CUDA {torch.version.cuda}, " + (f"NCCL {version_text(nccl_version)}" if nccl_version else "no NCCL"),
        nccl_version=nccl_version,
        why_no_nccl=why_no_nccl,
    )


def examine(config: ClusterConfig) -> list[Finding]:
    """All that follows, of this host and of a cluster that would run on it alone."""
    host = look()
    chosen = device(config, host)
    is_cuda = chosen.level is Level.OK and "on cuda" in chosen.found
    return [gpu(host), chosen, *kernels(is_cuda=is_cuda), transport(config, host, is_cuda=is_cuda)]


def gpu(host: Host) -> Finding:
    """The GPUs and what joins them. Having none is no fault."""
    count = len(host.gpus.gpus)
    if not count and not host.num_visible:
        return Finding(name="gpu", level=Level.OK, found=f"none ({host.why_unlisted or host.why_unusable})")
    if not count:
        fix = "pip install 'polymux[gpu]', so that prefill and decode workers are put on GPUs that are near each other"
        return Finding(name="gpu", level=Level.NOTE, found=f"{host.num_visible} x unknown, {host.versions}: {host.why_unlisted}", fix=fix)
    found = host.gpus.describe() + (f", {host.versions}" if host.versions else "")
    if host.why_unusable:
        fix = "install a torch with CUDA that accepts the driver, until torch.cuda.is_available() is true, or leave them idle"
        return Finding(name="gpu", level=Level.NOTE, found=f"{found}; idle: {host.why_unusable}", fix=fix)
    if host.gpus.fabric:
        fix = f"where several hosts share it, start their Ray nodes with --labels ray.io/gpu-domain={host.gpus.fabric}"
        return Finding(name="gpu", level=Level.NOTE, found=f"{found}; NVLink fabric {host.gpus.fabric}", fix=fix)
    return Finding(name="gpu", level=Level.OK, found=found)


def device(config: ClusterConfig, host: Host) -> Finding:
    """What the workers of both pools would compute on, and why."""
    hosts = [GpuHost(node_id="here", num_gpus=host.num_visible, gpus=host.gpus, why_unusable=host.why_unusable)] if host.num_visible else []
    if not hosts and host.gpus.gpus:
        hosts = [GpuHost(node_id="here", num_gpus=len(host.gpus.gpus), gpus=host.gpus, why_unusable=host.why_unusable or "torch sees none")]
    try:
        chosen = choose(config, hosts)
    except ConfigError as error:
        return Finding(name="device", level=Level.MISSING, found="no worker could start", fix=str(error))
    return Finding(name="device", level=Level.OK, found="; ".join(describe(role, one) for role, one in chosen.items()))


def kernels(*, is_cuda: bool) -> list[Finding]:
    """Which implementation serves the operations, and why."""
    import torch

    from polymux.kernels.choice import choices

    try:
        return [served(choices(torch.device("cuda" if is_cuda else "cpu")))]
    except ValueError as error:
        return [Finding(name="kernels", level=Level.MISSING, found="POLYMUX_KERNELS cannot be followed", fix=str(error))]


def served(choices: Sequence[Choice]) -> Finding:
    """Operations by implementation and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in choices:
        groups.setdefault((one.implementation, one.reason), []).append(one.operation)
    parts = [f"{name} ({reason})" + (f": {', '.join(group)}" if len(groups) > 1 else "") for (name, reason), group in groups.items()]
    return Finding(name="kernels", level=Level.OK, found="; ".join(parts))


def transport(config: ClusterConfig, host: Host, *, is_cuda: bool) -> Finding:
    """The ways between two workers here, the first that works being taken."""
    from polymux.transport.kv_choice import offered
    from polymux.transport.protocol import DeviceTerms

    terms = DeviceTerms(uuid="here" if is_cuda else "", nccl_version=host.nccl_version)
    names = offered(config.transport.backend, terms, has_descriptor=True)
    if not names:
        fix = "set transport.backend to auto"
        return Finding(name="kv transport", level=Level.MISSING, found=f"{config.transport.backend} moves no KV here", fix=fix)
    found = f"{', '.join(names)}: the first that joins two workers" if len(names) > 1 else f"{names[0]}, as configured"
    if is_cuda and not host.nccl_version:
        fix = "install torch's own libnccl (pip install 'polymux[nccl]'); without it KV moves between GPUs of one host only"
        return Finding(name="kv transport", level=Level.TIGHT, found=f"{found}; no NCCL: {host.why_no_nccl}", fix=fix)
    return Finding(name="kv transport", level=Level.OK, found=found)
