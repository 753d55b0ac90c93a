"""A sequence moves between two workers in the middle of its answer: the same tokens, and no block is lost, whatever fails on the way."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from moving_client import Client
from worker_pair import GREEDY, NAMES, TOKEN, Pair, counter, prompt_of, running_pair

from polymux.transport.link import WorkerLink
from polymux.transport.messages import Cancel, SamplingParams
from polymux.transport.units import ClientId, ModelName, SequenceId

LONG = replace(GREEDY, max_tokens=90)
SAMPLED = SamplingParams(max_tokens=90, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, repetition_penalty=1.1)


@pytest.mark.parametrize("sampling", [LONG, SAMPLED], ids=["greedy", "sampled"])
async def test_a_batch_that_moves_gives_the_same_tokens_while_others_go_on(sampling: SamplingParams) -> None:
    async with running_pair(batch_invariant=True) as pair:
        moving, staying = (pair.specs[name] for name in NAMES)
        asks = [(spec, prompt_of(spec, 20 + 13 * i, i), replace(sampling, seed=i)) for i in range(3) for spec in (moving, staying)]
        alone = [await pair.generate(*ask) for ask in asks]
        num_prefilled = [counter(worker, "prefix_cache_queries") for worker in (pair.prefill, pair.decode)]
        clients = [Client(pair, *ask) for ask in asks]
        for client in clients:
            await client.start()

        async def move_now_and_then() -> None:
            while any(client.num_moves < 2 and not client.is_whole for client in clients if client.spec is moving):
                await asyncio.sleep(0.01)
                pair.decode.move(moving.model)
                pair.prefill.move(moving.model)

        moves = asyncio.create_task(move_now_and_then())
        assert await asyncio.gather(*(client.whole() for client in clients)) == alone
        await moves
        assert all((client.num_moves > 0) == (client.spec is moving) for client in clients)
        moved = counter(pair.prefill, "sequences_moved") + counter(pair.decode, "sequences_moved")
        assert moved == sum(client.num_moves for client in clients)
        num_more = [counter(w, "prefix_cache_queries") - n for w, n in zip((pair.prefill, pair.decode), num_prefilled, strict=True)]
        assert sum(num_more) == sum(len(prompt) for _, prompt, _ in asks)  # each prompt once: no move was a prefill again


async def moved_client(pair: Pair, num_tokens: int = 5) -> Client:
    """One that its worker has given up, and that nobody has taken over."""
    spec = pair.specs[NAMES[0]]
    client = Client(pair, spec, prompt_of(spec, 70), LONG)
    await client.start()
    await client.until(num_tokens)
    client.decode.move()
    assert not await client.until(LONG.max_tokens + 1)
    assert client.decode._engine.blocks.num_out > 0
    return client


async def test_what_is_not_taken_over_in_time_is_freed_and_computed_again() -> None:
    async with running_pair(batch_invariant=True, keep_s=0.05) as pair:
        client = await moved_client(pair)
        await pair.check_whole()  # its time is over
        await client.follow()
        tokens = await client.whole()
        assert tokens == await pair.generate(client.spec, client.prompt, LONG)
        assert counter(pair.decode, "sequences_moved") == 0


async def test_an_order_for_other_tokens_than_those_kept_gets_none_of_them() -> None:
    async with running_pair(batch_invariant=True, keep_s=0.3) as pair:
        client = await moved_client(pair)
        assert client.last is not None
        client.tokens, client.last = client.tokens[:-1], replace(client.last, index=client.last.index - 1)
        await client.follow()
        assert await client.whole() == await pair.generate(client.spec, client.prompt, LONG)
        assert counter(pair.decode, "sequences_moved") == 0


async def test_a_worker_can_take_back_what_it_gave_up() -> None:
    async with running_pair(batch_invariant=True) as pair:
        client = await moved_client(pair)
        await client.follow(to=pair.decode)
        assert await client.whole() == await pair.generate(client.spec, client.prompt, LONG)
        assert counter(pair.decode, "sequences_moved") == 1


@pytest.mark.parametrize("pause_s", [None, 0.0, 0.002, 0.02])
async def test_a_cancelled_move_leaves_no_block_on_either_side(pause_s: float | None) -> None:
    async with running_pair() as pair:
        client = await moved_client(pair)
        old_id = client.sequence_id
        if pause_s is not None:
            await client.follow()
            await asyncio.sleep(pause_s)
            await pair.links[0].send(Cancel(sequence_id=SequenceId(client.sequence_id), reason="test"))
        await pair.links[1].send(Cancel(sequence_id=SequenceId(old_id), reason="test"))
        await pair.check_whole()


async def test_what_is_kept_goes_with_its_client() -> None:
    async with running_pair() as pair:
        await moved_client(pair)
        await pair.links[1].close()
        await pair.check_whole()


@pytest.mark.parametrize("pause_s", [0.0, 0.001, 0.01])
async def test_a_move_from_a_worker_that_dies_is_computed_again(pause_s: float) -> None:
    async with running_pair(batch_invariant=True) as pair:
        expected = await pair.generate(pair.specs[NAMES[0]], prompt_of(pair.specs[NAMES[0]], 70), LONG)
        client = await moved_client(pair)
        if pause_s:
            await client.follow()
            await asyncio.sleep(pause_s)
        await asyncio.to_thread(pair.decode.stop)
        if not pause_s:
            await client.follow()
        assert await client.whole() == expected
        await pair.until(lambda: pair.prefill._engine.blocks.num_out == 0)
        pair.decode._engine.blocks._pools.clear()  # stopped with its arena


async def test_a_move_to_a_worker_that_dies_frees_what_was_kept() -> None:
    async with running_pair(keep_s=0.5) as pair:
        client = await moved_client(pair)
        await client.follow()
        await asyncio.to_thread(pair.prefill.stop)
        await pair.until(lambda: pair.decode._engine.blocks.num_out == 0)
        pair.prefill._engine.blocks._pools.clear()  # stopped with its arena


async def test_a_move_to_a_worker_without_room_waits_and_is_computed_again_when_nobody_keeps_it_any_longer() -> None:
    async with running_pair(batch_invariant=True, keep_s=0.2) as pair:
        spec = pair.specs[NAMES[0]]
        expected = await pair.generate(spec, prompt_of(spec, 70), LONG)
        client = await moved_client(pair)
        pool = pair.prefill._engine.pool(spec.model)
        taken = pool.allocate(pool.num_free)
        await client.follow()
        await pair.until(lambda: pair.decode._engine.blocks.num_out == 0)
        pool.free(taken)
        pair.prefill._mailbox.wake()
        assert await client.whole() == expected


async def test_sequences_that_wait_are_told_to_go_elsewhere_at_once() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        pool = pair.decode._engine.pool(spec.model)
        taken = pool.allocate(pool.num_free)
        sequence_id = await pair.send(spec, prompt_of(spec, 20), GREEDY)
        await pair.until(lambda: pair.decode._decode.num_open == 1)
        pair.decode.move(ModelName("another"))
        pair.decode.move(spec.model)
        _, last = await pair.collect(sequence_id)
        assert last.error is not None and last.error.name == "Draining"
        pool.free(taken)


async def test_another_client_that_goes_takes_nothing_of_what_is_kept_with_it() -> None:
    async with running_pair(batch_invariant=True) as pair:
        client = await moved_client(pair)
        stranger = await WorkerLink.connect(pair.peer(pair.decode), ClientId("stranger"), TOKEN, 5.0)
        await stranger.close()
        await asyncio.sleep(0.05)
        await client.follow()
        assert await client.whole() == await pair.generate(client.spec, client.prompt, LONG)
        assert counter(pair.decode, "sequences_moved") == 1
