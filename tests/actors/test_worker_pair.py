"""A prefill and a decode worker over real sockets and shared memory, without a controller: whose blocks are whose, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from unittest import mock

import pytest
from worker_pair import GREEDY, NAMES, prompt_of, running_pair

from polymux.actors.weights.residency import Switch
from polymux.transport.errors import WorkerLost
from polymux.transport.kv import KVSettings
from polymux.transport.messages import Cancel, FinishReason, SamplingParams
from polymux.transport.units import KIB, ModelName, SequenceId


async def test_sequences_of_two_models_mix_and_give_what_each_gives_alone() -> None:
    async with running_pair(batch_invariant=True) as pair:
        asks = [(spec, prompt_of(spec, 5 + 29 * i, i)) for i in range(4) for spec in pair.specs.values()]
        alone = [await pair.generate(spec, prompt) for spec, prompt in asks]
        together = await asyncio.gather(*(pair.generate(spec, prompt) for spec, prompt in asks))
        assert together == alone
        counters = dict(pair.decode.report().counters)
        assert counters["model_switches"] >= 2 and counters["kv_transfers_committed"] == 2 * len(asks)


async def test_a_worker_prefills_and_decodes_as_it_is_asked() -> None:
    """Both ways between two workers and within each, at the same time: the same tokens, and no block moves within one."""
    async with running_pair(batch_invariant=True) as pair:
        spec, (one, other) = pair.specs[NAMES[0]], (pair.prefill, pair.decode)
        prompts = [prompt_of(spec, 70, salt) for salt in range(3)]
        expected = [await pair.generate(spec, prompt) for prompt in prompts]
        ids = [
            (await pair.send(spec, prompt, GREEDY, roles=roles), tokens)
            for prompt, tokens in zip(prompts, expected, strict=True)
            for roles in ((one, other), (other, one), (one, one), (other, other))
        ]
        for sequence_id, tokens in ids:
            assert await pair.collect(sequence_id) == (tokens, mock.ANY)
        committed = [dict(worker.report().counters)["kv_transfers_committed"] for worker in (one, other)]
        assert committed == [len(prompts), 2 * len(prompts)]


async def test_a_switch_for_a_prompt_spares_the_models_that_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pair() as pair:
        engine, here = pair.decode._engine, (pair.decode, pair.decode)
        specs = [pair.specs[name] for name in NAMES]
        for spec in specs:  # from here on both are resident, and take turns
            await pair.collect(await pair.send(spec, prompt_of(spec, 20), GREEDY, roles=here))
        activate, spared = engine.activate, list[tuple[set[ModelName], set[ModelName]]]()

        def spy(model: ModelName, wanted: Collection[ModelName] = ()) -> Switch | None:
            spared.append((set(wanted), {s.spec.model for s in pair.decode._decode._sequences.values()}))
            return activate(model, wanted)

        monkeypatch.setattr(engine, "activate", spy)
        long = await pair.send(specs[0], prompt_of(specs[0], 20), replace(GREEDY, max_tokens=160), roles=here)
        for salt in range(3):
            late = await pair.send(specs[1], prompt_of(specs[1], 20, salt), replace(GREEDY, max_tokens=2), roles=here, due_in_s=0.0)
            await pair.collect(late)
        await pair.collect(long)
    assert all(wanted == with_work for wanted, with_work in spared)
    assert set(NAMES) in [wanted for wanted, _ in spared]


async def test_workers_that_prefill_for_each_other_do_not_wait_for_each_others_blocks() -> None:
    """Where a prefill worker's own sequences hold all its blocks, the decode worker computes the prompt in the blocks that it granted."""
    async with running_pair(batch_invariant=True) as pair:
        spec = pair.specs[NAMES[0]]
        expected = await pair.generate(spec, prompt_of(spec, 70, 1))
        pool = pair.prefill._engine.pool(spec.model)
        taken = pool.allocate(pool.num_free)
        assert await pair.generate(spec, prompt_of(spec, 70, 1)) == expected
        pool.free(taken)


async def test_a_prompt_that_a_worker_prefills_for_itself_can_be_cancelled_at_any_time() -> None:
    async with running_pair() as pair:
        spec, roles = pair.specs[NAMES[0]], (pair.decode, pair.decode)
        for pause_s in (0.0, 0.001, 0.005, 0.02):
            ids = [await pair.send(spec, prompt_of(spec, 150, salt), GREEDY, roles=roles) for salt in range(4)]
            await asyncio.sleep(pause_s)
            for sequence_id in ids[1:]:
                await pair.links[1].send(Cancel(sequence_id=SequenceId(sequence_id), reason="test"))
            tokens, last = await pair.collect(ids[0])
            assert last.error is None and len(tokens) == GREEDY.max_tokens
            await pair.check_whole()


async def test_a_sampled_sequence_is_the_same_after_preemption() -> None:
    """An arena too small for all: the youngest lose their blocks and are prefilled again, prompt and outputs."""
    sampling = SamplingParams(max_tokens=80, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True, repetition_penalty=1.1)
    async with running_pair(batch_invariant=True) as roomy:
        spec = roomy.specs[NAMES[0]]
        prompts = [prompt_of(spec, 40, salt) for salt in range(6)]
        expected = [await roomy.generate(spec, prompt, replace(sampling, seed=salt)) for salt, prompt in enumerate(prompts)]
    blocks = 6 * 4 + 2  # all prompts fit with a block to spare, their outputs do not
    async with running_pair(decode_kv_bytes=blocks * spec.kv.block_bytes + 128 * KIB, batch_invariant=True) as tight:
        got = await asyncio.gather(*(tight.generate(spec, prompt, replace(sampling, seed=salt)) for salt, prompt in enumerate(prompts)))
        assert dict(tight.decode.report().counters).get("preemptions", 0) > 0
    assert got == expected


async def test_a_replay_goes_on_where_the_stream_stopped() -> None:
    async with running_pair(batch_invariant=True) as pair:
        spec = pair.specs[NAMES[1]]
        prompt = prompt_of(spec, 33)
        whole = await pair.generate(spec, prompt)
        assert await pair.generate(spec, prompt, outputs=tuple(whole[:9])) == whole[9:]


async def test_one_token_needs_no_decode_step() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        sequence_id = await pair.send(spec, prompt_of(spec, 20), replace(GREEDY, max_tokens=1))
        tokens, last = await pair.collect(sequence_id)
        assert len(tokens) == 1 and last.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("tokens_before_cancel", [0, 1, 5])
async def test_a_cancelled_sequence_frees_its_blocks_in_every_phase(tokens_before_cancel: int) -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        sequence_id = await pair.send(spec, prompt_of(spec, 100), replace(GREEDY, max_tokens=90))
        for _ in range(tokens_before_cancel):
            await pair._received[sequence_id].get()
        await pair.links[1].send(Cancel(sequence_id=SequenceId(sequence_id), reason="test"))
        await pair.check_whole()
        assert pair.decode.report().loads == tuple(replace(load, num_running=0, num_waiting=0) for load in pair.decode.report().loads)


async def test_a_lost_client_frees_the_blocks_of_all_its_sequences() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        ids = [await pair.send(spec, prompt_of(spec, 60, salt), replace(GREEDY, max_tokens=120)) for salt in range(5)]
        await pair._received[ids[0]].get()
        await pair.links[1].close()
        await pair.check_whole()


async def test_a_deadline_ends_a_sequence_with_its_reason() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        _, last = await pair.collect(await pair.send(spec, prompt_of(spec, 100), replace(GREEDY, max_tokens=90), deadline_s=0.01))
        assert last.error is not None and last.error.name in ("DeadlineExceeded", "TransferTimeout")


async def test_an_unknown_model_is_answered_with_its_name() -> None:
    async with running_pair() as pair:
        spec = replace(pair.specs[NAMES[0]], model=ModelName("absent"))
        _, last = await pair.collect(await pair.send(spec, [9, 10], GREEDY))
        assert last.error is not None and last.error.name == "ModelNotFound" and "absent" in last.error.message


async def test_a_dead_prefill_worker_ends_its_sequences_and_frees_their_blocks() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        ids = [await pair.send(spec, prompt_of(spec, 150, salt), GREEDY) for salt in range(6)]
        await asyncio.to_thread(pair.prefill.stop)
        results = [await pair.collect(sequence_id) for sequence_id in ids]
        assert all(last.error is not None or len(tokens) == GREEDY.max_tokens for tokens, last in results)
        assert any(last.error is not None for _, last in results)
        await pair.until(lambda: pair.decode._engine.blocks.num_out == 0)
        pair.prefill._engine.blocks._pools.clear()  # stopped with its arena


@pytest.mark.parametrize("prompt_len", [1, 15, 16, 17, 32, 190, 191])
async def test_a_sequence_may_fill_its_model_to_the_last_token(prompt_len: int) -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        max_tokens = min(spec.max_model_len - prompt_len, 20)
        sequence_id = await pair.send(spec, prompt_of(spec, prompt_len), replace(GREEDY, max_tokens=max_tokens + (prompt_len == 190)))
        tokens, last = await pair.collect(sequence_id)
        assert len(tokens) == max_tokens and last.finish_reason is FinishReason.LENGTH


async def test_a_prompt_that_leaves_no_room_for_output_is_refused_and_delays_nobody() -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        too_long = await pair.send(spec, prompt_of(spec, spec.max_model_len), GREEDY)
        assert len(await pair.generate(spec, prompt_of(spec, 9))) == GREEDY.max_tokens
        _, last = await pair.collect(too_long)
        assert last.error is not None and last.error.name == "ContextLengthExceeded" and str(spec.max_model_len) in last.error.message


async def test_sequences_beyond_the_transfers_of_an_edge_wait() -> None:
    async with running_pair(kv=KVSettings(max_transfers=2)) as pair:
        asks = [(spec, prompt_of(spec, 40, salt)) for salt in range(6) for spec in pair.specs.values()]
        assert all(len(tokens) == GREEDY.max_tokens for tokens in await asyncio.gather(*(pair.generate(*ask) for ask in asks)))


async def test_a_worker_whose_engine_has_ended_says_that_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pair() as pair:
        pair.decode.report()

        def broken() -> None:
            raise RuntimeError("a mistake outside of any step")

        monkeypatch.setattr(pair.decode, "_publish", broken)
        pair.decode._mailbox.wake()
        await pair.until(lambda: not pair.decode._thread.is_alive())
        with pytest.raises(WorkerLost, match="engine thread"):
            pair.decode.report()


async def test_a_stop_that_comes_while_the_mailbox_is_emptied_does_not_wait_for_the_next_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_pair() as pair:
        worker, drain = pair.decode, pair.decode._mailbox.drain

        def drain_late() -> list[Callable[[], None]]:
            worker._stopping.set()
            worker._mailbox.wake()
            return drain()

        monkeypatch.setattr(worker._mailbox, "drain", drain_late)
        worker._mailbox.wake()
        await pair.until(lambda: not worker._thread.is_alive(), deadline_s=3.0)
