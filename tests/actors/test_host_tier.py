"""The host tier's block pools, and the copier between them and an arena's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from host_tiers import tier_of, tier_over
from torch import Tensor

from polymux.actors.arena import Arena
from polymux.actors.copier import Copied, Copier, copy_blocks
from polymux.actors.host_tier import HostTier
from polymux.actors.kv_blocks import BlockManager
from polymux.actors.store_server import StoreServer
from polymux.transport.errors import Cancelled, NoFreeBlocks, Overloaded, PolymuxError
from polymux.transport.host_tier import TierMemory
from polymux.transport.messages import KVLayout
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB

TOKEN = "test-cluster-token-0123456789"
SMALL = KVLayout(num_layers=2, num_kv_heads=1, head_dim=32, dtype="float32")  # 8 KiB
ODD = KVLayout(num_layers=3, num_kv_heads=2, head_dim=96, dtype="bfloat16")  # 36 KiB: not a divisor of a slab
HUGE = KVLayout(num_layers=40, num_kv_heads=8, head_dim=128, dtype="float32")


def arena_manager() -> BlockManager:
    return BlockManager(Arena(Region.create(2 * MIB), weight_reserve_bytes=0, slab_bytes=128 * KIB))


def test_models_of_two_workers_share_one_bounded_memory() -> None:
    memory = TierMemory(2 * MIB, 128 * KIB)
    mine, other = tier_over(memory), tier_over(memory)
    small, odd = mine.pool(SMALL), other.pool(ODD)
    assert small is not None and odd is not None
    ids = small.allocate(10 * small.blocks_per_slab)
    with pytest.raises(NoFreeBlocks):
        odd.allocate(30)
    assert mine.num_free_bytes == other.num_free_bytes == 6 * 128 * KIB
    small.free(ids)
    assert len(odd.allocate(30)) == 30
    mine.blocks.check()
    other.blocks.check()


def test_blocks_too_large_for_the_slabs_have_no_pool() -> None:
    assert tier_of().pool(HUGE) is None


def test_a_worker_attaches_to_its_node_s_store_or_does_without() -> None:
    store = StoreServer(budget_bytes=MIB, layout="plain", token=TOKEN, kv_bytes=MIB)
    tier = HostTier.attach(store.address, TOKEN)
    assert tier is not None and tier.nbytes == MIB
    store.close()
    assert HostTier.attach(store.address, TOKEN) is None
    pool = tier.pool(SMALL)
    assert pool is not None and len(pool.allocate(3)) == 3  # what it has, it keeps
    tier.close()
    without = StoreServer(budget_bytes=MIB, layout="plain", token=TOKEN)
    assert HostTier.attach(without.address, TOKEN) is None
    without.close()


class Done:
    """Collects what the copier says of its copies, as an engine thread's mailbox would."""

    def __init__(self, copy: Callable[[Tensor, Sequence[int], Tensor, Sequence[int]], Iterator[None]] = copy_blocks) -> None:
        self.said: queue.Queue[Callable[[], None]] = queue.Queue()
        self.copier = Copier(self.said.put, copy=copy, max_queued=4)
        self.ends: list[Copied] = []

    def next(self) -> Copied:
        self.said.get(timeout=10)()
        return self.ends[-1]


@pytest.mark.parametrize("layout", [SMALL, ODD])
def test_blocks_go_to_the_host_and_come_back_to_other_places_unchanged(layout: KVLayout) -> None:
    tier, device, done = tier_of(), arena_manager().pool(layout), Done()
    host = tier.pool(layout)
    assert host is not None
    ids = device.allocate(9)
    ids = ids[::2] + ids[1::2]  # runs and strays
    device.kv[ids] = torch.randn(9, *device.kv.shape[1:]).to(device.kv.dtype)
    expected = device.kv[ids].clone()
    host_ids = host.allocate(9)
    done.copier.submit(device.kv, ids, host.kv, host_ids, done.ends.append)
    first = done.next()
    assert (first.error, first.num_blocks, first.nbytes) == (None, 9, 9 * layout.block_bytes)
    device.free(ids)
    device.allocate(2)
    back = device.allocate(9)
    device.kv[back] = 0
    done.copier.submit(host.kv, host_ids, device.kv, back, done.ends.append)
    assert done.next().error is None
    assert torch.equal(device.kv[back], expected)
    assert done.copier.close()


def test_a_copy_that_fails_says_so_and_the_next_one_goes_on() -> None:
    def broken(source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]) -> Iterator[None]:
        if source_ids[0] == 1:
            raise RuntimeError("a bad block")
        yield

    done, kv = Done(broken), arena_manager().pool(SMALL).kv
    for i in (1, 2):
        done.copier.submit(kv, [i], kv, [i], done.ends.append)
    error = done.next().error
    assert error is not None and "a bad block" in error.message
    assert done.next().error is None
    done.copier.close()


def test_every_copy_ends_once_when_the_copier_is_closed() -> None:
    started, go = threading.Event(), threading.Event()

    def slow(source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]) -> Iterator[None]:
        started.set()
        go.wait(10)
        yield

    done, kv = Done(slow), arena_manager().pool(SMALL).kv
    for i in range(4):
        done.copier.submit(kv, [i], kv, [i], done.ends.append)
    assert started.wait(10)
    done.copier.submit(kv, [4], kv, [4], done.ends.append)
    with pytest.raises(Overloaded):
        done.copier.submit(kv, [5], kv, [5], done.ends.append)
    closing = threading.Thread(target=done.copier.close)
    closing.start()
    while not done.copier._is_closing:
        pass
    go.set()
    closing.join(10)
    errors: list[PolymuxError | None] = [done.next().error for _ in range(5)]
    assert all(isinstance(error, Cancelled) for error in errors)
    with pytest.raises(Overloaded):
        done.copier.submit(kv, [0], kv, [0], done.ends.append)
    assert done.said.empty()
