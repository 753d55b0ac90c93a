"""Swapping through real workers: the tokens stay what they are, and the host tier is never in the way."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from swaps import asks_of, tight_bytes
from torch import Tensor
from worker_pair import running_pair

from polymux.actors import copier
from polymux.transport.messages import Cancel
from polymux.transport.units import KIB, MIB, SequenceId


async def alone() -> tuple[list[list[int]], int]:
    async with running_pair(batch_invariant=True) as roomy:
        return [await roomy.generate(*ask) for ask in asks_of(roomy)], tight_bytes(roomy)


async def test_answers_are_the_same_when_sequences_were_swapped_out_in_the_middle() -> None:
    expected, kv_bytes = await alone()
    async with running_pair(decode_kv_bytes=kv_bytes, batch_invariant=True, host_kv_bytes=8 * MIB) as tight:
        got = await asyncio.gather(*(tight.generate(*ask) for ask in asks_of(tight)))
        counters = dict(tight.decode.report().counters)
        free = tight.decode.report().num_free_host_bytes
    assert got == expected
    assert counters["swap_outs"] > 0 and counters["swap_in_bytes"] == counters["swap_out_bytes"] > 0
    assert free is not None and free <= 8 * MIB


async def test_what_does_not_fit_the_host_tier_is_computed_again() -> None:
    expected, kv_bytes = await alone()
    async with running_pair(decode_kv_bytes=kv_bytes, batch_invariant=True, host_kv_bytes=64 * KIB) as tight:
        got = await asyncio.gather(*(tight.generate(*ask) for ask in asks_of(tight)))
        counters = dict(tight.decode.report().counters)
    assert got == expected
    assert counters["recomputed_tokens"] > 0


async def test_a_store_that_died_takes_no_answer_with_it() -> None:
    expected, kv_bytes = await alone()
    async with running_pair(decode_kv_bytes=kv_bytes, batch_invariant=True, host_kv_bytes=8 * MIB) as tight:
        for worker in (tight.prefill, tight.decode):
            for model in tight.specs:
                worker._engine.activate(model)
        ids = [await tight.send(*ask) for ask in asks_of(tight)]
        await tight._received[ids[0]].get()
        await asyncio.to_thread(tight.store.close)
        await tight.until(lambda: dict(tight.decode.report().counters).get("swap_ins", 0) > 0, deadline_s=30)
        got = [(await tight.collect(i))[0] for i in ids[1:]]
    assert got == expected[1:]


async def test_a_sequence_whose_copy_failed_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, kv_bytes = await alone()
    count = itertools.count()

    def unreliable(source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]) -> Iterator[None]:
        if next(count) % 2:
            raise RuntimeError("a copy that fails")
        yield from copy(source, source_ids, target, target_ids)

    copy = copier.copy_blocks
    async with running_pair(decode_kv_bytes=kv_bytes, batch_invariant=True, host_kv_bytes=8 * MIB) as tight:
        assert tight.decode._copier is not None
        monkeypatch.setattr(tight.decode._copier, "_copy", unreliable)
        got = await asyncio.gather(*(tight.generate(*ask) for ask in asks_of(tight)))
        assert dict(tight.decode.report().counters)["swap_failures"] > 0
    assert got == expected


@pytest.mark.parametrize("end", ["cancel", "client", "deadline"])
async def test_sequences_that_end_while_swapped_leave_nothing_behind(end: str) -> None:
    async with running_pair() as roomy:
        kv_bytes = tight_bytes(roomy)
    async with running_pair(decode_kv_bytes=kv_bytes, host_kv_bytes=8 * MIB) as tight:
        asks = [(spec, prompt, replace(sampling, max_tokens=140)) for spec, prompt, sampling in asks_of(tight)]
        ids = [await tight.send(*ask, deadline_s=1.0 if end == "deadline" else 30.0) for ask in asks]
        await tight.until(lambda: dict(tight.decode.report().counters).get("swap_outs", 0) > 0, deadline_s=30)
        if end == "cancel":
            for sequence_id in ids:
                await tight.links[1].send(Cancel(sequence_id=SequenceId(sequence_id), reason="test"))
        elif end == "client":
            await tight.links[1].close()
        await tight.check_whole()
