"""Where the sequences of one request run: sent to their workers, sent again elsewhere when those are lost, taken back when they end.

A sequence changes its worker in two ways. A replay computes prompt and outputs again, because a worker was lost. A move is asked for by the
worker itself, which keeps the KV for the next one (`Generate.handover`); should that fail, the next one computes it, and no client notices.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from polymux.deploy.http.choice import Choice
from polymux.deploy.http.generation import Generation
from polymux.deploy.http.links import Links, Listener
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.transport.errors import PeerLost, PolymuxError, Refused, RequestTooLarge, WireError, WorkerLost
from polymux.transport.link import WorkerLink
from polymux.transport.messages import Admit, Generate, Peer, Placement, Release
from polymux.transport.units import SequenceId, WorkerId, pack_ids

log = logging.getLogger("polymux.frontdoor")

READMIT_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)  # after each vain round; a worker restarts in a few seconds


class Admission(Protocol):
    """The controller as a request needs it; both calls are bounded in time."""

    async def admit(self, ask: Admit, timeout_s: float) -> Placement: ...

    def release(self, release: Release) -> None: ...


@dataclass(slots=True)
class _Place:
    """Where a sequence runs now. `num_before`: tokens that were out when it began there; its first one comes from the prefill worker."""

    sequence_id: SequenceId
    prefill: WorkerLink | None  # None: the KV was handed over
    decode: WorkerLink
    num_before: int
    origin: _Kept | None = None  # where it was handed over from
    given_up_after: int | None = None  # tokens: the worker wants it to go on elsewhere


@dataclass(frozen=True, slots=True)
class _Kept:
    """A sequence that its worker gave up and keeps the KV of, for a moment."""

    sequence_id: SequenceId
    peer: Peer


class Placer:
    """Of one request, `listener`. What cannot be placed ends in a call of `fail`. `running` has the choices that workers owe tokens."""

    def __init__(
        self,
        generation: Generation,
        choices: Sequence[Choice],
        listener: Listener,
        *,
        settings: FrontDoorSettings,
        links: Links,
        admission: Admission,
        deadline_s: float,
        fail: Callable[[PolymuxError], None],
    ) -> None:
        self.running: dict[SequenceId, Choice] = {}
        self.num_replays = 0
        self.has_asked = False
        self.is_admitted = False
        self._generation = generation
        self._choices = choices
        self._listener = listener
        self._settings = settings
        self._links = links
        self._admission = admission
        self._loop = asyncio.get_running_loop()
        self._deadline_s = deadline_s
        self._arrived_s = deadline_s - generation.envelope.timeout_s
        self._fail = fail
        self._ask = self._make_ask()
        self._places: dict[int, _Place] = {}
        self._unplaced = set(range(len(choices)))
        self._kept: dict[int, _Kept] = {}  # of the unplaced, those that move
        self._num_sent = [0] * len(choices)
        self._num_replays = [0] * len(choices)
        self._excluded: set[WorkerId] = set()
        self._lost: set[WorkerLink] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Be admitted, then find workers in the background. Raises what the controller refuses with."""
        self.has_asked = True
        placement = await self._admission.admit(self._ask, self._remaining_s())
        self.is_admitted = True
        if not self._is_closed:
            self._task = self._loop.create_task(self._place(placement))

    def close(self, reason: str) -> None:
        """Place nothing more, and free what runs. May be called twice."""
        self._is_closed = True
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        for choice in self._choices:
            self.retire(choice, reason)

    def retire(self, choice: Choice, reason: str) -> None:
        """Free it at its worker, unless the worker itself said that it was the end."""
        place = self._places.pop(choice.index, None)
        kept = self._kept.pop(choice.index, None)
        if place is not None:
            self._links.ignore(place.sequence_id)
            if not choice.is_finished or choice.stopped_by_text:
                self._links.cancel(place.decode.peer, place.sequence_id, reason)
            if len(choice.output_ids) == place.num_before:  # it may not have been taken over yet
                kept = place.origin
        if kept is not None:
            self._links.cancel(kept.peer, kept.sequence_id, reason)

    def lost(self, link: WorkerLink) -> None:
        self._lost.add(link)
        self._excluded.add(link.peer.worker_id)

    def given_up(self, choice: Choice, num_tokens: int) -> None:
        """Its decode worker made that many tokens, keeps their KV, and wants it to go on elsewhere."""
        place = self._places.get(choice.index)
        if place is not None:
            place.given_up_after = num_tokens

    def settle(self) -> None:
        """After updates and losses: move what was given up once its tokens are all here, replay what a lost worker owes tokens.

        That is, as its decode worker, or as a prefill worker whose token is missing.
        """
        if self._is_closed:
            return
        for choice in self._choices:
            place = self._places.get(choice.index)
            if place is None or choice.is_finished:
                continue
            is_first_missing = choice.has_gap or len(choice.output_ids) == place.num_before
            if place.decode in self._lost or (place.prefill in self._lost and is_first_missing):
                self._replay(choice, "its worker was lost")
            elif place.given_up_after is not None and len(choice.output_ids) >= place.given_up_after:
                self._move(choice, place)

    def retry(self, choice: Choice, error: PolymuxError) -> None:
        """Its decode worker gave it up, and lives: it said so. The fault may be the prefill worker's or the way's between the two."""
        place = self._places.get(choice.index)
        if place is not None and not self._is_closed:
            self._excluded.add((place.prefill or place.decode).peer.worker_id)
            self._replay(choice, error.message)

    def leave(self, choice: Choice, error: PolymuxError) -> None:
        """Its decode worker had not begun with it, and sends it elsewhere."""
        place = self._places.get(choice.index)
        if place is not None and not self._is_closed:
            self._excluded.add(place.decode.peer.worker_id)
            self._take_back(choice, error.message)

    def _replay(self, choice: Choice, reason: str) -> None:
        log.info("request.replay request=%s choice=%d reason=%s", self._ask.request_id, choice.index, reason)
        self.num_replays += 1
        self._num_replays[choice.index] += 1
        self._take_back(choice, "moved to another worker")

    def _move(self, choice: Choice, place: _Place) -> None:
        log.info("request.move request=%s choice=%d worker=%s", self._ask.request_id, choice.index, place.decode.peer.worker_id)
        del self._places[choice.index]
        self._links.ignore(place.sequence_id)
        self._kept[choice.index] = _Kept(place.sequence_id, place.decode.peer)
        self._place_anew(choice, place)

    def _take_back(self, choice: Choice, reason: str) -> None:
        place = self._places[choice.index]
        self.retire(choice, reason)
        self._place_anew(choice, place)

    def _place_anew(self, choice: Choice, place: _Place) -> None:
        self.running.pop(place.sequence_id)
        choice.restart()
        self._unplaced.add(choice.index)
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._place(None))

    async def _place(self, placement: Placement | None) -> None:
        """Send every unplaced sequence to workers. Where that fails, ask for others; while none can be had, wait for one to come back."""
        try:
            for pause_s in READMIT_PAUSES_S:
                placement = placement or await self._admit_again()
                if placement is not None:
                    await self._send_all(placement)
                    placement = None
                if not self._unplaced or self._is_closed:
                    return
                await asyncio.sleep(pause_s)
            self._fail(WorkerLost("no worker could take the request over; try again", retry_after_s=1.0))
        except WireError as error:
            self._fail(RequestTooLarge(f"the prompt is too long to be sent to a worker: {error.message}"))
        except PolymuxError as error:
            self._fail(error)
        except Exception:
            log.exception("request.place_failed request=%s", self._ask.request_id)
            self._fail(PolymuxError("internal error while finding workers"))

    async def _admit_again(self) -> Placement | None:
        """The same request with its lost workers excluded; None while it is refused."""
        excluded, moving = tuple(sorted(self._excluded)), tuple(sorted(self._kept))
        staying = tuple(sorted(set(range(len(self._choices))) - self._unplaced))  # a prefill worker may go when its part is done
        ask = replace(self._ask, deadline_s=self._remaining_s(), excluded=excluded, moving=moving, staying=staying)
        try:
            return await self._admission.admit(ask, self._remaining_s())
        except Refused as error:
            log.info("request.not_placed request=%s reason=%s", self._ask.request_id, error.message)
            self._excluded.clear()  # a worker that was restarted under its old name is as good as another
            return None

    async def _send_all(self, placement: Placement) -> None:
        known = frozenset(self._excluded)
        for index in sorted(self._unplaced):
            if self._is_closed:
                return
            kept = self._kept.get(index)
            prefill, decode = kept.peer if kept else placement.prefill[index], placement.decode[index]
            if not {prefill.worker_id, decode.worker_id} & (self._excluded - known):  # lost a moment ago, by its neighbours
                await self._send(self._choices[index], prefill, decode, placement)

    async def _send(self, choice: Choice, prefill: Peer, decode: Peer, placement: Placement) -> None:
        """Start one sequence, or its rest. A worker that cannot be reached is excluded, and the sequence stays unplaced."""
        source = None if choice.index in self._kept else await self._open(prefill)  # to whom we have nothing to say at a move
        target = await self._open(decode)
        kept = self._kept.get(choice.index)
        if target is None or (source is None and kept is None) or self._is_closed:
            return
        number, num_replays = self._num_sent[choice.index], self._num_replays[choice.index]
        if num_replays > self._settings.max_replays:
            raise WorkerLost(f"the request lost its workers {num_replays} times; try again", retry_after_s=1.0)
        self._num_sent[choice.index] += 1
        suffix = f".{number}" if number else ""  # a late frame of an earlier attempt must not be taken for this one's
        sequence_id = SequenceId(f"{self._ask.request_id}/{choice.index}{suffix}")
        self._unplaced.discard(choice.index)
        self._kept.pop(choice.index, None)
        self._places[choice.index] = _Place(sequence_id, source, target, len(choice.output_ids), origin=kept)
        self.running[sequence_id] = choice
        self._links.listen(sequence_id, self._listener)
        with suppress(PeerLost):  # the loss is told to all who use the link
            await target.send(self._command(choice, sequence_id, prefill, placement, kept))
        for link in (source, target):
            if link is not None and link in self._lost:  # before they had this place
                self._listener.link_lost(link)

    def _command(self, choice: Choice, sequence_id: SequenceId, prefill: Peer, placement: Placement, kept: _Kept | None) -> Generate:
        return Generate(
            sequence_id=sequence_id,
            model=self._generation.model,
            prompt_ids=choice.plan.prompt_ids,
            output_ids=pack_ids(choice.output_ids),
            sampling=choice.plan.sampling,
            prefill=prefill,
            deadline_s=self._remaining_s(),
            tpot_slo_s=placement.tpot_slo_s,
            cache_salt=self._generation.cache_salt,
            due_in_s=placement.ttft_slo_s - (self._loop.time() - self._arrived_s),
            handover=kept.sequence_id if kept else None,
        )

    async def _open(self, peer: Peer) -> WorkerLink | None:
        try:
            return await self._links.open(peer, self._listener, min(self._settings.connect_timeout_s, self._remaining_s()))
        except PeerLost as error:
            log.info("request.unreachable request=%s worker=%s reason=%s", self._ask.request_id, peer.worker_id, error)
            self._excluded.add(peer.worker_id)
            return None

    def _make_ask(self) -> Admit:
        envelope, sequences = self._generation.envelope, self._generation.sequences
        return Admit(
            request_id=envelope.request_id,
            client_id=self._settings.client_id,
            model=self._generation.model,
            num_prompt_tokens=max(one.num_prompt_tokens for one in sequences),
            max_tokens=max(one.sampling.max_tokens for one in sequences),
            num_sequences=len(sequences),
            deadline_s=self._remaining_s(),
            ttft_slo_s=envelope.ttft_slo_s,
            tpot_slo_s=envelope.tpot_slo_s,
            tenant=envelope.tenant,
            prefix_hashes=self._generation.prefix_hashes,
        )

    def _remaining_s(self) -> float:
        return max(self._deadline_s - self._loop.time(), 0.001)
