"""KV on simulated workers: who waits for room, who gives way, what stays cached; and what a live system spends beside its costs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.disagg.sim.costs import MS, SECOND
from polymux.disagg.sim.kv import KvRoom, blocks
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.overheads import Overheads
from polymux.disagg.sim.physical import GIB, KIB, PhysicalCosts, physical_costs
from polymux.disagg.sim.policies import Pool, simulation
from polymux.disagg.sim.token_level import TokenLevel
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.units import ModelName

LLAMA, TOKEN_BYTES = "llama2-13b", 800 * KIB
TARGETS = Targets(ttft_us=10 * SECOND, tpot_us=100 * MS)
RESERVE = 25 * GIB
A = ModelName("a")


def costs(num_kv_tokens: int) -> PhysicalCosts:
    """An arena that holds llama and so many tokens' KV."""
    return physical_costs("h100", memory_bytes=RESERVE + num_kv_tokens * TOKEN_BYTES)


def request(number: int, at_us: int, input_len: int, output_len: int, *, model: str = "a", session: int | None = None) -> SimRequest:
    return SimRequest(
        request_id=number, arrival_us=at_us, model=model, kind=LLAMA, input_len=input_len, output_len=output_len, session=session
    )


def serve(requests: list[SimRequest], num_kv_tokens: int, overheads: Overheads | None = None) -> tuple[TokenLevel, list[Progress]]:
    pool = Pool(num_devices=1, weight_budget_bytes=RESERVE)
    world = simulation("slack", costs(num_kv_tokens), TARGETS, pool if overheads is None else replace(pool, overheads=overheads))
    assert isinstance(world, TokenLevel)
    return world, world.run(requests)


# ---------------------------------------------------------------- room


def test_a_prompt_without_room_waits_for_a_sequence_to_end() -> None:
    _, (first, second) = serve([request(0, 0, 600, 50), request(1, 1, 600, 50)], num_kv_tokens=1024)
    assert first.is_done and second.is_done
    assert second.first_us is not None and second.first_us > first.last_us


def test_the_youngest_gives_way_and_every_token_still_comes() -> None:
    world, (first, second) = serve([request(0, 0, 200, 700), request(1, 1, 200, 700)], num_kv_tokens=1024)
    assert first.is_done and second.is_done
    assert world.room.num_preemptions >= 1 and first.last_us < second.last_us


def test_of_two_models_alone_in_their_batches_the_older_sequence_keeps_its_room() -> None:
    world, (first, second) = serve([request(0, 0, 200, 700), request(1, 1, 200, 700, model="b")], num_kv_tokens=1024)
    assert first.is_done and second.is_done
    assert world.room.num_preemptions == 1 and first.last_us < second.last_us


def test_what_can_never_fit_fails_and_nobody_waits_behind_it() -> None:
    _, served = serve([request(0, 0, 2000, 5), request(1, 1, 100, 5), request(2, 2, 100, 5000)], num_kv_tokens=1024)
    assert [one.has_failed for one in served] == [True, False, True]
    assert served[2].num_tokens > 800


@given(seed=st.integers(0, 1000), num_kv_tokens=st.integers(700, 4000))
@settings(max_examples=25, deadline=None)
def test_short_of_room_all_that_fit_end_and_none_is_left_out(seed: int, num_kv_tokens: int) -> None:
    rng = random.Random(seed)
    requests = [
        request(i, i * rng.randrange(200 * MS), rng.randint(1, 900), rng.randint(1, 300), model=rng.choice("abc")) for i in range(25)
    ]
    requests.sort(key=lambda one: one.arrival_us)
    world, served = serve(requests, num_kv_tokens)
    for one in served:
        fits = blocks(one.request.input_len + one.request.output_len) <= num_kv_tokens // 16 * 16
        assert one.is_done != one.has_failed
        assert one.is_done or not fits
    assert world.num_held_bytes == 0


@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300), st.booleans()), max_size=40))
def test_held_and_cached_kv_never_exceed_what_weights_leave(steps: list[tuple[int, int, bool]]) -> None:
    kv = KvRoom(arena_bytes=3000, reserve_bytes=1000)
    held: dict[int, int] = {}
    for number, num_tokens, ends in steps:
        if ends:
            kv.release(number, (A, number, True), held.pop(number, 0), 2)
        elif (blocks(num_tokens) - blocks(held.get(number, 0))) * 2 <= kv.free_bytes:
            kv.take((A, number, True))
            kv.hold(number, num_tokens, 2)
            held[number] = num_tokens
        assert kv.held_bytes == sum(2 * blocks(n) for n in held.values())
        assert 0 <= kv.cached_bytes <= kv.free_bytes
        assert kv.reserve_bytes <= kv.weights_end <= kv.arena_bytes


# ---------------------------------------------------------------- prefixes


def test_the_next_turn_of_a_session_computes_only_what_is_new() -> None:
    turns = [request(0, 0, 320, 16, session=7), request(1, 20 * SECOND, 400, 4, session=7)]
    world, (_, second) = serve(turns, num_kv_tokens=4096)
    assert world.room.num_cached_tokens == 336
    assert second.ttft_us == costs(4096).prefill_us(LLAMA, [400 - 336], [336])
    _, (_, alone) = serve([replace(one, session=None) for one in turns], num_kv_tokens=4096)
    assert alone.ttft_us == costs(4096).prefill_us(LLAMA, [400])


def test_cached_kv_goes_where_sequences_want_the_room() -> None:
    turns = [request(0, 0, 320, 16, session=7), request(1, 20 * SECOND, 900, 4), request(2, 40 * SECOND, 400, 4, session=7)]
    world, served = serve(turns, num_kv_tokens=1024)
    assert all(one.is_done for one in served)
    assert world.room.num_cached_tokens == 0


def test_a_prompt_is_computed_in_chunks_and_tokens_come_between_them() -> None:
    _, (first, second) = serve([request(0, 0, 100, 400), request(1, 2 * SECOND, 9000, 2)], num_kv_tokens=16_384)
    model = costs(16_384)
    whole_us = model.prefill_us(LLAMA, [9000])
    assert second.ttft_us is not None and second.ttft_us > whole_us
    assert first.is_attained and second.is_attained


# ---------------------------------------------------------------- beside the costs


def test_a_request_alone_takes_what_was_measured_beside_its_costs() -> None:
    measured = Overheads(door_us=5000, step_us=300, seq_us=50.0, prefill_stretch=2.0, decode_stretch=1.5)
    model = costs(4096)
    _, (one,) = serve([request(0, SECOND, 100, 3)], 4096, measured)
    load_us, prefill_us = model.load_us(LLAMA), model.prefill_us(LLAMA, [100])
    assert one.ttft_us == 5000 + load_us + 2 * prefill_us + 350
    steps_us = sum(round(model.decode_us(LLAMA, 1, n) * 1.5 + 350) for n in (101, 102))
    assert one.tpot_us == pytest.approx(steps_us / 2)


def test_a_slower_second_of_the_machine_stretches_what_ran_in_it() -> None:
    measured = Overheads(pace=(1.0, 1.0, 1.0, 2.0))
    model = costs(4096)
    _, (early, late) = serve([request(0, 0, 100, 3), request(1, 3 * SECOND, 100, 3)], 4096, measured)
    assert early.tpot_us is not None and late.tpot_us == pytest.approx(2 * early.tpot_us)
    assert late.ttft_us == 2 * model.prefill_us(LLAMA, [100])


@pytest.mark.parametrize(("step_us", "loading_us", "took_us"), [(100, 0, 100), (100, 90, 130), (100, 150, 150), (100, 9000, 150)])
def test_a_step_is_dragged_out_while_weights_are_loaded_beside_it(step_us: int, loading_us: int, took_us: int) -> None:
    """In 90 us beside a load that takes half as much again, 60 are done, and 40 follow."""
    assert Overheads(load_drag=0.5).dragged_us(step_us, loading_us) == took_us


def test_loads_beside_steps_take_their_time_from_them() -> None:
    def ends_us(load_drag: float) -> int:
        """Of the first model's answer, with another's weights coming in beside it."""
        pool = Pool(num_devices=1, weight_budget_bytes=2 * RESERVE, overheads=Overheads(load_drag=load_drag))
        model = physical_costs("h100", memory_bytes=2 * RESERVE + 4096 * TOKEN_BYTES)
        world = simulation("slack", model, TARGETS, pool)
        one, _ = world.run([request(0, 0, 100, 400), request(1, 2 * SECOND, 100, 400, model="b")])
        return one.last_us

    assert ends_us(0.0) < ends_us(0.2) < ends_us(0.4)
