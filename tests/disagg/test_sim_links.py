"""Flows over shared links: bytes are conserved, no link carries more than it can, and cases worked out by hand."""

from __future__ import annotations

import heapq
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.placement import Link
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.links import Channel, Flow, Links, fair_rates, pipelined_end_us
from polymux.disagg.sim.topology import Hosts, Topology
from polymux.transport.errors import ConfigError

ROOT = Path(__file__).parents[2]
MB = 1_000_000
NUM_CHANNELS = 5
Plan = tuple[int, int, tuple[int, ...]]  # begins at, bytes, channels

plans = st.lists(
    st.tuples(
        st.integers(0, 3 * SECOND),
        st.integers(1, 400 * MB),
        st.lists(st.integers(0, NUM_CHANNELS - 1), min_size=1, max_size=3, unique=True).map(tuple),
    ),
    min_size=1,
    max_size=12,
)
speeds = st.lists(st.integers(1 * MB, 500 * MB), min_size=NUM_CHANNELS, max_size=NUM_CHANNELS)


class World:
    """Links and nothing else: flows begin when they are planned to, and every change is looked at."""

    def __init__(self, bytes_per_s: list[int]) -> None:
        self.channels = [Channel(f"channel {i}", speed) for i, speed in enumerate(bytes_per_s)]
        self.events: list[tuple[int, int, Flow]] = []
        self.links = Links(self._wake)
        self.num_asked = 0

    def _wake(self, at_us: int, flow: Flow) -> None:
        self.num_asked += 1
        heapq.heappush(self.events, (at_us, self.num_asked, flow))

    def run(self, planned: list[Plan], cancelled: frozenset[int] = frozenset()) -> list[Flow]:
        """In the order of `planned`. Of two at once, the earlier there begins first."""
        flows: list[Flow | None] = [None] * len(planned)
        waiting = sorted(range(len(planned)), key=lambda i: (planned[i][0], i), reverse=True)
        while waiting or self.events:
            if waiting and (not self.events or planned[waiting[-1]][0] <= self.events[0][0]):
                number = waiting.pop()
                at_us, nbytes, path = planned[number]
                flows[number] = flow = self.links.begin("test", nbytes, [self.channels[i] for i in path], at_us)
                if number in cancelled:
                    self.links.cancel(flow, at_us + 1000)
            else:
                at_us, _, flow = heapq.heappop(self.events)
                self.links.ended(flow, at_us)
            self.check()
        return [flow for flow in flows if flow is not None]

    def check(self) -> None:
        for channel in self.channels:
            assert sum(flow.bytes_per_s for flow in channel.flows) <= channel.bytes_per_s
            for flow in channel.flows:  # somewhere on its path nobody is faster than it and nothing is left over: max-min
                assert any(
                    flow.bytes_per_s == max(other.bytes_per_s for other in on.flows)
                    and sum(other.bytes_per_s for other in on.flows) > on.bytes_per_s - len(on.flows) * NUM_CHANNELS
                    for on in flow.path
                )


# ---------------------------------------------------------------- always


@given(planned=plans, speed=speeds)
@settings(max_examples=60, deadline=None)
def test_every_byte_crosses_every_channel_of_its_path_once_and_no_channel_is_overfull(planned: list[Plan], speed: list[int]) -> None:
    world = World(speed)
    flows = world.run(planned)
    assert all(flow.is_done for flow in flows)
    for number, channel in enumerate(world.channels):
        assert channel.carried_bytes == sum(nbytes for _, nbytes, path in planned if number in path)
        assert channel.carried_bytes <= channel.bytes_per_s * channel.busy_us / SECOND + len(flows)
        assert not channel.flows


@given(planned=plans, speed=speeds)
@settings(max_examples=60, deadline=None)
def test_nobody_ends_earlier_than_alone(planned: list[Plan], speed: list[int]) -> None:
    for (at_us, nbytes, path), flow in zip(planned, World(speed).run(planned), strict=True):
        slowest = min(speed[i] for i in path)
        assert flow.ends_us >= at_us - (-nbytes * SECOND // slowest)


@given(nbytes=st.integers(1, 10**12), speed=speeds)
def test_a_flow_alone_takes_its_bytes_over_the_slowest_bandwidth(nbytes: int, speed: list[int]) -> None:
    (flow,) = World(speed).run([(7, nbytes, tuple(range(NUM_CHANNELS)))])
    assert flow.ends_us == 7 - (-nbytes * SECOND // min(speed))


@given(planned=plans, speed=st.integers(MB, 500 * MB), extra=st.tuples(st.integers(0, 3 * SECOND), st.integers(1, 400 * MB)))
@settings(max_examples=60, deadline=None)
def test_on_one_link_a_new_flow_makes_nobody_end_earlier(planned: list[Plan], speed: int, extra: tuple[int, int]) -> None:
    """Over several it may, by slowing down a third: so there only the bound above holds."""
    planned = [(at_us, nbytes, (0,)) for at_us, nbytes, _ in planned]
    before = World([speed] * NUM_CHANNELS).run(planned)
    after = World([speed] * NUM_CHANNELS).run([*planned, (*extra, (0,))])
    assert all(old.ends_us <= new.ends_us for old, new in zip(before, after, strict=False))


@given(planned=plans, speed=speeds, cancelled=st.frozensets(st.integers(0, 11)))
@settings(max_examples=40, deadline=None)
def test_what_is_cancelled_leaves_its_share_to_others_and_counts_what_has_crossed(
    planned: list[Plan], speed: list[int], cancelled: frozenset[int]
) -> None:
    world = World(speed)
    flows = world.run(planned, cancelled)
    assert all(flow.is_done for flow in flows)
    for number, channel in enumerate(world.channels):
        whole = sum(flow.nbytes for i, flow in enumerate(flows) if i not in cancelled and number in planned[i][2])
        most = sum(flow.nbytes for i, flow in enumerate(flows) if number in planned[i][2])
        assert whole <= channel.carried_bytes <= most


@given(planned=plans, speed=speeds, num_layers=st.integers(1, 80), took_us=st.integers(1, 3 * SECOND))
@settings(max_examples=60, deadline=None)
def test_a_step_over_layers_that_still_come_waits_for_each_and_for_no_more(
    planned: list[Plan], speed: list[int], num_layers: int, took_us: int
) -> None:
    flow = World(speed).run(planned)[0]
    ready_us = flow.began_us  # layer by layer, as the bytes come
    for layer in range(1, num_layers + 1):
        ready_us = max(ready_us, _arrived_us(flow, layer / num_layers)) + took_us / num_layers
    end_us = pipelined_end_us(flow, flow.began_us, took_us, num_layers)
    assert abs(end_us - ready_us) <= 3 + num_layers * 1e-6 * took_us
    flow.is_layered = False
    assert pipelined_end_us(flow, flow.began_us, took_us, num_layers) == flow.ends_us + took_us >= end_us - 3


def _arrived_us(flow: Flow, share: float) -> float:
    wanted = flow.nbytes * SECOND * (1 - share)
    for (at_us, left), (next_us, next_left) in pairwise(flow.pieces):
        if next_left <= wanted:
            return at_us + (left - wanted) * (next_us - at_us) / max(left - next_left, 1)
    raise AssertionError("it ends with nothing left")


# ---------------------------------------------------------------- by hand


def test_two_flows_halve_a_link_and_the_second_speeds_up_when_the_first_has_ended() -> None:
    """100 MB/s: A has 100 MB from 0 s, B 100 MB from 0.5 s. A alone moves 50 by then, its rest takes 1 s at half speed; B has 50 left."""
    world = World([100 * MB] * NUM_CHANNELS)
    first, second = world.run([(0, 100 * MB, (0,)), (SECOND // 2, 100 * MB, (0,))])
    assert (first.ends_us, second.ends_us) == (3 * SECOND // 2, 2 * SECOND)
    assert (world.channels[0].busy_us, world.channels[0].carried_bytes) == (2 * SECOND, 200 * MB)


def test_what_one_flow_cannot_use_goes_to_the_others() -> None:
    """A and B share channel 0 of 90 MB/s; A also crosses channel 1 of 10 MB/s. A has 10, B 80."""
    channels = [Channel("0", 90 * MB), Channel("1", 10 * MB)]
    slow, fast = Flow("a", 1, tuple(channels), 0), Flow("b", 1, (channels[0],), 0)
    channels[0].flows, channels[1].flows = {slow: None, fast: None}, {slow: None}
    assert fair_rates(channels) == {slow: 10 * MB, fast: 80 * MB}


def test_over_several_links_a_new_flow_may_help_a_third() -> None:
    """A crosses 0 and 1, B crosses 1, each with 50 of 100 MB/s. C on 0 of 60 MB/s takes half of it from A, and B has 70."""
    speed = [60 * MB, 100 * MB, MB, MB, MB]
    planned: list[Plan] = [(0, 400 * MB, (0, 1)), (0, 100 * MB, (1,))]
    assert World(speed).run(planned)[1].ends_us == 2 * SECOND
    assert World(speed).run([*planned, (0, 400 * MB, (0,))])[1].ends_us == 100 * MB * SECOND // (70 * MB) + 1


def test_a_step_ends_one_layer_after_the_last_layer_is_there_or_a_pass_after_the_first() -> None:
    (flow,) = World([100 * MB] * NUM_CHANNELS).run([(0, 100 * MB, (0,))])  # 1 s, 10 layers: one every 100 ms
    assert pipelined_end_us(flow, 0, 500_000, 10) == SECOND + 50_000
    assert pipelined_end_us(flow, 0, 2 * SECOND, 10) == 100_000 + 2 * SECOND
    assert pipelined_end_us(flow, 0, 500_000, 10, tail_us=2000) == SECOND + 52_000
    assert pipelined_end_us(flow, 3 * SECOND, 500_000, 10) == 3 * SECOND + 500_000


def test_bytes_over_no_channel_are_there_at_once() -> None:
    links = Links(lambda at_us, flow: pytest.fail("nothing is to come"))
    flow = links.begin("test", MB, (), 5)
    assert flow.is_done and flow.ends_us == 5 and pipelined_end_us(flow, 5, 100, 4) == 105


# ---------------------------------------------------------------- clusters


def names(path: tuple[Channel, ...]) -> list[str]:
    return [channel.name for channel in path]


def test_weights_come_through_memory_switch_and_the_gpus_own_link() -> None:
    topology = Topology(Hosts(gpus=4, gpus_per_switch=2), 8)
    assert names(topology.into(5)) == ["host 1 memory", "host 1 switch 0 in", "gpu 5 pcie in"]
    assert names(topology.out_of(5)) == ["gpu 5 pcie out", "host 1 switch 0 out", "host 1 memory"]
    assert topology.into(5)[0] is topology.into(7)[0] and topology.into(5)[1] is topology.into(4)[1]
    assert Topology(Hosts(gpus=4), 4).into(1)[1].name == "gpu 1 pcie in"


def test_kv_takes_nvlink_where_it_is_and_the_network_between_hosts() -> None:
    hosts = Hosts(gpus=4, nvlink="pairs", gpus_per_switch=4)
    topology = Topology(hosts, 8)
    assert names(topology.between(0, 1)) == ["gpu 0 nvlink out", "gpu 1 nvlink in"]
    assert names(topology.between(1, 2)) == ["gpu 1 pcie out", "gpu 2 pcie in"]
    assert names(topology.between(3, 4)) == ["gpu 3 pcie out", "host 0 network out", "host 1 network in", "gpu 4 pcie in"]
    assert topology.between(2, 2) == ()
    apart = Topology(replace(hosts, nvlink="none", gpus_per_switch=2), 8)
    assert names(apart.between(1, 2)) == ["gpu 1 pcie out", "host 0 switch 0 out", "host 0 switch 1 in", "gpu 2 pcie in"]
    assert [topology.link(0, other) for other in (0, 1, 2, 4)] == [Link.SAME, Link.NVLINK, Link.PCIE, Link.NETWORK]


def test_an_infinite_link_is_in_nobodys_way() -> None:
    free = Hosts(**{name: float("inf") for name in ("pcie_gb_per_s", "memory_gb_per_s", "nvlink_gb_per_s", "network_gbit_per_s")})
    topology = Topology(free, 16)
    assert topology.into(3) == topology.between(0, 1) == topology.between(0, 9) == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"gpu": 8}, r"unknown settings \['gpu'\]; there are gpus, pcie"),
        (["gpus"], "unknown settings"),
        ({"gpus": 0}, "hosts.gpus=0 must be a whole number of at least 1"),
        ({"pcie_gb_per_s": "fast"}, "hosts.pcie_gb_per_s='fast' must be a number above 0"),
        ({"nvlink": "ring"}, "hosts.nvlink='ring' is unknown; there are switch, pairs, none"),
        ({"network_gbit_per_s": 0.01}, "is too slow to share"),
    ],
)
def test_wrong_hosts_are_refused_by_name(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hosts.parse(data, "h100")


def test_a_kind_of_device_has_its_own_figures() -> None:
    assert Hosts.parse({"gpus": 4}, "h800").nvlink_gb_per_s < Hosts.parse({}, "h100").nvlink_gb_per_s
    assert Hosts(gpus_per_switch=2, switch_gb_per_s=26).load_bytes_per_s == 26e9


# ---------------------------------------------------------------- determinism


def digest() -> str:
    planned = [(i * 7919 % 100_003, 1 + i * 104_729 % MB, (i % 5, (i * 3 + 1) % 5)[: 1 + (i % 5 != (i * 3 + 1) % 5)]) for i in range(40)]
    return repr([flow.ends_us for flow in World([3 * MB, 5 * MB, 7 * MB, 11 * MB, 13 * MB]).run(planned)])


def test_ends_do_not_depend_on_the_process() -> None:
    path = [str(ROOT / ".namespace"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {path!r}; import test_sim_links as t; print(t.digest())"
    found = {digest()}
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
        found.add(done.stdout.strip())
    assert len(found) == 1
