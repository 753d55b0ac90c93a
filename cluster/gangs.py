"""Where Ray puts the workers that have GPUs: gangs as placement groups, and roles dealt once it is known which GPUs they got.

Ray packs a gang into one host, or into hosts of one `ray.io/gpu-domain` label, and knows nothing of links inside a host. So what each
bundle of a group holds is asked first, by a task inside it, and then the workers are given their bundles: whoever hands over KV
sits next to whoever takes it. A worker that is started again has the same bundle.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from polymux.cluster.config import ClusterConfig, PoolConfig
from polymux.cluster.devices import GpuHost, PoolDevice, Seat, Seating, Slot, choose, seat
from polymux.cluster.gpu_topology import HostGpus
from polymux.cluster.probes import look, where
from polymux.cluster.processes import WorkerPlace
from polymux.disagg.placement import Gang, Room, deal, gangs, near_order, stretches
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Role
from polymux.transport.units import WorkerId

DOMAIN_LABEL = "ray.io/gpu-domain"  # set by whoever starts the nodes: ray start --labels
LOOK_S = 120.0  # for a host to say what GPUs it has
RESERVE_S = 30.0  # for Ray to find room for a gang
CPU_SHARE = 0.8  # of a host's CPUs, for the workers on it
Bundle = dict[str, float]  # resources that Ray sets aside together

ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # so that an index means the same GPU to Ray, NVML and CUDA


class Gangs:
    """The placement groups of one cluster."""

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []
        self._options: dict[WorkerId, dict[str, Any]] = {}
        self._environment: dict[WorkerId, dict[str, str]] = {}

    def options(self, worker_id: WorkerId) -> dict[str, Any] | None:
        """With which a worker's actor takes all that was set aside for it; None for one without a GPU."""
        return self._options.get(worker_id)

    def environment(self, worker_id: WorkerId) -> dict[str, str]:
        """What its process must find set."""
        return self._environment.get(worker_id, {})

    async def seat(self, config: ClusterConfig, places: Sequence[WorkerPlace]) -> Seating:
        """Choose devices, and reserve GPUs for the workers that have some. Raises ConfigError where there are too few."""
        hosts = await _hosts()
        devices = choose(config, hosts)
        seats = {place.worker_id: Seat() for place in places}
        waiting = {role: [place for place in places if place.role is role and devices[role].num_gpus > 0] for role in Role}
        roles = deal(len(waiting[Role.PREFILL]), len(waiting[Role.DECODE]))
        if roles:
            seats |= await self._reserve(config, devices, hosts, [waiting[role].pop(0) for role in roles])
        return Seating(devices=devices, seats=seats)

    async def _reserve(
        self, config: ClusterConfig, devices: Mapping[Role, PoolDevice], hosts: Sequence[GpuHost], line: Sequence[WorkerPlace]
    ) -> dict[WorkerId, Seat]:
        demands = [devices[place.role].num_gpus for place in line]
        found = gangs(demands, _rooms(hosts))
        if found is None:
            raise ConfigError(
                f"the pools ask for {sum(demands):g} GPUs ({', '.join(f'{n:g}' for n in demands)}), and the hosts have "
                f"{', '.join(str(host.num_gpus) for host in hosts) or 'none'}; lower pools.*.workers, pools.*.tensor_parallel or "
                "pools.*.num_gpus"
            )
        seats: dict[WorkerId, Seat] = {}
        num_ranks = sum(config.pools.of(place.role).tensor_parallel for place in line)
        for gang in found:
            members = [line[i] for i in gang.members]
            bundles = [_bundle(devices[place.role], config.pools.of(place.role), hosts, num_ranks) for place in members]
            is_by_gpu = gang.fits_one_host and any(bundle["GPU"] > 1 for bundle in bundles)
            slots = await (self._take_gpu_by_gpu if is_by_gpu else self._take)(gang, members, bundles, hosts)
            seats |= {place.worker_id: seat(devices[place.role], slots[place.worker_id]) for place in members}
        return seats

    async def _take(
        self, gang: Gang, members: Sequence[WorkerPlace], bundles: Sequence[Bundle], hosts: Sequence[GpuHost]
    ) -> dict[WorkerId, Slot]:
        """Set aside a bundle for each worker, and deal out the roles."""
        group = await self._group(gang, bundles)
        slots = await _slots(group, bundles, hosts)
        taken = {}
        for place, i in _dealt(members, bundles, slots):
            self._options[place.worker_id] = _options(group, i, bundles[i])
            taken[place.worker_id] = slots[i]
        return taken

    async def _take_gpu_by_gpu(
        self, gang: Gang, members: Sequence[WorkerPlace], bundles: Sequence[Bundle], hosts: Sequence[GpuHost]
    ) -> dict[WorkerId, Slot]:
        """Set aside a bundle for each GPU, and give each worker GPUs that are near each other: Ray fills a larger bundle with any.

        Such a worker takes no GPU of Ray's when it starts: the group has them, and it is told which it sees.
        """
        parts = [_parts(bundle) for bundle in bundles]
        group = await self._group(gang, [*chain(*parts)])
        slots = await _slots(group, [*chain(*parts)], hosts)
        firsts = [sum(map(len, parts[:i])) for i in range(len(parts))]
        whole = [first + i for first, part in zip(firsts, parts, strict=True) for i in range(len(part)) if part[i]["GPU"] == 1]
        sizes = [round(bundle["GPU"]) if bundle["GPU"] >= 1 else 0 for bundle in bundles]
        line = near_order(len(whole), lambda i, j: slots[whole[i]].link(slots[whole[j]]))
        taken = {}
        for place, first, part, stretch in zip(members, firsts, parts, stretches(sizes, line), strict=True):
            options, slot = _options(group, first, part[0]), slots[first]
            if stretch:
                found = [slots[whole[i]] for i in stretch]
                slot = Slot(host=slot.host, gpus=tuple(chain(*(s.gpus for s in found))), names=tuple(chain(*(s.names for s in found))))
                options["num_gpus"] = 0
                self._environment[place.worker_id] = {"CUDA_VISIBLE_DEVICES": ",".join(slot.names)}
            self._options[place.worker_id], taken[place.worker_id] = options, slot
        return taken

    async def _group(self, gang: Gang, bundles: Sequence[Bundle]) -> PlacementGroup:
        """The gang's placement group, once its resources are set aside."""
        how: dict[str, Any] = {"strategy": "STRICT_PACK"} if gang.fits_one_host else {"topology_strategy": {DOMAIN_LABEL: "STRICT_PACK"}}
        group: PlacementGroup = placement_group(list(bundles), **how)
        self._groups.append(group)
        if not await asyncio.to_thread(group.wait, RESERVE_S):
            where = "one host" if gang.fits_one_host else f"one {DOMAIN_LABEL}"
            raise ConfigError(
                f"Ray did not find {sum(bundle['GPU'] for bundle in bundles):g} free GPUs in {where} within {RESERVE_S:.0f} s (bundles "
                f"{bundles}); others may hold them: see `ray status`, or lower pools.*.workers"
            )
        return group

    def close(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups.clear()
        self._options.clear()
        self._environment.clear()


def _rooms(hosts: Sequence[GpuHost]) -> list[Room]:
    """Hosts of one domain label are a room, any other host is one of its own."""
    rooms: dict[str, list[int]] = {}
    for host in hosts:
        rooms.setdefault(host.room or host.node_id, []).append(host.num_gpus)
    return [Room(name=name, gpus=tuple(counts)) for name, counts in rooms.items()]


def _bundle(device: PoolDevice, pool: PoolConfig, hosts: Sequence[GpuHost], num_ranks: int) -> Bundle:
    """What Ray sets aside for one worker. Its CPUs are those that its host could give each rank, and one at most, if nobody says."""
    share = min(1.0, CPU_SHARE * min(host.num_cpus for host in hosts) / num_ranks)
    num_cpus = pool.tensor_parallel * (pool.num_cpus if pool.num_cpus is not None else round(share, 3))
    return {"GPU": device.num_gpus, **({"CPU": num_cpus} if num_cpus else {}), **pool.resources}


def _parts(bundle: Bundle) -> list[Bundle]:
    """The same GPU by GPU, all else with the first."""
    return [bundle | {"GPU": min(bundle["GPU"], 1.0)}, *({"GPU": 1.0} for _ in range(1, round(bundle["GPU"])))]


def _dealt(members: Sequence[WorkerPlace], bundles: Sequence[Bundle], slots: Sequence[Slot]) -> list[tuple[WorkerPlace, int]]:
    """Each worker with its bundle: roles dealt along the line of near GPUs, where these bundles are all alike."""
    if any(bundle != bundles[0] for bundle in bundles):
        return [(place, i) for i, place in enumerate(members)]
    waiting = {role: [place for place in members if place.role is role] for role in Role}
    line = near_order(len(slots), lambda i, j: slots[i].link(slots[j]))
    return [(waiting[role].pop(0), i) for role, i in zip(deal(*map(len, waiting.values())), line, strict=True)]


def _options(group: PlacementGroup, index: int, bundle: Bundle) -> dict[str, Any]:
    """Of an actor or a task that is to have a whole bundle."""
    custom = {name: count for name, count in bundle.items() if name not in ("CPU", "GPU")}
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle["GPU"], "resources": custom, "scheduling_strategy": strategy}


# -- what there is ------------------------------------------------------------------------------------------------------------------


async def _hosts() -> list[GpuHost]:
    """Every live host on which Ray counts a GPU, with what its driver says of them."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in nodes if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    return list(await asyncio.gather(*(_host(node) for node in nodes)))


async def _host(node: Mapping[str, Any]) -> GpuHost:
    """One that does not answer in time is not usable, and is said to be so."""
    on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    try:
        async with asyncio.timeout(LOOK_S):
            gpus, why = await ray.remote(num_cpus=0)(look).options(scheduling_strategy=on_node).remote()
    except (TimeoutError, RayError) as error:
        gpus, why = HostGpus(gpus=(), links=()), f"{node['NodeManagerHostname']} did not say what it has: {error or 'no answer'}"
    return GpuHost(
        node_id=node["NodeID"],
        num_gpus=int(node["Resources"]["GPU"]),
        num_cpus=node["Resources"].get("CPU", 1.0),
        gpus=gpus,
        why_unusable=why,
        room=node.get("Labels", {}).get(DOMAIN_LABEL, ""),
    )


async def _slots(group: PlacementGroup, bundles: Sequence[Bundle], hosts: Sequence[GpuHost]) -> list[Slot]:
    """What each bundle holds; one after another, so that it takes one process a host."""
    return [await _slot(_options(group, i, bundle), hosts) for i, bundle in enumerate(bundles)]


async def _slot(options: Mapping[str, Any], hosts: Sequence[GpuHost]) -> Slot:
    """What a bundle holds, asked from within. A host that came after the others were asked is taken, and nothing is known of its GPUs."""
    async with asyncio.timeout(LOOK_S):
        node_id, gpu_ids = await ray.remote(where).options(**options).remote()
    host = next((host for host in hosts if host.node_id == node_id), GpuHost(node_id=node_id, num_gpus=0))
    indexes = tuple(index for gpu_id in gpu_ids if (index := host.gpus.index(gpu_id)) is not None)
    return Slot(host=host, gpus=indexes, names=tuple(gpu_ids))
