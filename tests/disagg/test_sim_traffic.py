"""Simulated pools whose copies go over shared links: loads that slow each other down, steps that follow their layers, and the books."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.sim.costs import H100_ARTIFACT, MS, SECOND
from polymux.disagg.sim.linked import LinkedSwitcher
from polymux.disagg.sim.loop import SWITCH, Journal
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.physical import GIB, KIB, PhysicalCosts, physical_costs
from polymux.disagg.sim.policies import POLICIES, Pool, simulation
from polymux.disagg.sim.token_level import TokenLevel
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.traffic import Traffic
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName

TARGETS = Targets(ttft_us=10 * SECOND, tpot_us=100 * MS)
QWEN, LLAMA = "qwen2.5-7b", "llama2-13b"
QWEN_BYTES = round(14.2 * GIB)
FREE = Hosts(pcie_gb_per_s=inf, memory_gb_per_s=inf, nvlink_gb_per_s=inf, network_gbit_per_s=inf)


def request(number: int, at_us: int, model: str, input_len: int = 1000, output_len: int = 5, *, kind: str = QWEN) -> SimRequest:
    return SimRequest(request_id=number, arrival_us=at_us, model=model, kind=kind, input_len=input_len, output_len=output_len)


def busy(seed: int) -> list[SimRequest]:
    rng = random.Random(seed)
    kinds = (QWEN, "yi-9b", LLAMA)
    arrivals = sorted(rng.randrange(20 * SECOND) for _ in range(60))
    models = [rng.randrange(9) for _ in arrivals]
    return [
        request(i, at_us, f"model-{m}", rng.randint(1, 2000), rng.randint(1, 300), kind=kinds[m % 3])
        for i, (at_us, m) in enumerate(zip(arrivals, models, strict=True))
    ]


def costs_at(hosts: Hosts, memory_bytes: int | None = None) -> PhysicalCosts:
    return physical_costs("h100", link_bytes_per_s=hosts.load_bytes_per_s, memory_bytes=memory_bytes)


def serve(
    requests: list[SimRequest],
    hosts: Hosts | None,
    costs: PhysicalCosts,
    *,
    num_devices: int = 1,
    budget: int = 40 * GIB,
    policy: str = "slack",
    journal: Journal | None = None,
) -> tuple[TokenLevel, list[Progress]]:
    pool = Pool(num_devices=num_devices, weight_budget_bytes=budget, hosts=hosts)
    world = simulation(policy, costs, TARGETS, pool, journal)
    return world, world.run(requests)  # type: ignore[return-value]


def told(served: list[Progress]) -> list[tuple[int | None, int, int, bool]]:
    return [(one.first_us, one.last_us, one.num_on_time, one.has_failed) for one in served]


# ---------------------------------------------------------------- by hand


def test_a_first_step_ends_a_layer_after_the_last_one_has_come() -> None:
    """28 layers; 2 ms beside the bytes. The prefill of 1,000 tokens takes 27.11 ms, and all but its last layer hides behind the load."""
    hosts = Hosts(pcie_gb_per_s=25)
    costs = costs_at(hosts)
    _, (one,) = serve([request(0, 0, "a")], hosts, costs)
    prefill_us, bytes_us = costs.prefill_us(QWEN, [1000]), -(-QWEN_BYTES * SECOND // (25 * 10**9))
    assert one.ttft_us == bytes_us + 2000 - (-prefill_us // 28)
    _, (whole,) = serve([request(0, 0, "a")], None, costs)
    assert whole.ttft_us == costs.load_us(QWEN) + prefill_us


def test_two_gpus_that_share_a_switch_load_at_half_its_speed_each() -> None:
    """Both loads begin at 0: each has 26 of 52 GB/s. Behind switches of their own each has all of it."""
    shared = Hosts(gpus_per_switch=2)
    together = [request(0, 0, "a"), request(1, 0, "b")]
    _, both = serve(together, shared, costs_at(shared), num_devices=2)
    _, alone = serve(together, replace(shared, gpus_per_switch=1), costs_at(shared), num_devices=2)
    prefill_us = costs_at(shared).prefill_us(QWEN, [1000])
    for served, bytes_per_s in ((both, 26e9), (alone, 52e9)):
        assert [one.ttft_us for one in served] == [pytest.approx(QWEN_BYTES * SECOND / bytes_per_s + 2000 + prefill_us / 28, abs=2)] * 2


@pytest.mark.parametrize("policy", ["sllm", "sllm-idle", "sllm-oracle"])
def test_policies_by_request_share_switches_too_and_wait_for_all_of_a_load(policy: str) -> None:
    shared = Hosts(gpus_per_switch=2, memory_gb_per_s=inf)
    costs = costs_at(shared)
    served = simulation(policy, costs, TARGETS, Pool(num_devices=2, hosts=shared)).run([request(0, 0, "a"), request(1, 0, "b")])
    loaded_us = QWEN_BYTES * SECOND / 26e9 + 2000
    assert [one.ttft_us for one in served] == [pytest.approx(loaded_us + costs.prefill_us(QWEN, [1000]), abs=3)] * 2


def test_published_switches_share_a_switch_between_the_phases() -> None:
    """One device of each phase. When A is prefilled its decode loads A, and the prefill loads what is left of B, each half as fast."""
    shared = Hosts(gpus_per_switch=2, memory_gb_per_s=inf)
    costs = costs_at(shared)
    first, second = simulation("wrr", costs, TARGETS, Pool(num_devices=2, hosts=shared)).run([request(0, 0, "a"), request(1, 0, "b")])
    prefill_us, load_us = costs.prefill_us(QWEN, [1000]), costs.load_us(QWEN)
    assert first.ttft_us == pytest.approx(load_us + prefill_us, abs=2)
    assert second.ttft_us == pytest.approx(load_us + 2 * prefill_us + 2 * (load_us - 2000 - prefill_us) + 2000, abs=4)


def test_a_load_that_meets_another_halfway_takes_half_as_long_again() -> None:
    """A loads alone for half of its time, then both share; when A has ended, B has half its bytes left and the link to itself."""
    shared = Hosts(gpus_per_switch=2, memory_gb_per_s=inf)
    costs = costs_at(shared)
    bytes_us = QWEN_BYTES * SECOND / 52e9
    _, (first, second) = serve([request(0, 0, "a"), request(1, round(bytes_us / 2), "b")], shared, costs, num_devices=2)
    after_us = 2000 + costs.prefill_us(QWEN, [1000]) / 28
    assert first.ttft_us == pytest.approx(1.5 * bytes_us + after_us, abs=2)
    assert second.ttft_us == pytest.approx(1.5 * bytes_us + after_us, abs=2)


def test_nobody_notices_a_load_of_another_host() -> None:
    hosts = Hosts(gpus=1, memory_gb_per_s=20)
    _, served = serve([request(0, 0, "a"), request(1, 0, "b")], hosts, costs_at(hosts), num_devices=2)
    _, (one,) = serve([request(0, 0, "a")], hosts, costs_at(hosts))
    assert [other.ttft_us for other in served] == [one.ttft_us] * 2


def test_a_worker_predicts_by_what_its_loads_took_lately() -> None:
    costs, asked = costs_at(Hosts()), []
    traffic = Traffic(costs, Hosts(), 1, lambda at_us, flow: asked.append(at_us))
    kinds = {ModelName("a"): QWEN, ModelName("b"): QWEN}
    switcher = LinkedSwitcher(costs, kinds, 40 * GIB, lambda: 40 * GIB, device=0, traffic=traffic)
    alone_us = costs.load_us(QWEN)
    assert switcher.switch(ModelName("a"), 0, ()) == 0
    flow = switcher.coming()
    assert flow is not None and switcher.resident == {"a"}
    assert switcher.wait_us(ModelName("b"), 1000) == 2 * alone_us - 1000  # behind the other, as it is predicted
    traffic.links.ended(flow, asked[0])
    switcher.arrived(flow, 3 * alone_us - 2000)  # three times as long as alone
    assert switcher.coming() is None
    assert switcher.wait_us(ModelName("b"), 9 * alone_us) == pytest.approx(1.4 * alone_us, abs=1)


def test_kv_that_gave_way_goes_and_comes_over_the_links() -> None:
    """Room for 1,024 tokens; both sequences end with 900, and the younger one's KV is swapped, which pays over this link."""
    hosts = Hosts(memory_gb_per_s=inf)
    costs = costs_at(hosts, 25 * GIB + 1024 * 800 * KIB)
    requests = [request(i, i, "a", 200, 700, kind=LLAMA) for i in range(2)]
    world, served = serve(requests, hosts, costs, budget=25 * GIB)
    assert all(one.is_done for one in served) and world.room.num_preemptions >= 1
    assert world.traffic is not None
    carried = world.traffic.links.carried
    assert carried["kv in"] == carried["kv out"] > 200 * 800 * KIB
    _, quick = serve(requests, FREE, costs, budget=25 * GIB)
    assert quick[1].last_us < served[1].last_us


def handed_over(hosts: Hosts | None, *, num_devices: int = 2, input_len: int = 2000) -> tuple[TokenLevel, Progress]:
    """A long prompt where the workers have had the model before: nothing is loaded."""
    requests = [request(0, 0, "a", 100, 20, kind=LLAMA), request(1, 20 * SECOND, "a", input_len, 20, kind=LLAMA)]
    world, (_, one) = serve(requests, hosts, costs_at(hosts or Hosts()), num_devices=num_devices, policy="slack-split")
    return world, one


def test_over_nvlink_only_the_last_layer_of_kv_is_waited_for() -> None:
    """A prefill of 2,000 tokens takes 88 ms, its 1.6 GB 4 ms, of which 1/40 is left when it ends."""
    hosts = Hosts()
    costs = costs_at(hosts)
    _, one = handed_over(hosts)
    _, free = handed_over(None)
    layer_us = 2000 * 800 * KIB * SECOND // 40 // (376 * 10**9) + 1
    assert one.ttft_us == free.ttft_us == costs.prefill_us(LLAMA, [2000])
    assert free.last_us - one.request.arrival_us == free.ttft_us + sum(costs.decode_us(LLAMA, 1, 2001 + i) for i in range(19))
    assert one.last_us - free.last_us == layer_us


def test_between_hosts_the_network_delays_the_second_token_by_what_outlasts_the_prefill() -> None:
    """8 Gbit/s: 1.6 GB take 1.6 s."""
    hosts = Hosts(gpus=1, network_gbit_per_s=8)
    costs = costs_at(hosts)
    world, one = handed_over(hosts)
    assert one.first_us == one.request.arrival_us + costs.prefill_us(LLAMA, [2000])
    steps_us = sum(costs.decode_us(LLAMA, 1, 2001 + i) for i in range(19))
    assert one.last_us - one.request.arrival_us == pytest.approx(2000 * 800 * KIB / 1e9 * SECOND + steps_us, abs=2)
    assert world.traffic is not None
    assert world.traffic.links.carried["handover"] == 2100 * 800 * KIB
    assert world.traffic.use(one.last_us).groups.keys() >= {"host network in", "host network out", "gpu pcie out"}


def test_a_prompt_is_computed_near_where_it_decodes() -> None:
    """Four hosts of two GPUs, one of each role in each, and four models that decode on one each: nothing crosses the network."""
    requests = [request(i, i * 2 * SECOND, f"model-{i}", 1500, 1000) for i in range(4)]
    hosts = Hosts(gpus=2)
    pool = Pool(num_devices=8, num_prefill=4, weight_budget_bytes=40 * GIB, hosts=hosts)
    world = simulation("slack-split", costs_at(hosts), TARGETS, pool)
    assert all(one.is_attained for one in world.run(requests))
    assert world.traffic is not None
    names = [channel.name for channel in world.traffic.topology.channels if channel.carried_bytes]
    assert any("nvlink" in name for name in names) and not any("network" in name for name in names)


def test_kv_that_is_cached_where_prompts_are_computed_goes_over_too() -> None:
    turns = [replace(request(i, 20 * i * SECOND, "a", 320 + 80 * i, 16), session=7) for i in range(2)]
    world, (_, second) = serve(turns, Hosts(), costs_at(Hosts()), num_devices=2, policy="slack-split")
    assert second.is_done and world.room.num_cached_tokens == 320
    assert world.traffic is not None
    assert world.traffic.links.carried["handover"] == (320 + 400) * 56 * KIB


# ---------------------------------------------------------------- always


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 10_000), num_devices=st.integers(2, 5))
@settings(max_examples=5, deadline=None)
def test_links_that_are_never_in_the_way_change_nothing(policy: str, seed: int, num_devices: int) -> None:
    """Beside links without a limit, one number without a limit: every request has every token at the same microsecond."""
    costs = physical_costs("h100", link_bytes_per_s=1e30)
    journals = Journal(), Journal()
    _, without = serve(busy(seed), None, costs, num_devices=num_devices, policy=policy, journal=journals[0])
    _, free = serve(busy(seed), FREE, costs, num_devices=num_devices, policy=policy, journal=journals[1])
    assert told(without) == told(free)
    assert journals[0] == journals[1]


@given(seed=st.integers(0, 10_000), num_devices=st.integers(1, 5), per_switch=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_all_flows_end_and_no_link_carried_more_than_it_can(seed: int, num_devices: int, per_switch: int) -> None:
    hosts = Hosts(gpus=4, gpus_per_switch=per_switch, memory_gb_per_s=60)
    journal = Journal()
    world, served = serve(busy(seed), hosts, costs_at(hosts), num_devices=num_devices, budget=30 * GIB, journal=journal)
    assert all(one.is_done or one.has_failed for one in served)
    traffic = world.traffic
    assert traffic is not None
    assert all(not channel.flows for channel in traffic.topology.channels)
    for channel in traffic.topology.channels:
        assert channel.carried_bytes * SECOND <= channel.bytes_per_s * channel.busy_us + traffic.links.num_flows * SECOND
    memory = sum(c.carried_bytes for c in traffic.topology.channels if "memory" in c.name)
    assert memory == sum(traffic.links.carried.values())  # every copy here goes through a host's memory, once
    if num_devices == 1:
        loads = sum(span.kind == SWITCH for span in journal.spans[0])
        assert loads and traffic.links.carried["weights"] >= QWEN_BYTES


def test_more_on_the_same_link_makes_the_whole_slower_and_the_figures_say_where() -> None:
    roomy, tight = Hosts(), Hosts(memory_gb_per_s=30)
    costs = costs_at(tight)
    found = {}
    for name, hosts in (("roomy", roomy), ("tight", tight)):
        world, served = serve(busy(3), hosts, costs, num_devices=4, budget=30 * GIB)
        assert world.traffic is not None
        found[name] = world.traffic.use(max(one.last_us for one in served)), sum(one.ttft_us or 0 for one in served)
    assert found["tight"][1] > found["roomy"][1]
    use = found["tight"][0]
    assert use.busiest is not None and use.busiest.name == "host 0 memory"
    assert 0 < use.busiest.used <= use.busiest.busy <= 1
    assert use.to_dict()["bytes"].keys() == {"weights"}
    assert use.groups.keys() == {"gpu pcie in", "host memory"}


@pytest.mark.parametrize("policy", POLICIES)
def test_costs_without_bytes_have_no_links(policy: str) -> None:
    with pytest.raises(ConfigError, match="ArtifactCosts has no bytes to move over links"):
        simulation(policy, H100_ARTIFACT, TARGETS, Pool(num_devices=2, weight_budget_bytes=40 * GIB, hosts=FREE))
