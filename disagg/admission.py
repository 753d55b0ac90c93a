"""May a request come in? Accept it, let it queue, or refuse it with an error that says what would help."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from polymux.disagg.views import DoorView
from polymux.transport.errors import ConfigError, ContextLengthExceeded, ModelLoading, Overloaded, PolymuxError
from polymux.transport.messages import KVLayout

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0


class Verdict(enum.StrEnum):
    ACCEPT = "accept"  # its prefill starts at once
    QUEUE = "queue"  # it waits behind others, within its SLO as predicted or at the limit that was configured
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    verdict: Verdict
    error: PolymuxError | None = None  # with REFUSE


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """`ttft_refusal_factor`: how many times its SLO a request's predicted TTFT may be while others wait; None: only the deadline counts."""

    max_queued_requests: int = 512
    max_queued_tokens: int = 262_144
    max_inflight_requests: int = 4096
    ttft_refusal_factor: float | None = 4.0

    def __post_init__(self) -> None:
        for name in ("max_queued_requests", "max_queued_tokens", "max_inflight_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} would refuse everything; give at least 1", param=name)
        if self.ttft_refusal_factor is not None and not self.ttft_refusal_factor > 0:
            raise ConfigError(
                f"ttft_refusal_factor={self.ttft_refusal_factor} must be above 0; None turns it off", param="ttft_refusal_factor"
            )


def decide(door: DoorView, limits: AdmissionLimits) -> Admission:
    """What can never fit is the client's error (400); what does not fit now is refused with the seconds after which it may (503).

    An idle pool accepts whatever its predictions say: a wrong guess of the costs is corrected by running, never by refusing.
    """
    error = _never_fits(door) or _too_much(door, limits)
    if error is None and not door.is_idle:
        error = _too_late(door, limits)
    if error is not None:
        return Admission(verdict=Verdict.REFUSE, error=error)
    return Admission(verdict=Verdict.ACCEPT if door.is_idle else Verdict.QUEUE)


def max_kv_tokens(arena_bytes: int, weight_bytes: int, kv: KVLayout) -> int:
    """Tokens that one sequence could have in an arena that holds this model alone; 0 when not even its weights fit."""
    return max(0, (arena_bytes - weight_bytes) // kv.block_bytes) * kv.block_size


def _never_fits(door: DoorView) -> PolymuxError | None:
    limit = min(door.max_model_len, door.max_kv_tokens)
    if door.num_total_tokens <= limit:
        return None
    wanted = f"{door.num_prompt_tokens} in the prompt and {door.num_total_tokens - door.num_prompt_tokens} to generate"
    return ContextLengthExceeded(
        f"this model's maximum context length is {limit} tokens, and {door.num_total_tokens} were asked for ({wanted}); "
        "shorten the prompt or lower max_tokens",
        param="max_tokens" if door.num_prompt_tokens < limit else "prompt",
    )


def _too_much(door: DoorView, limits: AdmissionLimits) -> PolymuxError | None:
    queued = door.num_queued + door.num_sequences
    tokens = door.num_queued_tokens + door.num_sequences * door.num_prompt_tokens
    if door.num_inflight + 1 > limits.max_inflight_requests:
        reason = f"{door.num_inflight} requests are in flight, limits.max_inflight_requests={limits.max_inflight_requests}"
    elif door.num_queued and queued > limits.max_queued_requests:
        reason = f"{door.num_queued} sequences wait, limits.max_queued_requests={limits.max_queued_requests}"
    elif door.num_queued and tokens > limits.max_queued_tokens:
        reason = f"{door.num_queued_tokens} prompt tokens wait, limits.max_queued_tokens={limits.max_queued_tokens}"
    elif door.num_queued and door.free_kv_bytes is not None and door.kv_bytes > door.free_kv_bytes:
        reason = f"others wait, and the prompt's KV of {door.kv_bytes} bytes fits neither arena nor host tier of any worker now"
    else:
        return None
    return Overloaded(f"too much is queued: {reason}; retry later", retry_after_s=_retry_s(door.ttft_s))


def _too_late(door: DoorView, limits: AdmissionLimits) -> PolymuxError | None:
    allowed_s = door.deadline_s
    if limits.ttft_refusal_factor is not None:
        allowed_s = min(allowed_s, limits.ttft_refusal_factor * door.ttft_slo_s)
    if door.ttft_s <= allowed_s:
        return None
    retry_s = _retry_s(door.ttft_s - allowed_s)
    text = f"the first token would come after {door.ttft_s:.1f} s, and {allowed_s:.1f} s are allowed; retry later"
    if door.ttft_s - door.switch_s <= allowed_s:
        return ModelLoading(f"the model must be loaded first: {text}", retry_after_s=retry_s)
    return Overloaded(text, retry_after_s=retry_s)


def _retry_s(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
