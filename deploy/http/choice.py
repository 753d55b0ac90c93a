"""One sequence on the client's side: updates put in order, tokens made text, stop strings found, logprobs kept beside their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polymux.actors.detokenizer import Detokenizer
from polymux.actors.stop_strings import StopMatcher
from polymux.deploy.http.generation import SequencePlan
from polymux.transport.messages import FinishReason, SequenceUpdate, TokenLogprobs


@dataclass(frozen=True, slots=True)
class OffsetLogprobs:
    """A token's logprobs and where its text begins in the output, in characters."""

    offset: int
    token: TokenLogprobs


@dataclass(slots=True, eq=False)
class Delta:
    """What is new of one choice."""

    choice: int
    text: str
    logprobs: tuple[OffsetLogprobs, ...]
    finish_reason: FinishReason | None


class Choice:
    """`accept` takes a worker's update; `take` gives what a client may now see. Updates may come early, twice, and from two workers."""

    def __init__(self, index: int, plan: SequencePlan, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self.index = index
        self.plan = plan
        self.output_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stopped_by_text = False  # a stop string ended it: the worker does not know yet
        self.num_cached_tokens = 0  # of the prompt, found in a prefix cache
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._early: dict[int, SequenceUpdate] = {}
        self._ready = ""  # decided, and not yet taken
        self._num_ready = 0  # characters decided so far
        self._logprobs: list[OffsetLogprobs] = []  # of tokens whose text is not yet taken

    @property
    def has_gap(self) -> bool:
        """Later tokens are here while earlier ones are not."""
        return bool(self._early)

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def accept(self, update: SequenceUpdate, now_s: float) -> int:
        """The number of tokens that came into place."""
        if self.finish_reason is not None:
            return 0
        before = len(self.output_ids)
        if update.index > before:
            self._early[update.index] = update
            return 0
        self._advance(update)
        while self._early and self.finish_reason is None and (index := min(self._early)) <= len(self.output_ids):
            self._advance(self._early.pop(index))
        count = len(self.output_ids) - before
        if count:
            self.last_token_s = now_s
            if self.first_token_s is None:
                self.first_token_s = now_s
        return count

    def restart(self) -> None:
        """Another worker goes on after `output_ids`: forget what the lost one sent out of order."""
        self._early.clear()

    def take(self) -> Delta | None:
        """What is new since the last call, if anything is."""
        text, self._ready = self._ready, ""
        finish_reason = self.finish_reason
        logprobs: tuple[OffsetLogprobs, ...] = ()
        if self._logprobs:
            shown = [one for one in self._logprobs if one.offset < self._num_ready]
            logprobs, self._logprobs = tuple(shown), self._logprobs[len(shown) :]
        if text or logprobs or finish_reason is not None:
            return Delta(self.index, text, logprobs, finish_reason)
        return None

    def _advance(self, update: SequenceUpdate) -> None:
        """Take an update that begins at or before the next token; tokens already here are skipped."""
        skip = len(self.output_ids) - update.index
        token_ids = update.token_ids[skip:] if skip else update.token_ids
        logprobs = update.logprobs[skip:] if skip else update.logprobs
        if update.cached_tokens:
            self.num_cached_tokens = update.cached_tokens
        last = len(token_ids) - 1
        for i, token_id in enumerate(token_ids):
            if logprobs:
                self._logprobs.append(OffsetLogprobs(self._detokenizer.text_len, logprobs[i]))
            self.output_ids.append(token_id)
            if i < last or update.finish_reason is not FinishReason.STOP:  # the token that stops is no part of the text
                self._show(self._detokenizer.push(token_id))
            if self.finish_reason is not None:
                return
        if update.finish_reason is not None:
            self._finish(update.finish_reason)

    def _show(self, text: str) -> None:
        """Decide how much of the text so far may be seen."""
        matcher = self._matcher
        if matcher is not None and len(self.output_ids) > self.plan.sampling.min_tokens:
            text = matcher.push(text)
            if matcher.matched is not None:
                self.finish_reason = FinishReason.STOP
                self.stopped_by_text = True
        self._ready += text
        self._num_ready += len(text)

    def _finish(self, reason: FinishReason) -> None:
        """The worker has made its last token."""
        self._show(self._detokenizer.finish())
        if self._matcher is not None and not self.stopped_by_text:
            rest = self._matcher.flush()
            self._ready += rest
            self._num_ready += len(rest)
        self.finish_reason = FinishReason.STOP if self.stopped_by_text else reason
