"""Every frozen dataclass that crosses a process. Commands are imperative, events are in the past tense.

Times that cross a process are seconds that remain, never clock readings: two hosts share no clock.
Ids that come in lists travel packed (`units.pack_ids`).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, replace

from polymux.transport.errors import ConfigError
from polymux.transport.units import BLOCK_SIZE, NO_IDS, ClientId, Epoch, ModelName, PackedIds, SequenceId, TransferId, WorkerId

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Role(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop id or a stop string
    LENGTH = "length"  # max_tokens or the model's context


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The shape of one KV block, `[layer, k|v, kv_head, slot, head_dim]`, contiguous; the same on device, on host and on the wire.

    Of an instance of several ranks each holds its own heads of every block, under the same block ids; `head_slices.py` says which.
    """

    num_layers: int
    num_kv_heads: int  # of the model
    head_dim: int
    dtype: str
    block_size: int = BLOCK_SIZE
    num_ranks: int = 1

    @property
    def rank_kv_heads(self) -> int:
        """KV heads that one rank holds: its share, or one that several ranks have."""
        return max(self.num_kv_heads // self.num_ranks, 1)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's K, or V, in one layer of one block."""
        return self.block_size * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block on one rank, K and V: one contiguous range."""
        return 2 * self.rank_kv_heads * self.head_bytes

    @property
    def moved_layer_bytes(self) -> int:
        """Bytes of one layer of one block as they travel: every head of the model once, whatever the ranks on either side."""
        return 2 * self.num_kv_heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def layout_hash(self) -> str:
        """Equal on both sides of a transfer, or the transfer is refused. How many ranks share the heads is each side's own business."""
        text = f"v1 lkhsd {self.num_layers} 2 {self.num_kv_heads} {self.block_size} {self.head_dim} {self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One rank's part of a model, among as many ranks."""

    rank: int
    num_ranks: int


WHOLE = Shard(rank=0, num_ranks=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """What a model takes on each rank of an instance of so many."""

    num_ranks: int
    weight_bytes: int  # of each rank's weight image; they are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What every process needs to know of a registered model."""

    model: ModelName
    path: str  # of the checkpoint, for tokenizer and chat template
    digest: str  # of configuration and weights: two images of equal digest are interchangeable
    config_json: str  # the checkpoint's config.json
    dtype: str  # of weights and activations
    kv: KVLayout
    weight_bytes: int  # of the weight image
    vocab_size: int
    max_model_len: int  # tokens, prompt and output together
    eos_token_ids: tuple[int, ...]
    ttft_slo_s: float = 10.0
    tpot_slo_s: float = 0.1
    created: int = 0  # unix seconds, for /v1/models
    is_pinned: bool = False  # once resident, its weights are not evicted
    chat_template: str | None = None  # path of a Jinja file in the place of the checkpoint's
    shapes: tuple[RankShape, ...] = ()  # on instances of several ranks, for each degree that the cluster has

    def on_ranks(self, num_ranks: int) -> ModelSpec:
        """What each rank of an instance of so many knows of it: its own bytes of weights and of KV. Raises ConfigError for a degree that
        the model was not registered for."""
        if num_ranks == self.kv.num_ranks:
            return self
        for shape in self.shapes:
            if shape.num_ranks == num_ranks:
                return replace(self, weight_bytes=shape.weight_bytes, kv=replace(self.kv, num_ranks=num_ranks))
        raise ConfigError(f"model {self.model} has no weights for {num_ranks} ranks; register it again")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens. Stop strings are the front door's; everything here is by token id.

    `logprobs` None asks for none, k >= 0 for the drawn token's and the k most likely ones'.
    `seed` with the token's index in the output keys the generator, so a token does not depend on when or where it is drawn.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One incarnation of a worker and where it listens."""

    worker_id: WorkerId
    epoch: Epoch
    address: str  # "tcp://host:port"
    host_id: str  # equal on two workers of one kernel: they may share memory
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Front door to decode worker: make one sequence. `output_ids` are those already delivered, when this is a replay or a move.

    With `handover`, the KV of all tokens but the newest waits at `prefill` under that sequence's id, and nothing is computed again.
    """

    sequence_id: SequenceId
    model: ModelName
    prompt_ids: PackedIds
    output_ids: PackedIds
    sampling: SamplingParams
    prefill: Peer
    deadline_s: float
    tpot_slo_s: float
    due_in_s: float  # until token 0 is due, at sending: token i is due i * tpot_slo_s later. Negative when it is late
    handover: SequenceId | None = None
    cache_salt: str = ""  # only sequences of equal salt share cached KV


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Front door to decode worker, decode worker to prefill worker: stop, and free the blocks."""

    sequence_id: SequenceId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Decode worker's promise: these blocks of its pool are this transfer's until it ends. In sequence order."""

    transfer_id: TransferId
    layout_hash: str
    block_ids: PackedIds
    target_epoch: Epoch
    source_epoch: Epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Decode worker to prefill worker: compute the KV of prompt + outputs, push it into the grant, send the next token to the client.

    With `handover`, push what is kept of that sequence instead: the KV of all tokens but the newest. No token is made.
    """

    sequence_id: SequenceId
    client_id: ClientId
    model: ModelName
    prompt_ids: PackedIds
    output_ids: PackedIds
    sampling: SamplingParams
    grant: Grant
    deadline_s: float
    tpot_slo_s: float
    due_in_s: float  # until the token that this prefill makes is due, at sending; negative when it is late
    handover: SequenceId | None = None
    cache_salt: str = ""
    num_in_place: int = 0  # tokens whose KV the granted blocks hold already: an order of a worker to itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """Prefill worker to decode worker, with the commit of the last layer: the token that it sampled, and whether that was the last one."""

    sequence_id: SequenceId
    token_id: int | None  # None: a handover, which makes none
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """An error of `errors.py` by class name; `error_from_name` rebuilds it."""

    name: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceUpdate:
    """New tokens of one sequence. `index` is the first one's place in the output: two workers' updates may arrive out of order.

    The last update of a sequence carries a finish reason, an error or `moved`: the worker gives it up after `index` tokens, and keeps its
    KV for a moment under this id, for the worker that is to go on.
    """

    sequence_id: SequenceId
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: ErrorReport | None = None
    cached_tokens: int = 0  # of the prompt, found in a prefix cache; said with the first token
    moved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFrame:
    """What one engine step made for one front-door replica."""

    worker_id: WorkerId
    epoch: Epoch
    updates: tuple[SequenceUpdate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Fitted seconds of one model on one worker: prefill = a + b*tokens + c*tokens^2; decode step = a + b*batch + c*kv tokens."""

    model: ModelName
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    num_prefill_steps: int  # that it was fitted to; 0: it is a guess
    num_decode_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """One model's work in one role of one worker at this moment. As decode worker, a sequence waits until its KV is committed there."""

    model: ModelName
    is_resident: bool
    num_waiting: int  # sequences
    num_running: int
    waiting_tokens: int  # tokens still to prefill
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeReport:
    """One open edge of a decode worker: how KV comes from that prefill worker, and why that way."""

    peer: WorkerId
    backend: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What a worker tells the controller: once a second, and at once when something it was asked for changed."""

    worker_id: WorkerId
    epoch: Epoch
    active_model: ModelName | None
    loads: tuple[ModelLoad, ...]  # as decode worker; residents are in it even without work
    costs: tuple[ModelCost, ...]
    switch_bytes_per_s: float
    num_free_kv_bytes: int
    num_blocks_out: int  # held by sequences, grants and quarantine, in the arena and in the host tier
    last_step_age_s: float | None  # None: idle, and the last probe passed
    counters: tuple[tuple[str, float], ...] = ()  # telemetry, by metric name
    num_free_host_bytes: int | None = None  # of the node's host tier, which its workers share; None without one
    prefills: tuple[ModelLoad, ...] = ()  # as prefill worker: the prompts that were ordered here
    num_used_kv_bytes: int = 0  # of the arena, in blocks that are held
    cached_prefixes: PackedIds = NO_IDS  # marks (`prefix.mark`) of the cached blocks used last, at most MAX_CACHED_MARKS
    edges: tuple[EdgeReport, ...] = ()  # as decode worker, by peer


class SpanKind(enum.StrEnum):
    """What a worker spends its time on; `ACTIVE` is the model that holds it, whatever it does meanwhile."""

    ACTIVE = "active"
    SWITCH = "switch"
    PREFETCH = "prefetch"
    PREFILL = "prefill"
    DECODE = "decode"
    KV_IN = "kv_in"
    KV_OUT = "kv_out"
    SWAP_IN = "swap_in"
    SWAP_OUT = "swap_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One stretch of a worker's time. In a message both times are seconds before it was made: `began_s` is the larger one."""

    kind: SpanKind
    model: ModelName
    began_s: float
    ended_s: float
    nbytes: int = 0
    num_seqs: int = 0  # the most at once, where steps were merged
    num_tokens: int = 0
    num_steps: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LookBack:
    """Somebody looks at the timeline: what ended within the last seconds, the newest so many spans of each worker."""

    within_s: float
    max_spans: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTimeline:
    """A worker's answer to a look back. The spans' times are seconds before it was made."""

    worker_id: WorkerId
    epoch: Epoch
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    """A new worker joins the pool; or, with an epoch, one that outlived its controller asks to go on as the incarnation that it is."""

    worker_id: WorkerId
    role: Role
    address: str
    host_id: str
    pid: int
    arena_bytes: int  # of all its ranks together, as every count of bytes in its reports
    num_threads: int
    epoch: Epoch | None = None
    num_ranks: int = 1  # processes of this instance
    device_kind: str = ""  # workers of one kind compute alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Controller's answer to a hello. The epoch is this incarnation's; reports must come more often than the lease lasts."""

    epoch: Epoch
    lease_s: float
    report_interval_s: float
    catalogue: int
    models: tuple[ModelSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """Controller's answer to a report. A worker whose `catalogue` is older asks for the models again."""

    lease_s: float
    catalogue: int  # rises with every change of the registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Admit:
    """Front door to controller: may this request run, and where? One answer for all its sequences."""

    request_id: str
    client_id: ClientId
    model: ModelName
    num_prompt_tokens: int
    max_tokens: int
    num_sequences: int
    deadline_s: float
    ttft_slo_s: float | None = None  # None: the model's
    tpot_slo_s: float | None = None
    tenant: str = ""
    excluded: tuple[WorkerId, ...] = ()  # workers that a replay must avoid
    moving: tuple[int, ...] = ()  # sequences that their decode workers give up and keep the KV of: place those anew, without prefill
    staying: tuple[int, ...] = ()  # sequences that go on where they are, although a worker of theirs may be gone: one whose part was done
    prefix_hashes: PackedIds = NO_IDS  # marks of the blocks that all its prompts begin with, at most MAX_PROMPT_MARKS


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The controller's answer: the two workers of each sequence, in choice order."""

    request_id: str
    prefill: tuple[Peer, ...]
    decode: tuple[Peer, ...]
    ttft_slo_s: float
    tpot_slo_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Front door to controller: this request has ended, whatever the way; its place in the books is free."""

    request_id: str
    outcome: str  # finished | refused | cancelled | failed
    num_output_tokens: int
    ttft_s: float | None
    tpot_s: float | None
