"""Gangs on a real Ray with GPUs that only it believes in, and links as recorded: three hosts, two of them a rack."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from polymux.cluster.config import ClusterConfig
from polymux.cluster.devices import Seating
from polymux.cluster.gangs import DOMAIN_LABEL, Gangs
from polymux.cluster.processes import WorkerPlace
from polymux.disagg.placement import Link
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Role

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
PLAYER = Path(__file__).parent.parent / "cluster" / "fake_nvml"
HOSTS = (("bridged-4", 4, {}), ("nvswitch-8", 3, {DOMAIN_LABEL: "rack"}), ("nvswitch-8", 3, {DOMAIN_LABEL: "rack"}))


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(PLAYER), os.environ.get("PYTHONPATH", ""))))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
        try:
            for recording, num_gpus, labels in HOSTS:
                patch.setenv("POLYMUX_NVML_RECORDING", recording)
                cluster.add_node(num_cpus=1, num_gpus=num_gpus, labels=labels)
            ray.init(address=cluster.address, log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def places(prefill: int, decode: int) -> list[WorkerPlace]:
    return [*(WorkerPlace(Role.PREFILL, i) for i in range(prefill)), *(WorkerPlace(Role.DECODE, i) for i in range(decode))]


def config(prefill: int, decode: int, num_gpus: float) -> ClusterConfig:
    pools = {"prefill": {"workers": prefill, "num_gpus": num_gpus}, "decode": {"workers": decode, "num_gpus": num_gpus}}
    return ClusterConfig.from_dict({"pools": pools})


def nearest(seating: Seating, places: list[WorkerPlace]) -> list[Link | None]:
    """Of each worker, the best link to one of the other role."""
    links = [[seating.link(a.worker_id, b.worker_id) for b in places if b.role is not a.role] for a in places]
    return [max((link for link in found if link is not None), default=None) for found in links]


async def test_prefill_and_decode_get_the_two_ends_of_each_bridge_and_what_they_were_promised(three_hosts: None) -> None:
    def visible() -> tuple[str, str | None]:  # in here, so that it is sent as it is, and nothing is imported for it
        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")

    gangs, line = Gangs(), places(2, 2)
    try:
        seating = await gangs.seat(config(2, 2, 1), line)
        assert nearest(seating, line) == [Link.NVLINK] * 4
        assert {one.device for one in seating.devices.values()} == {"cpu"}  # nobody can compute on GPUs that are not there
        assert len({(seat.slot.host.node_id, seat.slot.gpus) for seat in seating.seats.values() if seat.slot}) == 4
        for _ in range(2):  # a worker that is started again finds its GPU
            for place in line:
                options, slot = gangs.options(place.worker_id), seating.seats[place.worker_id].slot
                assert options is not None and slot is not None
                found = await ray.remote(visible).options(**options).remote()
                assert found == (slot.host.node_id, ",".join(map(str, slot.gpus)))
    finally:
        gangs.close()


async def test_the_ranks_of_a_worker_have_gpus_that_are_bridged(three_hosts: None) -> None:
    def visible() -> tuple[str, str | None]:
        return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")

    gangs, line = Gangs(), places(1, 1)
    try:
        seating = await gangs.seat(config(1, 1, 2), line)
        slots = [seat.slot for seat in seating.seats.values() if seat.slot]
        assert [len(slot.gpus) for slot in slots] == [2, 2] and len({slot.host.node_id for slot in slots}) == 1
        assert [slot.within for slot in slots] == [Link.NVLINK] * 2 and not set(slots[0].gpus) & set(slots[1].gpus)
        for place in line:
            options, slot, environment = (
                gangs.options(place.worker_id),
                seating.seats[place.worker_id].slot,
                gangs.environment(place.worker_id),
            )
            assert options is not None and slot is not None
            found = await ray.remote(visible).options(runtime_env={"env_vars": environment}, **options).remote()
            assert found == (slot.host.node_id, ",".join(map(str, slot.gpus)))
        assert {worker["joined_by"] for worker in seating.plain()["workers"].values()} == {"nvlink"}
    finally:
        gangs.close()


async def test_workers_that_share_gpus_are_together(three_hosts: None) -> None:
    gangs, line = Gangs(), places(2, 4)
    try:
        seating = await gangs.seat(config(2, 4, 0.5), line)
        per_gpu = Counter((seat.slot.host.node_id, seat.slot.gpus) for seat in seating.seats.values() if seat.slot)
        assert sorted(per_gpu.values()) == [2, 2, 2]
        assert len({node_id for node_id, _ in per_gpu}) == 1
    finally:
        gangs.close()


async def test_a_rack_holds_what_no_host_does(three_hosts: None) -> None:
    gangs, line = Gangs(), places(2, 3)
    try:
        seating = await gangs.seat(config(2, 3, 1), line)
        hosts = {seat.slot.host.room for seat in seating.seats.values() if seat.slot}
        assert hosts == {"rack"}
        assert nearest(seating, line) == [Link.NVLINK] * 5
    finally:
        gangs.close()


async def test_two_gangs_have_both_roles_each(three_hosts: None) -> None:
    gangs, line = Gangs(), places(5, 5)
    try:
        seating = await gangs.seat(config(5, 5, 1), line)
        assert nearest(seating, line) == [Link.NVLINK] * 10
    finally:
        gangs.close()


async def test_more_than_there_is_is_refused_before_anything_is_reserved(three_hosts: None) -> None:
    gangs, before = Gangs(), placement_group_table()
    with pytest.raises(ConfigError, match=r"ask for 12 GPUs .* the hosts have"):
        await gangs.seat(config(6, 6, 1), places(6, 6))
    assert placement_group_table().keys() == before.keys()  # those of other tests, which may still be on their way out


async def test_without_a_wish_for_gpus_that_do_not_compute_none_is_reserved(three_hosts: None) -> None:
    gangs, line = Gangs(), places(1, 1)
    seating = await gangs.seat(ClusterConfig(), line)
    assert {seat.slot for seat in seating.seats.values()} == {None}
    assert "built without CUDA" in seating.describe() or "torch finds none" in seating.describe()
    assert gangs.options(line[0].worker_id) is None
