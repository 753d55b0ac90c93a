"""Prompts that begin alike, on real workers: the tokens are those of an engine without a cache, to the bit, and less is computed."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from worker_pair import GREEDY, NAMES, Ask, Pair, counter, prompt_of, running_pair, served

from polymux.transport.messages import Cancel, SamplingParams
from polymux.transport.units import BLOCK_SIZE, KIB, MIB, SequenceId

SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True, repetition_penalty=1.1)


def asks_of(pair: Pair) -> list[Ask]:
    """Prompts of both models that begin alike for some way, and go on differently, cut at all places of a block."""
    asks: list[Ask] = []
    for i, length in enumerate((17, 40, 65, 64, 100, 33, 128, 150)):
        for spec in pair.specs.values():
            prompt = prompt_of(spec, length)
            prompt[length - i :] = prompt_of(spec, i, salt=i)
            asks.append((spec, prompt, replace(SAMPLED, seed=i) if i % 2 else GREEDY))
    return asks


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What an engine gives that keeps nothing and computes whole prompts at once."""
    return asyncio.run(uncached())


async def uncached() -> list[list[int]]:
    async with running_pair(batch_invariant=True, prefix_caching=False, max_num_batched_tokens=256) as pair:
        tokens = [await served(pair, ask) for ask in asks_of(pair)]
        assert not any(cached for _, cached in tokens)
        return [one for one, _ in tokens]


@pytest.mark.parametrize(("chunk", "is_local"), [(16, False), (23, True), (48, False)])
async def test_tokens_are_the_same_to_the_bit_whatever_was_cached(expected: list[list[int]], chunk: int, is_local: bool) -> None:
    """One after another, then all at once, then again: chunks of a prefix are cut differently each time."""
    async with running_pair(batch_invariant=True, max_num_batched_tokens=chunk) as pair:
        roles = (pair.decode, pair.decode) if is_local else None
        asks = asks_of(pair)
        alone = [await served(pair, ask, roles) for ask in asks]
        assert [tokens for tokens, _ in alone] == expected
        assert alone[0][1] == 0 and alone[-1][1] == 112
        salted = await asyncio.gather(*(served(pair, ask, roles, cache_salt="other") for ask in asks))
        assert [tokens for tokens, _ in salted] == expected
        again = await asyncio.gather(*(served(pair, ask, roles) for ask in asks))
        assert [tokens for tokens, _ in again] == expected
        assert all(cached == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for (_, cached), (_, prompt, _) in zip(again, asks, strict=True))


@pytest.mark.parametrize("host_kv_bytes", [0, 8 * MIB], ids=["dropped", "to-the-host"])
async def test_tokens_are_the_same_while_the_arena_loses_blocks_all_the_time(expected: list[list[int]], host_kv_bytes: int) -> None:
    kv_bytes = 512 * KIB
    async with running_pair(batch_invariant=True, prefill_kv_bytes=kv_bytes, decode_kv_bytes=kv_bytes, host_kv_bytes=host_kv_bytes) as pair:
        for _ in range(2):
            got = await asyncio.gather(*(served(pair, ask) for ask in asks_of(pair)))
            assert [tokens for tokens, _ in got] == expected
        await pair.check_whole()
        prefixes = pair.prefill._engine.prefixes
        assert prefixes.num_evicted > 0
        prefixes.check()
        if prefixes.host is not None:  # it had room for all, so nothing was computed twice
            assert prefixes.host.num_blocks > 0
            assert [cached for _, cached in got] == [(len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for _, prompt, _ in asks_of(pair)]


async def test_an_answer_is_cached_too_for_the_conversation_that_goes_on() -> None:
    """What decode steps wrote is as good as what a prefill would have."""
    async with running_pair(batch_invariant=True, prefix_caching=False) as pair:
        spec = pair.specs[NAMES[1]]
        first = await pair.generate(spec, prompt_of(spec, 30))
        second = prompt_of(spec, 30) + first + prompt_of(spec, 7, salt=2)
        expected = await pair.generate(spec, second)
    async with running_pair(batch_invariant=True) as pair:
        here = (pair.decode, pair.decode)
        assert await pair.generate(spec, prompt_of(spec, 30)) == first  # computed at the other worker, and moved
        tokens, cached = await served(pair, (spec, second, GREEDY), here)
        assert tokens == expected
        assert cached == (30 + len(first) - 1) // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.parametrize("is_local", [False, True], ids=["moved", "in-place"])
async def test_a_burst_of_one_prompt_computes_it_once(is_local: bool) -> None:
    async with running_pair() as pair:
        spec, worker = pair.specs[NAMES[0]], pair.decode if is_local else pair.prefill
        roles = (worker, pair.decode)
        prompt = prompt_of(spec, 150)
        results = await asyncio.gather(*(served(pair, (spec, prompt, GREEDY), roles) for _ in range(6)))
        assert len({tuple(tokens) for tokens, _ in results}) == 1
        assert sorted(cached for _, cached in results) == [0] + [144] * 5
        assert counter(worker, "prompt_tokens") == 150 + 5 * 6
        assert counter(worker, "prefix_cache_queries") == 6 * 150 and counter(worker, "prefix_cache_hits") == 5 * 144


async def test_those_who_wait_for_a_prefix_go_on_when_its_prompt_is_cancelled() -> None:
    async with running_pair(batch_invariant=True, max_num_batched_tokens=16) as pair:
        spec = pair.specs[NAMES[0]]
        prompt = prompt_of(spec, 160)
        first = await pair.send(spec, prompt, GREEDY)
        rest = [asyncio.create_task(pair.generate(spec, prompt)) for _ in range(3)]
        await pair.links[1].send(Cancel(sequence_id=SequenceId(first), reason="test"))
        tokens = await asyncio.gather(*rest)
        assert tokens[0] == tokens[1] == tokens[2] == await pair.generate(spec, prompt, outputs=())


async def test_what_is_cached_is_reported_for_the_router_and_holds_no_block() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        await pair.generate(spec, prompt_of(spec, 100))
        await pair.until(lambda: len(pair.prefill.report().cached_prefixes) == 4 * (100 // BLOCK_SIZE))
        await pair.until(lambda: pair.prefill.report().num_blocks_out == 0)
        pool = pair.prefill._engine.pool(spec.model)
        assert pool.num_idle == 100 // BLOCK_SIZE
