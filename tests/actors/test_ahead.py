"""Decode steps that are handed over before the last one's tokens are read: the answers are the same, and nothing is lost or kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from late_device import LateDevice
from planned_batches import KINDS, SAMPLED
from swaps import asks_of, tight_bytes
from worker_pair import GREEDY, NAMES, prompt_of, running_pair

from polymux.transport.messages import Cancel
from polymux.transport.units import MIB, SequenceId


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LateDevice]]:
    """From now on workers compute on such devices."""
    made: list[LateDevice] = []

    def open_device(name: str) -> LateDevice:
        made.append(LateDevice())
        return made[-1]

    monkeypatch.setattr("polymux.actors.worker.open_device", open_device)
    yield made


async def answers(kind: str) -> list[list[int]]:
    async with running_pair(batch_invariant=True) as pair:
        specs = [pair.specs[NAMES[i % 2]] for i in range(6)]
        asks = [(spec, prompt_of(spec, 20 + i, i), replace(KINDS[kind], seed=i, max_tokens=12 + 5 * i)) for i, spec in enumerate(specs)]
        return await asyncio.gather(*(pair.generate(*ask) for ask in asks))


@pytest.mark.parametrize("kind", KINDS)
async def test_answers_are_the_same_as_without(kind: str, late: list[LateDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    got = await answers(kind)
    monkeypatch.undo()
    assert got == await answers(kind)
    ahead = [n for device in late for n in device.num_behind]
    assert max(ahead) == (0 if kind == "penalized" else 1)


async def test_logprobs_are_the_same_as_without(late: list[LateDevice], monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> list[object]:
        async with running_pair(batch_invariant=True) as pair:
            spec = pair.specs[NAMES[0]]
            sequence_id = await pair.send(spec, prompt_of(spec, 20), replace(SAMPLED, logprobs=3, max_tokens=8, ignore_eos=True))
            found: dict[int, object] = {}
            while len(found) < 8:
                update = await pair._received[sequence_id].get()
                found |= {update.index + i: logprobs for i, logprobs in enumerate(update.logprobs)}
            return [found[i] for i in sorted(found)]

    got = await ask()
    monkeypatch.undo()
    assert got == await ask()


@pytest.mark.parametrize("host_kv_bytes", [8 * MIB, 0])
async def test_answers_are_the_same_when_memory_is_short(host_kv_bytes: int, late: list[LateDevice]) -> None:
    async with running_pair(batch_invariant=True) as roomy:
        asks = [(spec, prompt, replace(sampling, max_tokens=40)) for spec, prompt, sampling in asks_of(roomy)]
        expected, kv_bytes = [await roomy.generate(*ask) for ask in asks], tight_bytes(roomy)
    async with running_pair(decode_kv_bytes=kv_bytes, batch_invariant=True, host_kv_bytes=host_kv_bytes) as tight:
        got = await asyncio.gather(*(tight.generate(*ask) for ask in asks))
        counters = dict(tight.decode.report().counters)
    assert got == expected
    assert counters["preemptions"] > 0


@pytest.mark.parametrize("end", ["cancel", "client", "deadline"])
async def test_sequences_that_end_in_the_middle_of_a_step_leave_nothing_behind(end: str, late: list[LateDevice]) -> None:
    async with running_pair() as pair:
        spec = pair.specs[NAMES[0]]
        deadline_s = 0.5 if end == "deadline" else 30.0
        endless = replace(GREEDY, max_tokens=150)
        ids = [await pair.send(spec, prompt_of(spec, 30, i), endless, deadline_s=deadline_s) for i in range(4)]
        await asyncio.gather(*(pair._received[i].get() for i in ids))
        if end == "cancel":
            for sequence_id in ids:
                await pair.links[1].send(Cancel(sequence_id=SequenceId(sequence_id), reason="test"))
        elif end == "client":
            await pair.links[1].close()


async def test_a_sequence_is_given_up_with_all_its_tokens(late: list[LateDevice]) -> None:
    async with running_pair(batch_invariant=True) as pair:
        spec = pair.specs[NAMES[0]]
        asking = replace(GREEDY, max_tokens=120)
        expected = await pair.generate(spec, prompt_of(spec, 30), asking)
        sequence_id = await pair.send(spec, prompt_of(spec, 30), asking)
        await pair._received[sequence_id].get()
        pair.decode.move()
        tokens: dict[int, int] = {0: expected[0]}
        is_over = False
        while not is_over:
            update = await pair._received[sequence_id].get()
            tokens |= {update.index + i: token for i, token in enumerate(update.token_ids)}
            is_over = update.moved or update.finish_reason is not None  # it may be done before it is given up
        assert [tokens[i] for i in sorted(tokens)] == expected[: len(tokens)]
        assert not update.moved or update.index == len(tokens)
        await pair.links[1].send(Cancel(sequence_id=SequenceId(sequence_id), reason="test"))
