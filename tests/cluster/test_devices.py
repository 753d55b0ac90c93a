"""What pools compute on: GPUs where there are usable ones, shares where they are few, and an error that says what to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.cluster.config import ClusterConfig
from polymux.cluster.devices import (
    GPU_OVERHEAD_BYTES,
    RANK_OVERHEAD_BYTES,
    GpuHost,
    PoolDevice,
    Seat,
    Seating,
    Slot,
    choose,
    describe,
    seat,
    weight_layout,
)
from polymux.cluster.gpu_topology import Gpu, HostGpus
from polymux.cluster.sizing import worker_settings
from polymux.disagg.placement import Link
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Role
from polymux.transport.units import GIB, WorkerId


def host(num_gpus: int, *, why_unusable: str = "", node_id: str = "n", room: str = "", memory_bytes: int = 80 * GIB) -> GpuHost:
    gpus = tuple(Gpu(index=i, name="G", uuid=f"GPU-{i}", memory_bytes=memory_bytes) for i in range(num_gpus))
    links = tuple(tuple(Link.SAME if i == j else Link.NVLINK for j in range(num_gpus)) for i in range(num_gpus))
    return GpuHost(node_id=node_id, num_gpus=num_gpus, gpus=HostGpus(gpus=gpus, links=links), why_unusable=why_unusable, room=room)


def config(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **sections: Any) -> ClusterConfig:
    return ClusterConfig.from_dict({"pools": {"prefill": prefill or {}, "decode": decode or {}}, **sections})


def test_without_a_gpu_everything_is_on_the_cpu() -> None:
    for hosts in ((), (host(2, why_unusable="this torch is built without CUDA"),)):
        chosen = choose(config(), hosts)
        assert {one.device for one in chosen.values()} == {"cpu"} and {one.num_gpus for one in chosen.values()} == {0.0}
    assert "built without CUDA" in chosen[Role.DECODE].why


def test_one_gpu_is_shared_and_two_are_not() -> None:
    assert {one.num_gpus for one in choose(config(), [host(1)]).values()} == {0.5}
    assert {one.num_gpus for one in choose(config(), [host(2)]).values()} == {1.0}
    assert {one.num_gpus for one in choose(config({"workers": 2}, {"workers": 4}), [host(1), host(1)]).values()} == {0.3333}


def test_what_a_pool_asks_for_it_gets() -> None:
    chosen = choose(config({"device": "cuda"}, {"num_gpus": 2}), [host(4)])
    assert {one.device for one in chosen.values()} == {"cuda"}
    assert (chosen[Role.PREFILL].num_gpus, chosen[Role.DECODE].num_gpus) == (1.0, 2.0)
    left = choose(config({"num_gpus": 1}, {"workers": 2}), [host(2)])
    assert left[Role.DECODE].num_gpus == 0.5


def test_both_pools_compute_on_the_same_kind_of_device() -> None:
    for wish in ({"device": "cpu"}, {"num_gpus": 0}, {"tensor_parallel": 8}):
        chosen = choose(config({}, wish), [host(4)])
        assert {one.device for one in chosen.values()} == {"cpu"}
        assert "the decode pool is" in chosen[Role.PREFILL].why


def test_gpus_that_only_a_scheduler_knows_are_reserved_and_not_computed_on() -> None:
    chosen = choose(config({"num_gpus": 0.5}), [host(2, why_unusable="torch finds none")])
    assert (chosen[Role.PREFILL].device, chosen[Role.PREFILL].num_gpus) == ("cpu", 0.5)


@pytest.mark.parametrize(
    ("wanted", "hosts", "says"),
    [
        ({"device": "cuda"}, (), "no host has one that Ray knows"),
        ({"device": "cuda"}, (host(1, why_unusable="torch finds none"),), "torch finds none"),
        ({"device": "cuda", "num_gpus": 0}, (host(1),), "num_gpus=0"),
        ({"device": "cuda"}, (host(1),), "KV does not move between them"),
        (
            {"device": "cuda", "tensor_parallel": 4},
            (host(2), host(2)),
            "no host has more than 2; lower it to 2, or set",
        ),
        (
            {"num_gpus": 1, "tensor_parallel": 2},
            (host(4),),
            "num_gpus=1 is not a GPU for each rank",
        ),
        ({"tensor_parallel": 2, "workers": 2}, (host(4),), "would share 0 GPUs"),
        ({"tensor_parallel": 4, "workers": 2}, (host(4),), r"ask for 8 GPUs, and 4 are usable; lower them or pools\.\*\.workers"),
        ({"workers": 20}, (host(1),), "at most 8 can share one"),
        ({"num_gpus": 1}, (host(1),), "would share 0 GPUs"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(wanted: dict[str, Any], hosts: tuple[GpuHost, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose(config(wanted, {"device": "cpu"} if says.startswith("KV") else {}), hosts)


def test_a_number_of_gpus_is_whole_or_a_share() -> None:
    with pytest.raises(ConfigError, match="whole number or a share"):
        config({"num_gpus": 1.5})


def test_an_arena_is_the_workers_share_of_its_gpu() -> None:
    slot = Slot(host=host(2), gpus=(1,))
    half, whole = (seat(PoolDevice(device="cuda", num_gpus=share), slot).arena_bytes or 0 for share in (0.5, 1.0))
    assert 2 * (half + GPU_OVERHEAD_BYTES) == pytest.approx(whole + GPU_OVERHEAD_BYTES, abs=4)
    assert 0.8 * 80 * GIB < whole < 0.95 * 80 * GIB
    assert seat(PoolDevice(num_gpus=1.0), slot).arena_bytes is None
    assert seat(PoolDevice(device="cuda", num_gpus=1.0), replace(slot, gpus=())).arena_bytes is None
    with pytest.raises(ConfigError, match="no room for an arena"):
        seat(PoolDevice(device="cuda", num_gpus=0.125), Slot(host=host(1, memory_bytes=8 * GIB), gpus=(0,)))


def test_a_seat_sizes_the_arena_and_the_configuration_outranks_it() -> None:
    slot = Slot(host=host(1), gpus=(0,))
    taken = seat(PoolDevice(device="cuda", num_gpus=0.5), slot)
    settings = worker_settings(config(), Role.DECODE, WorkerId("decode-0"), "store", (), taken)
    assert settings.arena_bytes == taken.arena_bytes
    settings = worker_settings(config({}, {"arena_bytes": "1GiB"}), Role.DECODE, WorkerId("decode-0"), "store", (), taken)
    assert settings.arena_bytes == GIB


def test_weights_lie_plain_for_gpus() -> None:
    assert weight_layout(config(), choose(config(), ())) == "auto"
    assert weight_layout(config(), choose(config(), [host(1)])) == "plain"
    packed = config(engine={"weight_layout": "onednn"})
    assert weight_layout(packed, choose(packed, ())) == "onednn"
    with pytest.raises(ConfigError, match="is for CPUs"):
        weight_layout(packed, choose(packed, [host(1)]))


def test_links_between_workers_are_those_of_their_gpus() -> None:
    here, rack = host(4, node_id="a"), host(4, node_id="b", room="rack")
    slots = [Slot(host=here, gpus=(0,)), Slot(host=here, gpus=(0,)), Slot(host=here, gpus=(1,)), Slot(host=rack, gpus=(0,))]
    assert [slots[0].link(other) for other in slots] == [Link.SAME, Link.SAME, Link.NVLINK, Link.NETWORK]
    assert slots[3].link(Slot(host=replace(rack, node_id="c"), gpus=(1,))) is Link.NVLINK
    workers = [WorkerId(name) for name in ("a", "b", "c")]
    seating = Seating(devices={}, seats={workers[0]: Seat(slot=slots[0]), workers[1]: Seat(slot=slots[2]), workers[2]: Seat()})
    assert seating.link(workers[0], workers[1]) is Link.NVLINK
    assert seating.link(workers[0], workers[2]) is None


@given(st.integers(1, 8), st.integers(1, 8), st.lists(st.integers(1, 8), max_size=3))
def test_automatic_shares_never_ask_for_more_than_there_is(prefill: int, decode: int, sizes: list[int]) -> None:
    hosts = [host(size, node_id=str(i)) for i, size in enumerate(sizes)]
    try:
        chosen = choose(config({"workers": prefill}, {"workers": decode}), hosts)
    except ConfigError:
        assert prefill + decode > 8 * sum(sizes)
        return
    assert prefill * chosen[Role.PREFILL].num_gpus + decode * chosen[Role.DECODE].num_gpus <= sum(sizes)
    assert {one.device for one in chosen.values()} == ({"cuda"} if sizes else {"cpu"})


def test_each_rank_has_a_whole_gpu_and_the_other_workers_share_what_is_left() -> None:
    chosen = choose(config({"tensor_parallel": 2}, {"tensor_parallel": 4}), [host(8)])
    assert {one.device for one in chosen.values()} == {"cuda"}
    assert [chosen[role].num_gpus for role in Role] == [2.0, 4.0]
    assert "2 GPUs of one host for the ranks of each worker" in describe(Role.PREFILL, chosen[Role.PREFILL])
    mixed = choose(config({"tensor_parallel": 2}, {"workers": 4}), [host(4)])
    assert [mixed[role].num_gpus for role in Role] == [2.0, 0.5]
    assert choose(config({"tensor_parallel": 2, "num_gpus": 2}), [host(4)])[Role.PREFILL].num_gpus == 2.0


def test_ranks_stay_on_cpus_where_no_host_has_a_gpu_for_each() -> None:
    for hosts in ((), (host(2, why_unusable="torch finds none"),), (host(1, node_id="a"), host(1, node_id="b"))):
        chosen = choose(config({"tensor_parallel": 2}, {"tensor_parallel": 2}), hosts)
        assert {(one.device, one.num_gpus) for one in chosen.values()} == {("cpu", 0.0)}
    assert "takes as many GPUs of one host, and no host has more than 1" in chosen[Role.PREFILL].why


def test_the_arena_of_each_rank_is_what_its_smallest_gpu_leaves() -> None:
    gpus = host(2).gpus.gpus
    uneven = replace(host(2), gpus=replace(host(2).gpus, gpus=(gpus[0], replace(gpus[1], memory_bytes=40 * GIB))))
    pair = seat(PoolDevice(device="cuda", num_gpus=2.0), Slot(host=uneven, gpus=(0, 1)))
    alone = seat(PoolDevice(device="cuda", num_gpus=1.0), Slot(host=uneven, gpus=(1,)))
    assert pair.arena_bytes is not None and alone.arena_bytes is not None
    assert pair.arena_bytes == alone.arena_bytes - RANK_OVERHEAD_BYTES
    settings = worker_settings(config({}, {"tensor_parallel": 2}), Role.DECODE, WorkerId("decode-0"), "store", (), pair)
    assert (settings.num_ranks, settings.arena_bytes, settings.engine.device) == (2, pair.arena_bytes, "cuda")


def test_ranks_that_sum_over_slow_links_where_there_are_fast_ones_are_said() -> None:
    links = tuple(tuple(Link.SAME if i == j else Link.NVLINK if i // 2 == j // 2 else Link.SYSTEM for j in range(4)) for i in range(4))
    bridged = replace(host(4), gpus=replace(host(4).gpus, links=links))
    assert [bridged.gpus.nearest(count) for count in (2, 3, 4, 5)] == [Link.NVLINK, Link.SYSTEM, Link.SYSTEM, Link.NETWORK]
    seats = {
        WorkerId(name): Seat(slot=Slot(host=bridged, gpus=gpus))
        for name, gpus in (("near", (2, 3)), ("far", (1, 2)), ("all", (0, 1, 2, 3)))
    }
    seating = Seating(devices={}, seats=seats)
    assert seating.describe() == "the ranks of far on GPUs 1, 2 are joined by system only"
    assert [one["joined_by"] for one in seating.plain()["workers"].values()] == ["nvlink", "system", "system"]
