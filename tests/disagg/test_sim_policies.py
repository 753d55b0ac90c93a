"""Every simulated policy: small cases by hand, nobody sees the future, the same work gives the same result everywhere."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.sim.costs import H100_ARTIFACT, MS, SECOND, CostModel
from polymux.disagg.sim.loop import Journal
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.physical import GIB, physical_costs
from polymux.disagg.sim.policies import ORACLES, POLICIES, Pool, simulation
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.errors import ConfigError

ROOT = Path(__file__).parents[2]
TARGETS = Targets(ttft_us=10 * SECOND, tpot_us=100 * MS)
QWEN = "qwen2.5-7b"
PHYSICAL = physical_costs("h100")
TIGHT = Hosts(gpus=2, pcie_gb_per_s=25, memory_gb_per_s=30, network_gbit_per_s=40)
SETTINGS: dict[str, tuple[CostModel, Pool]] = {
    "artifact": (H100_ARTIFACT, Pool(num_devices=1)),
    "physical": (PHYSICAL, Pool(num_devices=1, weight_budget_bytes=40 * GIB)),
    "linked": (PHYSICAL, Pool(num_devices=1, weight_budget_bytes=40 * GIB, hosts=TIGHT)),
}
LOAD, PREFILL, STEP = 875 * MS, 17 * MS, 8 * MS  # of qwen with 100 tokens, by the published costs


def request(number: int, model: str, at_us: int, *, input_len: int = 100, output_len: int = 5, kind: str = QWEN) -> SimRequest:
    return SimRequest(request_id=number, arrival_us=at_us, model=model, kind=kind, input_len=input_len, output_len=output_len)


def serve(
    policy: str, requests: list[SimRequest], *, num_devices: int = 1, setting: str = "artifact", journal: Journal | None = None
) -> list[Progress]:
    costs, pool = SETTINGS[setting]
    return simulation(policy, costs, TARGETS, replace(pool, num_devices=num_devices), journal).run(requests)


def busy(seed: int, *, num_requests: int = 60, num_models: int = 8, seconds: float = 20.0) -> list[SimRequest]:
    rng = random.Random(seed)
    kinds = [("qwen2.5-7b", "yi-9b", "llama2-13b")[m % 3] for m in range(num_models)]
    arrivals = sorted(rng.randrange(int(seconds * SECOND)) for _ in range(num_requests))
    models = [rng.randrange(num_models) for _ in arrivals]
    return [
        request(i, f"model-{m}", at_us, input_len=rng.randint(1, 2000), output_len=rng.randint(1, 300), kind=kinds[m])
        for i, (at_us, m) in enumerate(zip(arrivals, models, strict=True))
    ]


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize("policy", ["slack", "wrr-shared", "sllm", "sllm-idle", "sllm-oracle"])
def test_a_request_alone_takes_a_load_a_prefill_and_its_steps(policy: str) -> None:
    (one,) = serve(policy, [request(0, "a", SECOND)])
    assert one.ttft_us == LOAD + PREFILL
    assert one.last_us == SECOND + LOAD + PREFILL + 4 * STEP


def test_models_that_have_their_devices_load_nothing() -> None:
    first, second = serve("static", [request(0, "a", 0), request(1, "b", 0)])
    assert (first.ttft_us, second.has_failed) == (PREFILL, True)


def test_memory_bounds_what_shares_a_device_for_good() -> None:
    served = serve("mux", [request(i, f"model-{i}", i * SECOND) for i in range(4)])
    assert [one.has_failed for one in served] == [False, False, True, True]  # half of 80 GiB holds two of 14


def test_the_published_phases_load_apart_and_kv_follows_a_switch() -> None:
    (one,) = serve("wrr", [request(0, "a", 0, input_len=1000)], num_devices=2)
    assert one.ttft_us == LOAD + 30 * MS
    assert one.last_us == LOAD + 30 * MS + 31 * MS + LOAD + 4 * STEP


@pytest.mark.parametrize("policy", ["sllm", "sllm-idle"])
def test_a_model_waits_until_the_one_before_it_has_ended(policy: str) -> None:
    first, second = serve(policy, [request(0, "a", 0), request(1, "b", 10 * MS)])
    ended_us = LOAD + PREFILL + 4 * STEP
    assert (first.last_us, second.first_us) == (ended_us, ended_us + LOAD + PREFILL)


def test_models_pile_up_on_a_loading_worker_unless_idle_ones_go_first() -> None:
    """Both workers served before, worker 0 longest ago; it is loading when the next model comes."""
    warm = [request(0, "a", 0), request(1, "b", MS)]
    asked = [request(2, "c", 10 * SECOND), request(3, "d", 10 * SECOND + MS)]
    late = {policy: serve(policy, warm + asked, num_devices=2)[3].ttft_us for policy in ("sllm", "sllm-idle")}
    assert late["sllm-idle"] == LOAD + PREFILL
    assert late["sllm"] == 2 * (LOAD + PREFILL) + 4 * STEP - MS


def test_a_request_without_a_token_for_fifteen_seconds_is_given_up_at_the_next_arrival() -> None:
    long = request(0, "a", 0, output_len=3000)
    served = serve("sllm", [long, request(1, "b", MS), request(2, "a", 16 * SECOND)])
    assert [one.has_failed for one in served] == [False, True, False]


def test_slack_lets_a_second_model_in_between_tokens() -> None:
    first, second = serve("slack", [request(0, "a", 0, output_len=3000), request(1, "b", SECOND)])
    assert first.is_attained and second.is_attained
    assert second.last_us < first.last_us


def test_weights_that_stay_need_no_second_load() -> None:
    served = serve("slack", [request(i, "ab"[i % 2], i * 10 * SECOND) for i in range(4)], setting="physical")
    assert [one.ttft_us for one in served[2:]] == [5760 + 2135] * 2


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="policy 'fifo' is unknown; there are: slack, wrr"):
        simulation("fifo", H100_ARTIFACT, TARGETS, Pool(num_devices=1))


# ---------------------------------------------------------------- always


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("setting", SETTINGS)
@given(seed=st.integers(0, 10_000), num_devices=st.integers(2, 5))
@settings(max_examples=8, deadline=None)
def test_a_request_ends_with_all_its_tokens_or_failed_and_a_device_does_one_thing_at_a_time(
    policy: str, setting: str, seed: int, num_devices: int
) -> None:
    journal = Journal()
    served = serve(policy, busy(seed), num_devices=num_devices, setting=setting, journal=journal)
    for one in served:
        assert one.num_tokens == one.request.output_len or one.has_failed
        assert one.num_on_time <= one.num_tokens and 0 <= one.qos <= 1
    for line in journal.spans.values():
        assert all(before.ended_us <= after.began_us for before, after in pairwise(line))


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy not in ORACLES])
@pytest.mark.parametrize("setting", SETTINGS)
def test_decisions_do_not_depend_on_what_is_to_come(policy: str, setting: str) -> None:
    """Two traces are equal up to t: other requests come after it, and those without their last token by then end sooner or later."""
    for seed in range(3):
        requests = busy(seed)
        split_us = requests[30].arrival_us
        num_made = made_until(policy, requests, split_us, setting)
        rng = random.Random(f"future {seed}")
        future = [
            replace(one, output_len=num_made[one.request_id] + rng.randint(1, 600)) if num_made[one.request_id] < one.output_len else one
            for one in requests
            if one.arrival_us < split_us
        ]
        future += [replace(one, request_id=1000 + one.request_id) for one in busy(seed + 100) if one.arrival_us >= split_us]
        past, other = Journal(), Journal()
        serve(policy, requests, num_devices=3, setting=setting, journal=past)
        serve(policy, future, num_devices=3, setting=setting, journal=other)
        assert past.until(split_us) == other.until(split_us)
        assert past != other


def made_until(policy: str, requests: list[SimRequest], at_us: int, setting: str) -> dict[int, int]:
    """Tokens that each request has by then."""

    class Counted(Progress):
        def token(self, token_us: int) -> None:
            super().token(token_us)
            made[self.request.request_id] += token_us <= at_us

        def tokens(self, ends_us: object, max_gap_us: int) -> None:
            for end_us in ends_us:  # type: ignore[attr-defined]
                self.token(end_us)

    made = dict.fromkeys((one.request_id for one in requests), 0)
    costs, pool = SETTINGS[setting]
    simulation(policy, costs, TARGETS, replace(pool, num_devices=3)).serve([Counted(one, TARGETS) for one in requests])
    return made


# ---------------------------------------------------------------- determinism


def digest() -> str:
    """Of everything that every policy does with the same work."""
    found = hashlib.sha256()
    for policy in POLICIES:
        for setting in SETTINGS:
            journal = Journal()
            served = serve(policy, busy(7), num_devices=3, setting=setting, journal=journal)
            ends = [(one.request.request_id, one.first_us, one.last_us, one.num_on_time, one.qos) for one in served]
            found.update(repr((policy, setting, ends, journal.placements, sorted(journal.spans.items()))).encode())
    return found.hexdigest()


def test_the_same_work_gives_the_same_result_in_every_process() -> None:
    path = [str(ROOT / ".namespace"), str(Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {path!r}; import test_sim_policies as t; print(t.digest())"
    found = {digest()}
    for seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
        found.add(done.stdout.strip())
    assert len(found) == 1
