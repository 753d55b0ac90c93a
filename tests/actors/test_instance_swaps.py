"""The host tier under instances of several ranks: swapped and cached KV goes there from every rank and comes back to all of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from instances import LONG, ending, kill, lost, pids
from swaps import asks_of, tight_bytes
from torch import Tensor
from worker_pair import GREEDY, NAMES, Ask, Pair, counter, prompt_of, running_pair, served

from polymux.transport.messages import Cancel
from polymux.transport.units import BLOCK_SIZE, KIB, MIB, SequenceId

RANKS = (2, 4)  # four hold each head twice


async def alone(ranks: int) -> tuple[list[list[int]], int]:
    """What the same instance says where nothing has to leave."""
    async with running_pair(ranks=(1, ranks), batch_invariant=True) as roomy:
        return await together(roomy, asks_of(roomy)), tight_bytes(roomy, ranks)


async def together(pair: Pair, asks: list[Ask]) -> list[list[int]]:
    return list(await asyncio.gather(*(pair.generate(*ask) for ask in asks)))


@pytest.mark.parametrize("ranks", RANKS)
async def test_answers_are_the_same_when_sequences_were_swapped_out_or_computed_again(ranks: int) -> None:
    expected, kv_bytes = await alone(ranks)
    async with running_pair(ranks=(1, ranks), decode_kv_bytes=kv_bytes, batch_invariant=True, host_kv_bytes=8 * MIB) as tight:
        assert await together(tight, asks_of(tight)) == expected
        swapped, copier = dict(tight.decode.report().counters), tight.decode._copier
        assert copier is not None
        assert swapped["swap_outs"] > 0 and swapped["swap_in_bytes"] == swapped["swap_out_bytes"] > 0
        whole = {spec.kv.block_bytes for spec in tight.specs.values()}
        assert all(swapped["swap_out_bytes"] % nbytes == 0 for nbytes in whole)  # every head of a block once
        copy, count = copier._copy, itertools.count()

        def unreliable(source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]) -> Iterator[None]:
            pieces = copy(source, source_ids, target, target_ids)
            if next(count) % 2:
                next(pieces)  # some rank's share of a block is there, and no more
                raise RuntimeError("a copy that fails in the middle")
            yield from pieces

        copier._copy = unreliable  # type: ignore[assignment]
        assert await together(tight, asks_of(tight)) == expected
        assert counter(tight.decode, "swap_failures") > 0


@pytest.mark.parametrize("ranks", RANKS[-1:])
async def test_a_cached_prefix_that_left_every_rank_comes_back_from_the_host(ranks: int) -> None:
    async with running_pair(ranks=(1, ranks), decode_kv_bytes=256 * KIB, host_kv_bytes=8 * MIB, batch_invariant=True) as pair:
        spec, here = pair.specs[NAMES[0]], (pair.decode, pair.decode)
        asks = [(spec, prompt_of(spec, 150, salt), replace(GREEDY, max_tokens=8)) for salt in range(5)]
        first = [await served(pair, ask, here) for ask in asks]
        prefixes = pair.decode._engine.prefixes
        assert prefixes.num_evicted > 0 and prefixes.host is not None and prefixes.host.num_blocks > 0
        again = [await served(pair, ask, here) for ask in asks]
        assert [tokens for tokens, _ in again] == [tokens for tokens, _ in first]
        assert {cached for _, cached in again} == {149 // BLOCK_SIZE * BLOCK_SIZE}
        prefixes.check()


async def test_an_instance_that_loses_a_rank_while_it_swaps_leaves_nothing_in_the_host_tier() -> None:
    async with running_pair() as roomy:
        kv_bytes = tight_bytes(roomy) // 2
    async with running_pair(ranks=(1, 2), decode_kv_bytes=kv_bytes, host_kv_bytes=8 * MIB, rank_timeout_s=2.0) as pair:
        asks = [(spec, prompt, LONG) for spec, prompt, _ in asks_of(pair)]
        ids = [await pair.send(*ask) for ask in asks]
        await pair.until(lambda: counter(pair.decode, "swap_outs") > 0, deadline_s=30)
        kill(pids(pair.decode)[0])
        for sequence_id in ids:
            last = await ending(pair, sequence_id)
            assert last.finish_reason is not None or (last.error is not None and last.error.name == "RankLost"), last
        await lost(pair.decode, 2.0)


async def test_sequences_that_are_cancelled_while_swapped_leave_nothing_behind() -> None:
    async with running_pair() as roomy:
        kv_bytes = tight_bytes(roomy) // 2
    async with running_pair(ranks=(1, 2), decode_kv_bytes=kv_bytes, host_kv_bytes=8 * MIB) as tight:
        asks = [(spec, prompt, LONG) for spec, prompt, _ in asks_of(tight)]
        ids = [await tight.send(*ask) for ask in asks]
        await tight.until(lambda: counter(tight.decode, "swap_outs") > 0, deadline_s=30)
        for sequence_id in ids:
            await tight.links[1].send(Cancel(sequence_id=SequenceId(sequence_id), reason="test"))
        await tight.check_whole()
