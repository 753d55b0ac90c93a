"""The communicator of an instance's ranks over the stand-in: what is lost is found within the deadline, and the device is let go."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from backends import eventually
from hypothesis import given
from hypothesis import strategies as st
from nursery import Forked, nursery
from rank_peer import COUNT, SUMS_A_STEP, Rank

from polymux.transport.errors import RankLost
from polymux.transport.nccl.api import Nccl
from polymux.transport.nccl.ranks import Pending

TIMEOUT_S = 0.8


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """The nursery has, before descriptors are counted."""
    nursery()


@contextmanager
def others(unique_id: bytes, num_ranks: int, **knobs: int) -> Iterator[list[Forked]]:
    """The other ranks, each a process; `knobs` of their stand-in."""
    env = {f"STAND_IN_{name.upper()}": str(value) for name, value in knobs.items()}
    with ExitStack() as stack:
        found = []
        for rank in range(1, num_ranks):
            process = nursery().fork("rank_peer", unique_id.hex(), str(rank), str(num_ranks), "60", **env)
            stack.callback(process.bury)
            found.append(process)
        yield found


@contextmanager
def ranks(at_rest: Any, num_ranks: int, **knobs: int) -> Iterator[tuple[Rank, list[Forked]]]:
    unique_id = Nccl.load(at_rest.library()).unique_id()
    with others(unique_id, num_ranks, **knobs) as processes:
        first = Rank(unique_id, 0, num_ranks, TIMEOUT_S, abort_s=1.0)
        try:
            yield first, processes
        finally:
            first.comm.close()


def step(first: Rank, processes: list[Forked]) -> None:
    for process in processes:
        process.stdin.write(b"step\n")
        process.stdin.flush()
    first.step()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sums_of_many_steps_that_nobody_waited_for(at_rest: Any, nothing_left: None, num_ranks: int) -> None:
    with ranks(at_rest, num_ranks) as (first, processes):
        for _ in range(8):
            step(first, processes)
        assert eventually(lambda: first.comm.num_pending == 0)
        first.comm.check()
        total = sum(range(1, num_ranks + 1)) * num_ranks ** (8 * SUMS_A_STEP - 1)
        assert list(first.numbers) == pytest.approx([total] * COUNT)
    assert eventually(lambda: at_rest.count("comms") == 0)


def kill(process: Forked) -> None:
    process.kill()


def freeze(process: Forked) -> None:
    os.kill(process.pid, signal.SIGSTOP)


@pytest.mark.parametrize("strike", [kill, freeze])
@pytest.mark.parametrize("victim", [1, 3])
def test_a_lost_rank_is_found_within_the_deadline_and_the_device_is_let_go(
    at_rest: Any, nothing_left: None, strike: Callable[[Forked], None], victim: int
) -> None:
    at_rest.turn(peer_hangs=1)  # as over NVLink
    with ranks(at_rest, 4) as (first, processes):
        step(first, processes)
        assert eventually(lambda: first.comm.num_pending == 0)
        strike(processes[victim - 1])
        began_s = time.monotonic()
        first.step()
        assert eventually(lambda: bool(first.lost), TIMEOUT_S + 3.0)
        assert time.monotonic() - began_s >= TIMEOUT_S
        assert first.lost == [f"heard no more of the others for {TIMEOUT_S:g} s"]
        assert eventually(lambda: first.comm.num_pending == 0, 2.0), "whoever waits for the step's end waits for ever"
        with pytest.raises(RankLost, match="heard no more"):
            first.step()
    assert not first.fenced
    assert eventually(lambda: at_rest.count("comms") == 0)


def test_a_rank_that_is_late_is_waited_for(at_rest: Any, nothing_left: None) -> None:
    with ranks(at_rest, 2, late_us=int(0.3 * TIMEOUT_S * 1e6 / SUMS_A_STEP)) as (first, processes):
        for _ in range(6):  # each within its deadline, all together past it
            step(first, processes)
        assert eventually(lambda: first.comm.num_pending == 0, 6.0)
        assert not first.lost
        first.comm.check()


def test_what_nccl_complains_of_is_not_waited_for(at_rest: Any, nothing_left: None) -> None:
    at_rest.turn(peer_hangs=0)  # as over sockets
    with ranks(at_rest, 2) as (first, processes):
        step(first, processes)
        assert eventually(lambda: first.comm.num_pending == 0)
        processes[0].kill()
        began_s = time.monotonic()
        first.step()
        assert eventually(lambda: bool(first.lost), TIMEOUT_S / 2), "an error was taken for a delay"
        assert time.monotonic() - began_s < TIMEOUT_S and "remote process exited" in first.lost[0]


def test_a_loss_that_two_find_at_once_ends_no_process(at_rest: Any, nothing_left: None, monkeypatch: pytest.MonkeyPatch) -> None:
    at_rest.turn(peer_hangs=1)
    with ranks(at_rest, 2) as (first, processes):
        look = first.comm._look

        def look_beside_another(*args: Any) -> str | None:
            reason = look(*args)
            if reason is not None:
                first.comm.lose("its socket has ended")
            return reason

        monkeypatch.setattr(first.comm, "_look", look_beside_another)
        freeze(processes[0])
        first.step()
        assert eventually(lambda: first.comm.num_pending == 0, TIMEOUT_S + 3.0)
        assert not first.fenced and "heard no more" in first.lost[0]
        with pytest.raises(RankLost, match="its socket has ended"):
            first.comm.check()


def test_an_abort_that_lets_nothing_go_ends_the_process(at_rest: Any) -> None:
    at_rest.turn(peer_hangs=1, abort_hangs=1)
    with ranks(at_rest, 2) as (first, processes):
        freeze(processes[0])
        first.step()
        assert eventually(lambda: bool(first.fenced), TIMEOUT_S + 4.0)
        assert "did not let go" in first.fenced[0] and "heard no more" in first.fenced[0]
        at_rest.turn(abort_hangs=0)
        assert eventually(lambda: first.comm.num_pending == 0 or at_rest.count("comms") == 0)


def test_ranks_that_never_come_are_a_typed_error(at_rest: Any) -> None:
    at_rest.turn(init_hangs=1)
    unique_id = Nccl.load(at_rest.library()).unique_id()
    with pytest.raises(RankLost, match=r"rank 0 of 2 waited 0\.5 s for the others"):
        Rank(unique_id, 0, 2, TIMEOUT_S, join_s=0.5)
    at_rest.turn(init_hangs=0)
    with others(unique_id, 2):  # or its thread would wait for ever
        assert eventually(lambda: not any(thread.name == "polymux-ranks-join" for thread in threading.enumerate()), 30.0)


@given(st.lists(st.tuples(st.sampled_from(["add", "happen", "look"]), st.floats(0, 2)), max_size=60))
def test_events_come_back_once_and_in_order_and_only_the_first_ages(moves: list[tuple[str, float]]) -> None:
    pending, now_s, names = Pending(), 0.0, iter(range(100))
    waiting: deque[int] = deque()
    done: set[int] = set()
    returned: list[int] = []
    first_s = 0.0
    for move, pause_s in moves:
        now_s += pause_s
        if move == "add":
            event = next(names)
            first_s = first_s if waiting else now_s
            waiting.append(event)
            pending.add(event, now_s)
        elif move == "happen":
            done |= set(list(waiting)[: len(done - set(returned)) + 1])
        else:
            found = pending.drop_done(done.__contains__, now_s)
            assert found == [waiting.popleft() for _ in found] and (not waiting or waiting[0] not in done)
            returned += found
            first_s = now_s if found else first_s
        assert pending.age_s(now_s) == pytest.approx(now_s - first_s if waiting else 0.0)
    assert returned == sorted(set(returned))
