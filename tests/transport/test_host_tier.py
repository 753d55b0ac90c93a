"""Slab leases of the host tier: one owner at a time, whatever dies; the kernel keeps the books."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polymux.transport.errors import ConfigError, PeerLost, WireError
from polymux.transport.host_tier import MAX_SLAB_BYTES, MIN_SLAB_BYTES, OpenTier, SlabLeases, TierMemory, default_slab_bytes
from polymux.transport.units import GIB, KIB, MIB
from polymux.transport.weights import ImageServer, fetch_host_tier

TOKEN = "0123456789abcdef0123"


def leases_of(memory: TierMemory) -> SlabLeases:
    slab_bytes, fd = memory.open()
    return SlabLeases(OpenTier(fd, memory.nbytes, slab_bytes))


def serve(memory: TierMemory | None) -> ImageServer:
    def no_image(*_: object) -> tuple[bytes, int]:
        raise AssertionError

    return ImageServer(token=TOKEN, open_image=no_image, open_tier=memory.open if memory else None)


def test_a_slab_is_leased_once_and_again_when_it_came_back() -> None:
    memory = TierMemory(4 * 64 * KIB, 64 * KIB)
    first, second = leases_of(memory), leases_of(memory)
    assert [first.take(), second.take(), first.take(), second.take()] == [0, 1, 2, 3]
    assert first.take() is None and second.num_free == 0
    first.give_back(2)
    assert second.num_free == 1 and second.take() == 2
    with pytest.raises(KeyError):
        first.give_back(2)


def test_what_one_worker_writes_into_its_slab_lies_in_the_memory_that_all_share() -> None:
    memory = TierMemory(MIB, 64 * KIB)
    first, second = leases_of(memory), leases_of(memory)
    slab = first.take()
    assert slab is not None
    first.buffer[slab * 64 * KIB : slab * 64 * KIB + 5] = b"hello"
    assert bytes(second.buffer[slab * 64 * KIB : slab * 64 * KIB + 5]) == b"hello"


def test_leases_hold_while_the_mapping_does_though_the_descriptor_is_gone() -> None:
    memory = TierMemory(MIB, 64 * KIB)
    first, second = leases_of(memory), leases_of(memory)
    first.take()
    os.close(first._fd)
    assert second.take() == 1
    first._fd = -1
    first.buffer = memoryview(b"")  # a copy into its slabs is no longer possible
    assert second.take() == 0


def test_the_slabs_of_a_killed_worker_come_back() -> None:
    memory = TierMemory(MIB, 64 * KIB)
    server = serve(memory)
    mine = leases_of(memory)
    code = (
        "import sys, time; from polymux.transport.weights import fetch_host_tier; from polymux.transport.host_tier import SlabLeases\n"
        "leases = SlabLeases(fetch_host_tier(sys.argv[1], sys.argv[2], 20)); [leases.take() for _ in range(10)]\n"
        "print(leases.num_free, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, server.address, TOKEN], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "6\n"
        assert mine.num_free == 6
        worker.send_signal(signal.SIGKILL)
        worker.wait(20)
    assert mine.num_free == 16
    server.close()


def test_workers_go_on_leasing_when_the_store_has_died() -> None:
    memory = TierMemory(MIB, 64 * KIB)
    first, second = leases_of(memory), leases_of(memory)
    memory.close()
    assert first.take() == 0 and second.take() == 1
    with pytest.raises(PeerLost):
        memory.open()


def test_a_closed_lease_gives_everything_up() -> None:
    memory = TierMemory(MIB, 64 * KIB)
    first, second = leases_of(memory), leases_of(memory)
    while first.take() is not None:
        pass
    first.close()
    first.close()
    assert first.take() is None and first.num_free == 0 and second.num_free == 16


def test_a_node_without_a_host_tier_says_so() -> None:
    server = serve(None)
    assert fetch_host_tier(server.address, TOKEN, 10) is None
    server.close()


def test_a_closed_tier_hangs_up() -> None:
    memory = TierMemory(MIB)
    server = serve(memory)
    memory.close()
    with pytest.raises(PeerLost):
        fetch_host_tier(server.address, TOKEN, 10)
    server.close()


def test_memory_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("tier")
    os.ftruncate(fd, MIB)
    with pytest.raises(WireError, match="shrink"):
        SlabLeases(OpenTier(fd, MIB, 64 * KIB))
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


def test_a_tier_smaller_than_a_slab_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"store\.kv_bytes=1000.*raise it"):
        TierMemory(1000)


def test_slabs_follow_the_tier_s_size() -> None:
    assert default_slab_bytes(MIB) == MIN_SLAB_BYTES
    assert default_slab_bytes(GIB) == 4 * MIB
    assert default_slab_bytes(1024 * GIB) == MAX_SLAB_BYTES


class LeaseMachine(RuleBasedStateMachine):
    """Three workers take, give back, die and come anew; a model of who holds what is compared with what the kernel says."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = TierMemory(12 * 64 * KIB, 64 * KIB)
        self.workers = [leases_of(self.memory) for _ in range(3)]

    @rule(i=st.integers(0, 2), count=st.integers(1, 6))
    def take(self, i: int, count: int) -> None:
        for _ in range(count):
            num_free = self.workers[i].num_free
            assert (self.workers[i].take() is None) == (num_free == 0)

    @rule(i=st.integers(0, 2), data=st.data())
    def give_back(self, i: int, data: st.DataObject) -> None:
        if self.workers[i].held:
            self.workers[i].give_back(data.draw(st.sampled_from(sorted(self.workers[i].held))))

    @rule(i=st.integers(0, 2))
    def die(self, i: int) -> None:
        self.workers[i].close()
        self.workers[i] = leases_of(self.memory)

    @invariant()
    def each_slab_has_one_owner(self) -> None:
        held = [slab for worker in self.workers for slab in worker.held]
        assert len(held) == len(set(held))
        assert {worker.num_free for worker in self.workers} == {12 - len(held)}

    def teardown(self) -> None:
        for worker in self.workers:
            worker.close()
        self.memory.close()


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
