"""A client that follows its sequence when that moves between the workers of a pair."""

from __future__ import annotations

import asyncio

from worker_pair import Pair

from polymux.actors.worker import Worker
from polymux.transport.messages import Generate, ModelSpec, SamplingParams, SequenceUpdate
from polymux.transport.units import SequenceId, pack_ids


class Client:
    """One sequence as a front door carries it: its tokens so far, and the worker that it is at."""

    def __init__(self, pair: Pair, spec: ModelSpec, prompt: list[int], sampling: SamplingParams) -> None:
        self.pair, self.spec, self.prompt, self.sampling = pair, spec, prompt, sampling
        self.tokens: list[int] = []
        self.decode = pair.decode
        self.sequence_id = ""
        self.num_moves = 0
        self.last: SequenceUpdate | None = None

    @property
    def other(self) -> Worker:
        return self.pair.prefill if self.decode is self.pair.decode else self.pair.decode

    async def start(self) -> None:
        self.sequence_id = await self.pair.send(self.spec, self.prompt, self.sampling, roles=(self.other, self.decode))

    async def until(self, num_tokens: int) -> bool:
        """Whether it comes so far before it ends, or is given up."""
        early: dict[int, int] = {}
        async with asyncio.timeout(30):
            while len(self.tokens) < num_tokens:
                update = await self.pair._received[self.sequence_id].get()
                early |= {update.index + i: token for i, token in enumerate(update.token_ids)}
                while len(self.tokens) in early:
                    self.tokens.append(early.pop(len(self.tokens)))
                if update.moved or update.error or update.finish_reason:
                    self.last = update
                    return False
        return True

    @property
    def is_whole(self) -> bool:
        return len(self.tokens) == self.sampling.max_tokens

    async def whole(self) -> list[int]:
        """All its tokens, followed from worker to worker."""
        while not await self.until(self.sampling.max_tokens + 1):
            assert self.last is not None and self.last.error is None, self.last
            if self.last.finish_reason:
                break
            await self.follow()
        return self.tokens

    async def follow(self, to: Worker | None = None) -> None:
        """Go on at another worker, with what the old one kept."""
        assert self.last is not None and self.last.moved and self.last.index == len(self.tokens)
        old = self.decode
        self.decode = to or self.other
        handover, self.sequence_id = self.sequence_id, f"{self.sequence_id}+"
        self.num_moves += 1
        self.pair._received[self.sequence_id] = asyncio.Queue()
        await self.pair.links[0 if self.decode is self.pair.prefill else 1].send(self.command(old, handover))

    def command(self, old: Worker, handover: str) -> Generate:
        return Generate(
            sequence_id=SequenceId(self.sequence_id),
            model=self.spec.model,
            prompt_ids=pack_ids(self.prompt),
            output_ids=pack_ids(self.tokens),
            sampling=self.sampling,
            prefill=self.pair.peer(old),
            deadline_s=30.0,
            tpot_slo_s=0.1,
            due_in_s=10.0,
            handover=SequenceId(handover),
        )
