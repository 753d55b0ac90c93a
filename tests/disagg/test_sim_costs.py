"""What things cost in a simulation, against sums done by hand."""

from __future__ import annotations

import pytest

from polymux.disagg.sim.bound import max_on_time
from polymux.disagg.sim.costs import H100_ARTIFACT, MS, SECOND
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.physical import GIB, physical_costs
from polymux.disagg.sim.residency import ArtifactSwitcher, Link, PhysicalSwitcher
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.units import ModelName

QWEN, YI, LLAMA = "qwen2.5-7b", "yi-9b", "llama2-13b"
A, B, C = (ModelName(name) for name in "abc")
KINDS = {A: QWEN, B: QWEN, C: LLAMA}


def test_the_published_costs_are_whole_milliseconds_rounded_down() -> None:
    # 16.105 + 0.014624 * 1000 - 0.000000664 * 10^6 = 30.066 ms
    assert H100_ARTIFACT.prefill_us(QWEN, [1000]) == 30 * MS
    # 16.105 + 0.014624 * 1500 - 0.000000664 * (10^6 + 500^2) = 37.212 ms
    assert H100_ARTIFACT.prefill_us(QWEN, [1000, 500]) == 37 * MS
    # 8.582 + 0.000259 * 10000 - 0.076 = 11.096 ms, whatever the batch
    assert H100_ARTIFACT.decode_us(QWEN, 1, 10_000) == H100_ARTIFACT.decode_us(QWEN, 50, 10_000) == 11 * MS
    assert [H100_ARTIFACT.load_us(kind) for kind in (QWEN, YI, LLAMA)] == [875 * MS, 1125 * MS, 1625 * MS]
    assert H100_ARTIFACT.kv_in_us(LLAMA, 1000) == 31 * MS
    assert H100_ARTIFACT.max_kv_tokens(LLAMA) == 56_623


def test_a_published_load_hides_behind_compute_but_for_ten_milliseconds() -> None:
    assert H100_ARTIFACT.prefetched_us(QWEN, 500 * MS) == 375 * MS
    assert H100_ARTIFACT.prefetched_us(QWEN, 5 * SECOND) == 10 * MS


def test_physical_steps_grow_with_the_batch_and_bytes_cross_the_link_at_its_speed() -> None:
    costs = physical_costs("h100", link_bytes_per_s=20e9)
    assert costs.decode_us(QWEN, 10, 5000) == 9150 + 680
    assert costs.decode_us(LLAMA, 10, 5000) == 12_590 + 1069 + 500
    assert costs.load_us(QWEN) == 2000 + round(14.2 * GIB / 20e9 * SECOND)
    assert costs.kv_in_us(LLAMA, 1000) == round(1000 * 800 * 1024 / 20e9 * SECOND)


def test_the_published_switcher_knows_one_model_and_hides_its_load_behind_the_last_ones_compute() -> None:
    switcher = ArtifactSwitcher(H100_ARTIFACT, KINDS)
    assert switcher.switch(A, 0, ()) == 875 * MS
    switcher.computed(800 * MS)
    assert (switcher.wait_us(A, 0), switcher.wait_us(B, 0)) == (0, 75 * MS)
    assert switcher.switch(B, 0, ()) == 75 * MS
    assert switcher.resident == {B}


def test_a_physical_load_begins_when_it_is_asked_for_and_one_follows_another() -> None:
    costs = physical_costs("h100")
    switcher = PhysicalSwitcher(costs, KINDS, 40 * GIB, lambda: 40 * GIB)
    load_us = costs.load_us(QWEN)
    assert switcher.switch(A, 0, ()) == load_us
    assert switcher.prefetch(B, 100, ()) == load_us  # the link is busy until then
    assert switcher.prefetch(B, load_us, ()) is None
    assert switcher.wait_us(B, load_us + 1000) == load_us - 1000
    assert switcher.switch(B, 3 * load_us, ()) == 0
    assert switcher.switch(A, 3 * load_us, ()) == 0


def test_devices_that_share_a_link_load_one_after_another() -> None:
    costs, link = physical_costs("h100"), Link()
    first, second = (PhysicalSwitcher(costs, KINDS, 40 * GIB, lambda: 40 * GIB, link) for _ in range(2))
    load_us = costs.load_us(QWEN)
    assert (first.switch(A, 0, ()), second.switch(A, 0, ())) == (load_us, 2 * load_us)
    assert PhysicalSwitcher(costs, KINDS, 40 * GIB, lambda: 40 * GIB).switch(A, 0, ()) == load_us


def test_a_prefetch_takes_nobodys_room_who_has_work() -> None:
    costs = physical_costs("h100")
    switcher = PhysicalSwitcher(costs, KINDS, 30 * GIB, lambda: 30 * GIB)
    switcher.switch(A, 0, ())
    switcher.switch(B, 2 * SECOND, (A,))
    assert not switcher.can_prefetch(C, (A, B, C))
    switcher.prefetch(C, 5 * SECOND, (A, C))
    assert switcher.resident == {A, B}
    assert switcher.switch(C, 5 * SECOND, (C,)) == costs.load_us(LLAMA)
    assert switcher.resident == {C}


def work(*arrivals: tuple[int, int, int], model: str = "a") -> list[SimRequest]:
    return [
        SimRequest(request_id=i, arrival_us=at_us, model=f"{model}{i}", kind=QWEN, input_len=n, output_len=m)
        for i, (at_us, n, m) in enumerate(arrivals)
    ]


def test_the_bound_is_all_when_there_is_room_and_falls_with_what_cannot_fit() -> None:
    # each needs 16 + 99 * 8 = 808 ms of its own device, and is due 1 s + 99 * 10 ms after it came
    targets = Targets(ttft_us=SECOND, tpot_us=10 * MS)
    requests = work(*((0, 1, 100) for _ in range(10)))
    assert max_on_time(requests, H100_ARTIFACT, targets, num_workers=5) == 1.0
    assert max_on_time(requests, H100_ARTIFACT, targets, num_workers=1) == pytest.approx(0.2)  # two of them in 1.99 s
    assert max_on_time(requests, H100_ARTIFACT, Targets(ttft_us=SECOND, tpot_us=MS), num_workers=10) == 1.0
    assert max_on_time(requests, H100_ARTIFACT, Targets(ttft_us=10 * MS, tpot_us=MS), num_workers=10) == 0.0
