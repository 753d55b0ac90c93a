"""Instances of several ranks, each a process of its own: what they say is what one rank says, whoever prefills and whoever decodes.

And what becomes of them when a rank is killed or frozen: a typed error within the deadline, and an instance that is lost as a whole.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from instances import LONG, answers, ending, freeze, is_running, kill, lost, pids
from moving_client import Client
from worker_pair import GREEDY, NAMES, TOKEN, prompt_of, running_pair

from polymux.actors.parallel.leader import Ranks, RankSettings, gpus_of_ranks
from polymux.transport.errors import CheckpointError, ConfigError, RankLost
from polymux.transport.kv import KVSettings
from polymux.transport.messages import Shard
from polymux.transport.units import MIB, ModelName


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Any]:
    """What one rank says, kept from the first test that asks."""
    return {}


@pytest.mark.parametrize(("ranks", "backend"), [((2, 1), "shm"), ((1, 2), "tcp"), ((4, 2), "tcp"), ((1, 4), "auto")], ids=str)
async def test_ranks_say_what_one_says(ranks: tuple[int, int], backend: str, one_rank: dict[str, Any]) -> None:
    if not one_rank:
        async with running_pair() as pair:
            one_rank["tokens"] = await answers(pair)
    async with running_pair(ranks=ranks, kv=KVSettings(backend=backend, checksum_every=1)) as pair:
        assert await answers(pair) == one_rank["tokens"]


async def test_a_sequence_moves_between_two_ranks_and_one_in_the_middle_of_its_answer() -> None:
    async with running_pair(ranks=(2, 1)) as pair:
        asks = [(pair.specs[name], prompt_of(pair.specs[name], 20 + 13 * i, i), LONG) for i, name in enumerate(NAMES)]
        alone = [await pair.generate(*ask) for ask in asks]
        clients = [Client(pair, *ask) for ask in asks]
        for client in clients:
            await client.start()

        async def move_now_and_then() -> None:
            while any(client.num_moves < 2 and not client.is_whole for client in clients):
                await asyncio.sleep(0.02)
                pair.decode.move()
                pair.prefill.move()

        moves = asyncio.create_task(move_now_and_then())
        assert await asyncio.gather(*(client.whole() for client in clients)) == alone
        await moves
        assert all(client.num_moves > 0 for client in clients)


async def test_a_prompt_that_begins_like_another_is_cached_on_every_rank() -> None:
    async with running_pair(ranks=(1, 2)) as pair:
        spec, here = pair.specs[NAMES[0]], (pair.decode, pair.decode)
        first, _ = await pair.collect(await pair.send(spec, prompt_of(spec, 80), GREEDY, roles=here))
        again = [await pair.send(spec, prompt_of(spec, 80), GREEDY, roles=here) for _ in range(3)]
        assert [(await pair.collect(one))[0] for one in again] == [first] * 3
        assert dict(pair.decode.report().counters)["prefix_cache_hits"] > 0


@pytest.mark.parametrize(("rank", "strike", "timeout_s", "within_s"), [(1, kill, 20.0, 5.0), (3, freeze, 2.0, 8.0)])
async def test_a_rank_lost_in_the_middle_of_a_batch_is_a_typed_error(
    strike: Callable[[int], None], timeout_s: float, within_s: float, rank: int
) -> None:
    """A death is seen long before the deadline, which only one that hangs needs."""
    async with running_pair(ranks=(1, 4), rank_timeout_s=timeout_s) as pair:
        spec, processes = pair.specs[NAMES[0]], pids(pair.decode)
        await pair.generate(spec, prompt_of(spec, 20))
        sequence_id = await pair.send(spec, prompt_of(spec, 20), LONG)
        await pair._received[sequence_id].get()
        strike(processes[rank - 1])
        began_s = time.monotonic()
        last = await ending(pair, sequence_id)
        assert last.error is not None and last.error.name == "RankLost", last
        assert time.monotonic() - began_s < within_s
        await lost(pair.decode, 2.0)
        await pair.until(lambda: not any(map(is_running, processes)))


@pytest.mark.parametrize(("strike", "timeout_s", "within_s"), [(kill, 20.0, 5.0), (freeze, 1.0, 8.0)])
async def test_an_idle_instance_notices_that_it_lost_a_rank(strike: Callable[[int], None], timeout_s: float, within_s: float) -> None:
    async with running_pair(ranks=(1, 2), rank_timeout_s=timeout_s, probe_interval_s=0.5) as pair:
        spec, processes = pair.specs[NAMES[0]], pids(pair.decode)
        await pair.generate(spec, prompt_of(spec, 20))
        strike(processes[0])
        await lost(pair.decode, within_s)
        await pair.until(lambda: not any(map(is_running, processes)))


async def test_an_image_that_one_rank_cannot_have_fails_the_switch_and_nothing_else() -> None:
    async with running_pair(ranks=(1, 2)) as pair:
        first, second = (pair.specs[name] for name in NAMES)
        before = await pair.generate(first, prompt_of(first, 30))
        good = pair.store._server._open_image

        def bad(model: ModelName, shard: Shard) -> tuple[bytes, int]:
            if (model, shard) == (second.model, Shard(rank=1, num_ranks=2)):
                raise CheckpointError("this rank's image is gone")
            return good(model, shard)

        pair.store._server._open_image = bad
        here = (pair.decode, pair.decode)
        _, last = await pair.collect(await pair.send(second, prompt_of(second, 30), GREEDY, roles=here))
        assert last.error is not None and last.error.name == "CheckpointError"
        assert await pair.generate(first, prompt_of(first, 30)) == before
        pair.store._server._open_image = good
        assert len(await pair.generate(second, prompt_of(second, 30))) == GREEDY.max_tokens


UNABLE = """
from polymux.actors.device import CpuDevice
from polymux.actors.parallel import follower
from polymux.transport.errors import RankLost

class Unable(CpuDevice):
    def join(self, meeting):
        raise RankLost("no route to the others")

follower.main(Unable())
"""


@pytest.mark.parametrize(
    ("arena_bytes", "program", "reason"),
    [(-1, None, "did not come up"), (MIB, ("-c", UNABLE), "did not come up.*rank [12] failed: no route to the others")],
)
def test_ranks_that_do_not_come_up_are_a_typed_error_and_leave_nothing(
    arena_bytes: int, program: tuple[str, ...] | None, reason: str
) -> None:
    settings = RankSettings(
        worker_id="w",
        num_ranks=3,
        arena_bytes=arena_bytes,
        weight_reserve_bytes=0,
        num_threads=1,
        batch_invariant=False,
        store_address="unix:@nowhere",
        token=TOKEN,
        timeout_s=2.0,
    )
    with pytest.raises(RankLost, match=reason):
        Ranks(settings, **({} if program is None else {"program": program}))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("polymux-rank")]


def test_each_rank_sees_the_gpu_at_its_place_in_rank_0s_list() -> None:
    assert gpus_of_ranks("3,GPU-8f,5", 2) == ("3", "GPU-8f")
    assert gpus_of_ranks(None, 3) == gpus_of_ranks("", 3) == ("0", "1", "2")
    with pytest.raises(ConfigError, match=r"tensor_parallel=4 .* CUDA_VISIBLE_DEVICES=1,2 names 2"):
        gpus_of_ranks("1,2", 4)
