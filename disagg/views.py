"""What policies see: frozen snapshots of one worker's or the whole pool's state.

Whoever asks a policy builds these and hands them over; a policy never follows a reference back into live state.
Times ending in `_at_s` are on the asker's own monotonic clock. Mappings in a view are read, never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from polymux.transport.messages import Role
from polymux.transport.units import BLOCK_SIZE, ModelName, SequenceId, WorkerId

# ---------------------------------------------------------------- decode worker


class Due(NamedTuple):
    """When a sequence's next token is due, and how long after it each further one is. A tuple: there is one for every sequence."""

    at_s: float
    every_s: float
    is_kept: bool = True  # every token so far was on time
    is_prompt: bool = False  # its prompt is computed first


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """One model's sequences on a worker that could take a step now: those that decode, and prompts that wait for their prefill."""

    model: ModelName
    num_seqs: int
    kv_tokens: int
    step_s: float  # predicted seconds of one decode step of this batch, its prompts computed
    tpot_slo_s: float  # the tightest of its sequences
    switch_s: float  # predicted seconds until its first step could start; 0 when its weights are resident
    prefill_s: float = 0.0  # predicted seconds that its prompts take before they decode with the others
    dues: tuple[Due, ...] = ()  # one for each sequence, any order


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView:
    """Whose turn could it be? `batches` holds only models with a sequence that can step; the order has no meaning."""

    now_s: float
    active: ModelName | None  # the model bound to the skeleton
    batches: tuple[BatchView, ...]
    load_drag: float = 0.0  # by how much more a step takes while weights are loaded beside it
    can_prefetch: bool = True  # there is room for weights beside the active model's, so they can be loaded while it computes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningView:
    """A sequence whose KV is committed on this worker."""

    sequence_id: SequenceId
    order: int  # its place in the worker's line: smaller is older, unique, kept when preempted
    context_len: int  # tokens in the cache; the next step writes slot `context_len`
    num_blocks: int  # blocks it holds


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingView:
    """A sequence that waits on a decode worker for blocks to be granted."""

    sequence_id: SequenceId
    model: ModelName
    order: int
    num_blocks: int  # to grant now: prompt, outputs so far and the next token


@dataclass(frozen=True, slots=True, kw_only=True)
class HolderView:
    """A sequence of any model that holds KV bytes which another model may need."""

    sequence_id: SequenceId
    model: ModelName
    order: int
    kv_bytes: int


# ---------------------------------------------------------------- prefill worker


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """A prompt that waits or is under way on a prefill worker."""

    sequence_id: SequenceId
    model: ModelName
    order: int
    num_tokens: int  # prompt and, for a replay, outputs
    num_done: int  # of them, already in the cache
    due_at_s: float = inf  # when its token is due
    tpot_slo_s: float = inf
    prefill_s: float = 0.0  # predicted seconds that its rest takes
    switch_s: float = 0.0  # predicted seconds until its model could step; 0 when its weights are resident


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillView:
    now_s: float
    active: ModelName | None
    prompts: tuple[PromptView, ...]  # any order
    max_num_batched_tokens: int  # token budget of one step


# ---------------------------------------------------------------- a worker with both kinds of work


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkView:
    """One kind of work of a worker: what its policy would run next."""

    due_at_s: float  # when the first of its tokens that can still be on time is due; infinity when none can
    step_s: float  # predicted seconds of its next step
    switch_s: float  # predicted seconds until that step could start; 0 when its model is resident
    num_tokens: int  # that the step makes
    num_passed_over: int  # steps that the other kind has had since its last one


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseView:
    """Prefill or decode? None: there is no such work."""

    now_s: float
    prefill: WorkView | None
    decode: WorkView | None


# ---------------------------------------------------------------- arena


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentView:
    """One model's weights in an arena."""

    model: ModelName
    offset: int
    nbytes: int
    reload_s: float  # predicted seconds to bring it back
    reuse_chance: float  # in [0, 1], `eviction.Popularity.chance`
    has_work: bool  # sequences of it wait or run here
    is_locked: bool  # active, loading or pinned: never leaves
    is_fixed: bool = False  # being written to: never moves
    turns_ahead: int = 0  # of models with work, how many have their turn before it


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedView:
    """Bytes kept because they may save work: one holder's cached KV, or one resident that may leave."""

    holder: str  # unique among those compared
    nbytes: int
    value: float  # expected seconds saved, a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaView:
    """The part of an arena that weights may use: bytes [start, end), `end` being where KV slabs begin."""

    start: int
    end: int
    residents: tuple[ResidentView, ...]  # any order, disjoint, inside [start, end)


# ---------------------------------------------------------------- the pool, as the controller sees it


@dataclass(frozen=True, slots=True, kw_only=True)
class AskView:
    """One sequence to be placed."""

    model: ModelName
    num_prompt_tokens: int
    num_output_tokens: int  # expected, at most max_tokens
    tpot_slo_s: float
    kv_bytes: int  # of prompt and expected output
    weight_bytes: int
    excluded: frozenset[WorkerId] = frozenset()
    prefix_marks: tuple[int, ...] = ()  # of the prompt's blocks in order, as `PrefillWorkerView.cached` has them
    block_size: int = BLOCK_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWorkerView:
    """A prefill worker: what it has promised, and what a prompt of each model costs on it. Every registered model has a cost."""

    worker_id: WorkerId
    busy_until_s: float  # when it would have finished all that it was given; may be past
    waiting: Mapping[ModelName, int]  # sequences, models with none left out
    resident: frozenset[ModelName]
    costs: Mapping[ModelName, tuple[float, float, float]]  # seconds: 1, tokens, tokens^2
    switch_bytes_per_s: float
    cached: tuple[frozenset[int], ...] = ()  # marks of prefixes that it has, or will have when it comes to this prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeModelView:
    """One model's work on a decode worker; only models with some have one."""

    num_seqs: int  # running and waiting
    kv_tokens: int
    tpot_slo_s: float  # the tightest
    step_s: float  # predicted, of the whole batch


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWorkerView:
    """A decode worker. Every registered model has a cost; `models` are those with work here."""

    worker_id: WorkerId
    models: Mapping[ModelName, DecodeModelView]
    resident: frozenset[ModelName]
    costs: Mapping[ModelName, tuple[float, float, float]]  # seconds of a step: 1, sequences, kv tokens
    load: float  # sum over `models` of step time / TPOT: the share of its time that its SLOs need, without switches
    round_switch_s: float  # of the models with work that are not resident
    min_steps: float  # smallest TPOT / step time over `models`; infinity when there is none
    num_seqs: int
    free_kv_bytes: int
    max_num_seqs: int  # in one model's batch
    switch_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleWorkerView:
    """A worker, as whoever gives roles sees it: its work of both kinds, whatever its roles are now."""

    worker_id: WorkerId
    roles: frozenset[Role]
    prefill_s: float  # predicted seconds of prefill given to it and not done
    decode_load: float  # the share of its time that the SLOs of those that decode need; prompts that wait are not among them
    num_seqs: int  # that it decodes


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitView:
    """Who should prefill, and who decode?"""

    now_s: float
    workers: tuple[RoleWorkerView, ...]  # any order
    prefill_rate: float  # predicted seconds of prefill that arrive each second, over all workers


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceView:
    """Should a batch move? `workers` are all that decode something, and all of `targets`, which may be given more."""

    now_s: float
    workers: tuple[DecodeWorkerView, ...]
    targets: frozenset[WorkerId]
    token_bytes: Mapping[ModelName, float]  # of KV
    weight_bytes: Mapping[ModelName, int]
    transfer_bytes_per_s: float
    move_s: float = 0.002  # for each sequence: a front door places it anew


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorView:
    """What stands before a request that asks to come in. Counts are of the whole pool, and without this request."""

    num_queued: int  # sequences without a first token
    num_queued_tokens: int  # of their prompts
    num_inflight: int  # requests
    num_sequences: int  # that this request makes
    num_prompt_tokens: int  # of one sequence
    num_total_tokens: int  # of one sequence, prompt and max_tokens
    max_model_len: int
    max_kv_tokens: int  # that one sequence of this model can have at most on the roomiest worker
    deadline_s: float
    ttft_slo_s: float
    is_idle: bool  # nothing waits or runs where it would go
    kv_bytes: int = 0  # of the prompts of all its sequences
    free_kv_bytes: int | None = None  # on the roomiest worker, arena and host tier; None: a worker without a host tier, which only queues
    ttft_s: float  # predicted
    switch_s: float  # of it, waking the model
