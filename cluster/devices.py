"""What the workers of each pool compute on, from the configuration and from what the hosts have; and why, in words for log and doctor.

`gangs.py` finds out what there is and reserves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from polymux.cluster import gpu_topology
from polymux.cluster.config import ClusterConfig, PoolConfig
from polymux.cluster.gpu_topology import HostGpus
from polymux.disagg.placement import MAX_SHARING, Link, gpu_share
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Role
from polymux.transport.units import GIB, WorkerId

Device = Literal["cpu", "cuda"]
GPU_SHARE = 0.92  # of a GPU's memory, for the workers on it: their arenas and what they take beside them
GPU_OVERHEAD_BYTES = 3 * GIB // 2  # of one worker beside its arena: context, compiled kernels, activations, graphs
RANK_OVERHEAD_BYTES = GIB  # and of one of several ranks: the buffers through which they sum


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHost:
    """One host that has GPUs, as Ray and the driver tell it."""

    node_id: str
    num_gpus: int  # that the scheduler counts, which may be fewer than the driver lists, or none of them
    num_cpus: float = 1.0
    gpus: HostGpus = field(default_factory=lambda: HostGpus(gpus=(), links=()))
    why_unusable: str = ""  # for a worker with device cuda; empty: it is usable
    room: str = ""  # hosts of one room are joined by something as fast as inside them (label ray.io/gpu-domain)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDevice:
    """What each worker of a pool gets."""

    device: Device = "cpu"
    num_gpus: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """GPUs that one worker was given."""

    host: GpuHost
    gpus: tuple[int, ...]  # by index in their host; none where even Ray cannot say
    names: tuple[str, ...] = ()  # of the same, as Ray and CUDA_VISIBLE_DEVICES call them

    def link(self, other: Slot) -> Link:
        """The slowest between any two of them."""
        if self.host.node_id != other.host.node_id:
            return Link.NVLINK if self.host.room and self.host.room == other.host.room else Link.NETWORK
        return min((self.host.gpus.link(i, j) for i in self.gpus for j in other.gpus), default=Link.SYSTEM)

    @property
    def within(self) -> Link:
        """The slowest between two GPUs of this one worker, over which its ranks' sums go."""
        return self.link(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one worker computes on."""

    device: Device = "cpu"
    arena_bytes: int | None = None  # that its share of a GPU leaves; None: to be chosen by the host's memory
    slot: Slot | None = None  # None: no GPU was reserved


CPU_SEAT = Seat()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seating:
    """What every worker computes on, and why."""

    devices: Mapping[Role, PoolDevice]
    seats: Mapping[WorkerId, Seat]

    def link(self, one: WorkerId, other: WorkerId) -> Link | None:
        """What joins two workers' GPUs; None where one of them has none."""
        slots = [seat.slot for worker_id in (one, other) if (seat := self.seats.get(worker_id)) is not None]
        return slots[0].link(slots[1]) if len(slots) == 2 and slots[0] and slots[1] else None

    def plain(self) -> dict[str, Any]:
        """For /v1/polymux/topology: all in one line, by pool what was chosen and why, by worker its GPUs."""
        pools = {str(role): {"device": one.device, "num_gpus": one.num_gpus, "why": one.why} for role, one in self.devices.items()}
        slots = {worker_id: seat.slot for worker_id, seat in self.seats.items() if seat.slot is not None}
        workers = {
            worker_id: {
                "host": slot.host.gpus.describe(),
                "gpus": list(slot.gpus),
                "joined_by": slot.within.name.lower() if len(slot.gpus) > 1 else None,
            }
            for worker_id, slot in slots.items()
        }
        return {"summary": self.describe(), "pools": pools, "workers": workers}

    def describe(self) -> str:
        return "; ".join([*(describe(role, one) for role, one in self.devices.items()), *self._far_apart()])

    def _far_apart(self) -> list[str]:
        """Workers whose ranks sum over slower links than others of their host would have."""
        slots = {worker_id: seat.slot for worker_id, seat in self.seats.items() if seat.slot is not None and len(seat.slot.gpus) > 1}
        return [
            f"the ranks of {worker_id} on GPUs {', '.join(map(str, slot.gpus))} are joined by {slot.within.name.lower()} only"
            for worker_id, slot in slots.items()
            if slot.within < slot.host.gpus.nearest(len(slot.gpus))
        ]


def choose(config: ClusterConfig, hosts: Sequence[GpuHost]) -> dict[Role, PoolDevice]:
    """Device and GPUs a worker for both pools. Raises ConfigError for a pool that asks for what is not there."""
    pools = {Role.PREFILL: config.pools.prefill, Role.DECODE: config.pools.decode}
    usable = [host for host in hosts if not host.why_unusable]
    devices = _together({role: _device(role, pool, hosts, usable) for role, pool in pools.items()}, pools)
    asked = {role: _asked(pools[role], device) for role, (device, _) in devices.items()}
    given = sum(pools[role].workers * num_gpus for role, num_gpus in asked.items() if num_gpus)
    open_roles = [role for role, (device, _) in devices.items() if device == "cuda" and asked[role] is None]
    num_usable = sum(host.num_gpus for host in usable)
    num_left = int(num_usable - given)
    if num_left < 0 and any(device == "cuda" for device, _ in devices.values()):
        raise ConfigError(
            f"pools.*.num_gpus and pools.*.tensor_parallel ask for {given:g} GPUs, and {num_usable} are usable; lower them or "
            "pools.*.workers, or set pools.*.device=cpu"
        )
    share = gpu_share(sum(pools[role].workers for role in open_roles), num_left)
    if open_roles and share is None:
        num_workers = sum(pool.workers for pool in pools.values())
        raise ConfigError(
            f"pools.*.workers={num_workers} in all would share {num_left} GPUs, and at most {MAX_SHARING} can share one; lower it, or set "
            "pools.*.device=cpu for some"
        )
    found = {}
    for role, (device, why) in devices.items():
        num_gpus = (share or 0.0) if role in open_roles else (asked[role] or 0.0)
        found[role] = PoolDevice(device=device, num_gpus=num_gpus, why=why)
    return found


def _asked(pool: PoolConfig, device: Device) -> float | None:
    """GPUs of each worker, where somebody says so: the configuration, or the ranks, which have one each. None: what is left is shared."""
    if pool.num_gpus is None and device == "cuda" and pool.tensor_parallel > 1:
        return float(pool.tensor_parallel)
    return pool.num_gpus


def _together(devices: dict[Role, tuple[Device, str]], pools: Mapping[Role, PoolConfig]) -> dict[Role, tuple[Device, str]]:
    """The same for both pools: nothing moves KV between a GPU and another worker's host memory."""
    if len({device for device, _ in devices.values()}) == 1:
        return devices
    on_gpu, on_cpu = sorted(devices, key=lambda role: devices[role][0], reverse=True)
    if pools[on_gpu].device == "cuda":
        raise ConfigError(
            f"pools.{on_gpu} computes on GPUs and pools.{on_cpu} on CPUs ({devices[on_cpu][1]}), and KV does not move between them; set "
            "pools.*.device to cuda for both, or to cpu"
        )
    return {role: ("cpu", why if role is on_cpu else f"the {on_cpu} pool is: {devices[on_cpu][1]}") for role, (_, why) in devices.items()}


def _device(role: Role, pool: PoolConfig, hosts: Sequence[GpuHost], usable: Sequence[GpuHost]) -> tuple[Device, str]:
    num_gpus = sum(host.num_gpus for host in usable)
    reasons = "; ".join(sorted({host.why_unusable for host in hosts if host.why_unusable})) or "no host has one that Ray knows"
    if pool.device == "cpu":
        return "cpu", f"pools.{role}.device=cpu"
    if pool.num_gpus == 0:
        if pool.device == "cuda":
            raise ConfigError(f"pools.{role} has device=cuda and num_gpus=0; leave num_gpus at auto")
        return "cpu", f"pools.{role}.num_gpus=0"
    if num_gpus and pool.tensor_parallel > 1:
        return _device_of_ranks(role, pool, usable)
    if num_gpus:
        return "cuda", f"{num_gpus} usable GPU{'s' if num_gpus > 1 else ''}"
    if pool.device == "cuda":
        raise ConfigError(f"pools.{role}.device=cuda, and there is no usable GPU: {reasons}; set it to auto or cpu, or repair that")
    return "cpu", f"no usable GPU: {reasons}"


def _device_of_ranks(role: Role, pool: PoolConfig, usable: Sequence[GpuHost]) -> tuple[Device, str]:
    """Each rank has one whole GPU, and all of them are in one host."""
    wanted, largest = pool.tensor_parallel, max(host.num_gpus for host in usable)
    if pool.num_gpus not in (None, wanted):
        why = f"pools.{role}.num_gpus={pool.num_gpus:g} is not a GPU for each rank of pools.{role}.tensor_parallel={wanted}"
        fix = f"leave num_gpus at auto, or set it to {wanted}, or pools.{role}.device to cpu"
    elif largest < wanted:
        why = f"pools.{role}.tensor_parallel={wanted} takes as many GPUs of one host, and no host has more than {largest}"
        fix = f"lower it to {largest}, or set pools.{role}.device to cpu"
    else:
        return "cuda", f"{wanted} GPUs of one host for the ranks of each worker"
    if pool.device == "cuda" or pool.num_gpus is not None:
        raise ConfigError(f"{why}; {fix}")
    return "cpu", why


def seat(pool: PoolDevice, slot: Slot) -> Seat:
    """The seat of a worker that was given these GPUs."""
    return Seat(device=pool.device, slot=slot, arena_bytes=_arena_bytes(pool.num_gpus, slot) if pool.device == "cuda" else None)


def _arena_bytes(num_gpus: float, slot: Slot) -> int | None:
    """What a worker's share of its GPU, or of the smallest of several, leaves for an arena on each. None where no driver says how large."""
    sizes = [slot.host.gpus.gpus[i].memory_bytes for i in slot.gpus if i < len(slot.host.gpus.gpus)]
    if not sizes:
        return None
    overhead = GPU_OVERHEAD_BYTES + (RANK_OVERHEAD_BYTES if num_gpus > 1 else 0)
    share = int(min(num_gpus, 1.0) * GPU_SHARE * min(sizes)) - overhead
    if share <= 0:
        raise ConfigError(f"{num_gpus:g} of a GPU with {min(sizes)} bytes leaves no room for an arena; let fewer workers share it")
    return share


def this_host() -> GpuHost:
    """The one GPU that this process computes on."""
    gpus, _ = gpu_topology.read()
    return GpuHost(node_id="here", num_gpus=1, gpus=gpus, why_unusable=gpu_topology.why_unusable())


def weight_layout(config: ClusterConfig, devices: Mapping[Role, PoolDevice]) -> str:
    """How the stores lay weights out: plain for GPUs, and `auto`, which packs them for a CPU, where no worker has one."""
    is_packed = config.engine.weight_layout == "onednn"
    on_gpu = [role for role, one in devices.items() if one.device == "cuda"]
    if is_packed and on_gpu:
        raise ConfigError(f"engine.weight_layout=onednn is for CPUs, and pools.{on_gpu[0]} computes on GPUs; set it to auto")
    return "plain" if on_gpu else config.engine.weight_layout


def describe(role: Role, one: PoolDevice) -> str:
    """For people: "cuda, half a GPU each"."""
    if one.device == "cpu":
        return f"{role} on cpu ({one.why})"
    share = f"1/{round(1 / one.num_gpus)} GPU" if one.num_gpus < 1 else f"{one.num_gpus:g} GPU{'s' if one.num_gpus > 1 else ''}"
    return f"{role} on cuda, {share} a worker ({one.why})"
