"""What workers tell a client of a sequence: tokens with their logprobs, its end, or its error."""

from __future__ import annotations

from polymux.actors.sampler import SampledToken
from polymux.transport.errors import PolymuxError
from polymux.transport.messages import ErrorReport, FinishReason, SequenceUpdate, TokenLogprobs
from polymux.transport.units import SequenceId


def token_update(
    sequence_id: SequenceId, index: int, token: SampledToken, reason: FinishReason | None, *, cached_tokens: int = 0
) -> SequenceUpdate:
    """One new token at place `index` of the output."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    if token.logprob is not None:
        logprobs = (TokenLogprobs(token_id=token.token_id, logprob=token.logprob, top=token.top),)
    return SequenceUpdate(
        sequence_id=sequence_id,
        index=index,
        token_ids=(token.token_id,),
        logprobs=logprobs,
        finish_reason=reason,
        cached_tokens=cached_tokens,
    )


def error_report(error: PolymuxError) -> ErrorReport:
    return ErrorReport(name=type(error).__name__, message=error.message, param=error.param, retry_after_s=error.retry_after_s)


def moved(sequence_id: SequenceId, index: int) -> SequenceUpdate:
    """The last update of a sequence that is given up after `index` tokens, its KV kept."""
    return SequenceUpdate(sequence_id=sequence_id, index=index, token_ids=(), moved=True)


def failure(sequence_id: SequenceId, index: int, error: PolymuxError) -> SequenceUpdate:
    """The last update of a sequence that failed after `index` tokens."""
    return SequenceUpdate(sequence_id=sequence_id, index=index, token_ids=(), error=error_report(error))
