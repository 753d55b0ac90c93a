"""One request under way: admitted, its sequences sent to workers and sent again when those are lost, its tokens gathered, released once.

Everything that can happen to it (updates, lost workers, its deadline, its client leaving) is left in one place and wakes one task:
the one that asks for news. Between two wake-ups news pile up, so a client that reads slowly gets fewer and longer deltas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from polymux.deploy.http.choice import Choice, Delta
from polymux.deploy.http.generation import Generation
from polymux.deploy.http.links import Links
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.deploy.metrics import Metrics
from polymux.transport.errors import (
    Cancelled,
    DeadlineExceeded,
    NoFreeBlocks,
    Overloaded,
    PeerLost,
    PolymuxError,
    Refused,
    RequestTooLarge,
    TransferError,
    WireError,
    WorkerLost,
    error_from_name,
)
from polymux.transport.link import WorkerLink
from polymux.transport.messages import Admit, Generate, Peer, Placement, Release, SequenceUpdate
from polymux.transport.units import SequenceId, WorkerId, pack_ids

log = logging.getLogger("polymux.frontdoor")

READMIT_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # between asking again for the place of a lost worker


class Admission(Protocol):
    """The controller as a request needs it; both calls are bounded in time."""

    async def admit(self, ask: Admit, timeout_s: float) -> Placement: ...

    def release(self, release: Release) -> None: ...


@dataclass(slots=True)
class _Place:
    """Where a sequence runs now. `num_before`: tokens that were out when it began there; its first one comes from the prefill worker."""

    sequence_id: SequenceId
    prefill: WorkerLink
    decode: WorkerLink
    num_before: int


class OpenRequest:
    """`start` it, ask for `news` until it `is_finished`, `close` it on every path. Belongs to one event loop."""

    def __init__(
        self,
        generation: Generation,
        choices: Sequence[Choice],
        *,
        settings: FrontDoorSettings,
        links: Links,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self.generation = generation
        self.choices = tuple(choices)
        self._settings = settings
        self._links = links
        self._admission = admission
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._arrived_s = self._loop.time()
        self._deadline_s = self._arrived_s + generation.envelope.timeout_s
        self._timer = self._loop.call_at(self._deadline_s, self._expire)
        self._ask: Admit | None = None
        self.ttft_s: float | None = None
        self.error: PolymuxError | None = None  # what ended it, if it did not finish
        self._num_open = len(self.choices)
        self._updates: list[SequenceUpdate] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_poked = False
        self._is_closed = False
        self._places: dict[int, _Place] = {}
        self._choice_of: dict[SequenceId, Choice] = {}
        self._unplaced: set[int] = set()
        self._num_attempts = [0] * len(self.choices)
        self._excluded: set[WorkerId] = set()
        self._lost: set[WorkerLink] = set()
        self._placer: asyncio.Task[None] | None = None
        metrics.arrived(generation.model, generation.num_prompt_tokens)

    # -- for the task that serves the client --------------------------------------------------------------------------

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.output_ids) for choice in self.choices)

    @property
    def is_finished(self) -> bool:
        return self._num_open == 0

    async def start(self) -> None:
        """Be admitted; workers are found meanwhile. Raises what the controller refuses with."""
        envelope, sequences = self.generation.envelope, self.generation.sequences
        self._ask = Admit(
            request_id=envelope.request_id,
            client_id=self._settings.client_id,
            model=self.generation.model,
            num_prompt_tokens=max(one.num_prompt_tokens for one in sequences),
            max_tokens=max(one.sampling.max_tokens for one in sequences),
            num_sequences=len(sequences),
            deadline_s=self._remaining_s(),
            ttft_slo_s=envelope.ttft_slo_s,
            tpot_slo_s=envelope.tpot_slo_s,
            tenant=envelope.tenant,
        )
        placement = await self._admission.admit(self._ask, self._remaining_s())
        self._unplaced = set(range(len(sequences)))
        self._placer = self._loop.create_task(self._place(placement))

    async def news(self) -> list[Delta]:
        """Wait for what is new, empty after a `poke`; ask until `is_finished`. Raises the error that ended the request."""
        while True:
            deltas = self._drain()
            if deltas or self._is_poked:
                self._is_poked = False
                return deltas
            if self.error is not None:
                raise self.error
            self._waiter = self._loop.create_future()
            await self._waiter

    def poke(self) -> None:
        """Wake the asking task though nothing is new, so that it can show a sign of life."""
        self._is_poked = True
        self._wake()

    def fail(self, error: PolymuxError) -> None:
        """End it with this error, at the workers at once; the first one counts."""
        if self.error is None and not self._is_closed:
            self.error = error
            for choice in self.choices:
                self._retire(choice, error.message)
            self._wake()

    def close(self, outcome: str) -> None:
        """Stop whatever still runs for it and give back its place in the controller's books. Once, without waiting."""
        assert not self._is_closed, "a request is closed once"
        self._is_closed = True
        self._timer.cancel()
        if self._placer is not None:
            self._placer.cancel()
        for choice in self.choices:
            self._retire(choice, outcome)
        self._links.leave(self)
        if self._ask is not None:
            self._admission.release(self._release(outcome))
        self._metrics.ended(
            self.generation.model,
            outcome,
            num_output_tokens=self.num_output_tokens,
            had_token=self.ttft_s is not None,
            latency_s=self._loop.time() - self._arrived_s,
            tpot_s=self.tpot_s,
            tenant=self.generation.envelope.tenant,
        )

    # -- for links and timers -----------------------------------------------------------------------------------------

    def put(self, update: SequenceUpdate) -> None:
        self._updates.append(update)
        if self._waiter is not None:
            self._wake()
        elif len(self._updates) > self._settings.max_pending_updates:
            self.fail(Cancelled("the client reads too slowly"))

    def link_lost(self, link: WorkerLink) -> None:
        """Choices that this worker still owed tokens go elsewhere."""
        self._lost.add(link)
        self._excluded.add(link.peer.worker_id)
        self._wake()

    def _expire(self) -> None:
        self.fail(DeadlineExceeded(f"the request was not finished within {self.generation.envelope.timeout_s:g} s"))

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _drain(self) -> list[Delta]:
        updates, self._updates = self._updates, []
        now_s = self._loop.time()
        touched: dict[int, Choice] = {}
        for update in updates:
            choice = self._choice_of.get(update.sequence_id)
            if choice is None or choice.is_finished:
                continue
            if update.error is not None:
                self._worker_failed(
                    choice, error_from_name(update.error.name, update.error.message, retry_after_s=update.error.retry_after_s)
                )
                continue
            touched[choice.index] = choice
            self._count(choice, update, now_s)
            if choice.is_finished:
                self._num_open -= 1
                self._retire(choice, "stop string")
                self._metrics.finished(self.generation.model, str(choice.finish_reason))
        if self._lost:
            self._move_lost()
        return [delta for choice in touched.values() if (delta := choice.take()) is not None]

    def _count(self, choice: Choice, update: SequenceUpdate, now_s: float) -> None:
        last_s = choice.last_token_s
        count = choice.accept(update, now_s)
        if count and last_s is not None:
            self._metrics.gap(self.generation.model, count, now_s - last_s)
        elif count and self.ttft_s is None:
            self.ttft_s = now_s - self._arrived_s
            self._metrics.first_token(self.generation.model, self.ttft_s)

    def _retire(self, choice: Choice, reason: str) -> None:
        """Free it at its worker, unless the worker itself said that it was the end."""
        place = self._places.pop(choice.index, None)
        if place is not None:
            self._links.ignore(place.sequence_id)
            if not choice.is_finished or choice.stopped_by_text:
                self._links.cancel(place.decode.peer, place.sequence_id, reason)

    def _worker_failed(self, choice: Choice, error: PolymuxError) -> None:
        """A worker gave a sequence up. What another worker may still do is tried there; the rest is the client's to know."""
        place = self._places.get(choice.index)
        if place is not None and isinstance(error, TransferError | WorkerLost) and error.retryable:
            self._excluded.add(place.prefill.peer.worker_id)  # the decode worker lives: it has just said so
            self._move(choice, error.message)
        elif isinstance(error, NoFreeBlocks):
            self.fail(Overloaded(error.message, retry_after_s=error.retry_after_s or 1.0))
        else:
            self.fail(error)

    # -- places -------------------------------------------------------------------------------------------------------

    def _move_lost(self) -> None:
        """Move every choice that a lost worker owes tokens: as its decode worker, or as a prefill worker whose token is missing."""
        for choice in self.choices:
            place = self._places.get(choice.index)
            if place is None or choice.is_finished:
                continue
            is_first_missing = choice.has_gap or len(choice.output_ids) == place.num_before
            if place.decode in self._lost or (place.prefill in self._lost and is_first_missing):
                self._move(choice, "its worker was lost")

    def _move(self, choice: Choice, reason: str) -> None:
        log.info("request.replay request=%s choice=%d reason=%s", self.generation.envelope.request_id, choice.index, reason)
        self._choice_of.pop(self._places[choice.index].sequence_id)
        self._retire(choice, "moved to another worker")
        choice.restart()
        self._metrics.replayed(self.generation.model)
        self._unplaced.add(choice.index)
        if self._placer is None or self._placer.done():
            self._placer = self._loop.create_task(self._place(None))

    async def _place(self, placement: Placement | None) -> None:
        """Send every unplaced sequence to workers; those that cannot be reached are asked to be replaced. Ends in `fail` at the latest."""
        try:
            while self._unplaced and self.error is None:
                placement = placement or await self._admit_again()
                known = frozenset(self._excluded)
                for index in sorted(self._unplaced):
                    prefill, decode = placement.prefill[index], placement.decode[index]
                    if not {prefill.worker_id, decode.worker_id} & (self._excluded - known):  # lost a moment ago, by its neighbours
                        await self._send(self.choices[index], prefill, decode, placement)
                placement = None
        except WireError as error:
            self.fail(RequestTooLarge(f"the prompt is too long to be sent to a worker: {error.message}"))
        except PolymuxError as error:
            self.fail(error)
        except Exception:
            log.exception("request.place_failed request=%s", self.generation.envelope.request_id)
            self.fail(PolymuxError("internal error while finding workers"))

    async def _send(self, choice: Choice, prefill: Peer, decode: Peer, placement: Placement) -> None:
        """Start one sequence, or its rest. A worker that cannot be reached is excluded, and the sequence stays unplaced."""
        number = self._num_attempts[choice.index]
        if number > self._settings.max_replays:
            raise WorkerLost(f"the request lost its workers {number} times; try again", retry_after_s=1.0)
        self._num_attempts[choice.index] += 1
        links = [await self._open(peer) for peer in (prefill, decode)]
        if links[0] is None or links[1] is None or self.error is not None:
            return
        suffix = f".{number}" if number else ""  # a late frame of an earlier attempt must not be taken for this one's
        sequence_id = SequenceId(f"{self.generation.envelope.request_id}/{choice.index}{suffix}")
        self._unplaced.discard(choice.index)
        self._places[choice.index] = _Place(sequence_id, links[0], links[1], len(choice.output_ids))
        self._choice_of[sequence_id] = choice
        self._links.listen(sequence_id, self)
        command = Generate(
            sequence_id=sequence_id,
            model=self.generation.model,
            prompt_ids=choice.plan.prompt_ids,
            output_ids=pack_ids(choice.output_ids),
            sampling=choice.plan.sampling,
            prefill=prefill,
            deadline_s=self._remaining_s(),
            ttft_slo_s=placement.ttft_slo_s,
            tpot_slo_s=placement.tpot_slo_s,
        )
        with suppress(PeerLost):  # its loss is told to all who use the link
            await links[1].send(command)
        if self._lost:
            self._wake()  # one of the two may have been lost before it had this place

    async def _open(self, peer: Peer) -> WorkerLink | None:
        try:
            return await self._links.open(peer, self, min(self._settings.connect_timeout_s, self._remaining_s()))
        except PeerLost as error:
            log.info("request.unreachable request=%s worker=%s reason=%s", self.generation.envelope.request_id, peer.worker_id, error)
            self._excluded.add(peer.worker_id)
            return None

    async def _admit_again(self) -> Placement:
        """The same request with its lost workers excluded; while none can be had, wait a little for one to come back."""
        assert self._ask is not None
        refusal: PolymuxError | None = None
        for pause_s in READMIT_PAUSES_S:
            ask = replace(self._ask, deadline_s=self._remaining_s(), excluded=tuple(sorted(self._excluded)))
            try:
                return await self._admission.admit(ask, self._remaining_s())
            except Refused as error:
                refusal = error
                self._excluded.clear()  # a worker that was restarted under its old name is as good as another
                await asyncio.sleep(pause_s)
        raise WorkerLost(f"no worker could take the request over: {refusal}; try again", retry_after_s=1.0)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _remaining_s(self) -> float:
        return max(self._deadline_s - self._loop.time(), 0.001)

    def _release(self, outcome: str) -> Release:
        return Release(
            request_id=self.generation.envelope.request_id,
            outcome=outcome,
            num_output_tokens=self.num_output_tokens,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
        )

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first, over all choices."""
        seconds, count = 0.0, 0
        for choice in self.choices:
            if choice.first_token_s is not None and choice.last_token_s is not None and len(choice.output_ids) > 1:
                seconds += choice.last_token_s - choice.first_token_s
                count += len(choice.output_ids) - 1
        return seconds / count if count else None
