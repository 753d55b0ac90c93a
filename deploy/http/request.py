"""One request under way: its tokens gathered, its end seen to, its place in the controller's books given back once.

Everything that can happen to it (updates, lost workers, its deadline, its client leaving) is left in one place and wakes one task:
the one that asks for news. Between two wake-ups news pile up, so a client that reads slowly gets fewer and longer deltas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from polymux.deploy.http.choice import Choice, Delta
from polymux.deploy.http.generation import Generation
from polymux.deploy.http.links import Links
from polymux.deploy.http.placer import Admission, Placer
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.deploy.metrics import Metrics
from polymux.transport.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    NoFreeBlocks,
    Overloaded,
    PolymuxError,
    TransferError,
    WorkerLost,
    error_from_name,
)
from polymux.transport.link import WorkerLink
from polymux.transport.messages import ErrorReport, Release, SequenceUpdate


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
        self.error: PolymuxError | None = None  # what ended it, if it did not finish
        self.ttft_s: float | None = None
        self._max_pending = settings.max_pending_updates
        self._links = links
        self._admission = admission
        self._metrics = metrics
        self._gaps = metrics.gaps(generation.model)
        self._loop = asyncio.get_running_loop()
        self._arrived_s = self._loop.time()
        deadline_s = self._arrived_s + generation.envelope.timeout_s
        self._timer = self._loop.call_at(deadline_s, self._expire)
        self._placer = Placer(
            generation, self.choices, self, settings=settings, links=links, admission=admission, deadline_s=deadline_s, fail=self.fail
        )
        self._num_open = len(self.choices)
        self._updates: list[SequenceUpdate] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_stirred = False  # there is something to do beside updates
        self._is_poked = False
        self._is_closed = False
        metrics.arrived(generation.model, generation.num_prompt_tokens)

    # -- for the task that serves the client --------------------------------------------------------------------------

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.output_ids) for choice in self.choices)

    @property
    def is_admitted(self) -> bool:
        return self._placer.is_admitted

    @property
    def is_finished(self) -> bool:
        return self._num_open == 0

    async def start(self) -> None:
        """Be admitted; workers are found meanwhile. Raises what the controller refuses with."""
        await self._placer.start()

    async def news(self) -> list[Delta]:
        """Wait for what is new, empty after a `poke`; ask until `is_finished`. Raises the error that ended the request."""
        while True:
            if self._updates or self._is_stirred:
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
        self._stir()

    def fail(self, error: PolymuxError) -> None:
        """End it with this error, at the workers at once; the first one counts."""
        if self.error is None and not self._is_closed:
            self.error = error
            self._placer.close(error.message)
            self._stir()

    def close(self, outcome: str) -> None:
        """Stop whatever still runs for it and give back its place in the controller's books. Once, without waiting."""
        assert not self._is_closed, "a request is closed once"
        self._is_closed = True
        self._timer.cancel()
        self._placer.close(outcome)
        self._links.leave(self)
        if self._placer.has_asked:
            self._admission.release(self._release(outcome))
        self._metrics.replayed(self.generation.model, self._placer.num_replays)
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
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        elif len(self._updates) > self._max_pending:
            self.fail(Cancelled("the client reads too slowly"))

    def link_lost(self, link: WorkerLink) -> None:
        """Choices that this worker still owed tokens go elsewhere."""
        self._placer.lost(link)
        self._stir()

    def _expire(self) -> None:
        self.fail(DeadlineExceeded(f"the request was not finished within {self.generation.envelope.timeout_s:g} s"))

    def _stir(self) -> None:
        self._is_stirred = True
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _drain(self) -> list[Delta]:
        """Take every update in; what clients may now see, one delta a choice."""
        updates, self._updates = self._updates, []
        self._is_stirred = False
        running = self._placer.running
        now_s = self._loop.time()
        touched: dict[int, Choice] = {}
        for update in updates:
            choice = running.get(update.sequence_id)
            if choice is None or choice.finish_reason is not None:
                continue
            if update.error is not None:
                self._worker_failed(choice, update.error)
                continue
            if update.moved:
                self._placer.given_up(choice, update.index)
                continue
            touched[choice.index] = choice
            last_s = choice.last_token_s
            count = choice.accept(update, now_s)
            if count:
                if last_s is not None:
                    self._gaps.observe((now_s - last_s) / count, count)
                elif self.ttft_s is None:
                    self._first_token(now_s)
            if choice.finish_reason is not None:
                self._finished(choice)
        self._placer.settle()
        return [delta for choice in touched.values() if (delta := choice.take()) is not None]

    def _first_token(self, now_s: float) -> None:
        self.ttft_s = now_s - self._arrived_s
        self._metrics.first_token(self.generation.model, self.ttft_s)

    def _finished(self, choice: Choice) -> None:
        self._num_open -= 1
        self._placer.retire(choice, "stop string")
        self._metrics.finished(self.generation.model, str(choice.finish_reason))

    def _worker_failed(self, choice: Choice, report: ErrorReport) -> None:
        """A worker gave a sequence up. What another worker may still do is tried there; the rest is the client's to know."""
        error = error_from_name(report.name, report.message, retry_after_s=report.retry_after_s)
        if isinstance(error, TransferError | WorkerLost) and error.retryable:
            self._placer.retry(choice, error)
        elif isinstance(error, Draining):
            self._placer.leave(choice, error)
        elif isinstance(error, NoFreeBlocks):
            self.fail(Overloaded(error.message, retry_after_s=error.retry_after_s or 1.0))
        else:
            self.fail(error)

    # -- ends ---------------------------------------------------------------------------------------------------------

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
