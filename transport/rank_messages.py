"""What the ranks of an instance say to each other outside of their sums: commands of rank 0 to the others, and what these answer.

Commands are carried out in their order. Weights are named by their model and lie at the same offset in every rank's arena; KV blocks are
named by their ids, which are the same on every rank, and need no command but in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from polymux.transport.messages import ErrorReport, ModelSpec, Shard
from polymux.transport.units import ModelName, PackedIds


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRank:
    """The first command of a new process: what it is."""

    shard: Shard
    worker_id: str
    device: str  # of `actors.device`: "cuda" is the one GPU that the process sees
    arena_bytes: int
    weight_reserve_bytes: int
    num_threads: int
    batch_invariant: bool
    store_address: str
    token: str = field(repr=False)
    meeting_place: bytes  # of the ranks, as rank 0's device has named it
    timeout_s: float  # of every sum, gather and step
    max_num_seqs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """A rank's arena on a GPU, for rank 0 to map."""

    gpu: str  # its uuid
    handle: bytes  # of CUDA IPC


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStarted:
    """The answer. `memory` None: the arena is host memory, and its descriptor comes behind."""

    pid: int
    memory: RankMemory | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadImage:
    """Begin to bring this rank's image of a model into its arena. Answered by `ImageSeen`, when the first layer can run or never will."""

    load: int  # names this attempt
    spec: ModelSpec  # as each rank knows it
    offset: int
    is_urgent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSeen:
    load: int
    error: ErrorReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HurryImage:
    """Somebody waits for it now."""

    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveImage:
    """A model's weights go elsewhere in the arena; the two ranges may overlap."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropImage:
    """A model's range is given back: write nothing to it any more."""

    model: ModelName


@dataclass(frozen=True, slots=True, kw_only=True)
class AskDone:
    """Answer with `Done` once every command before this one is carried out."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSlice:
    """One sequence's part of a step."""

    num_tokens: int
    context_len: int
    block_ids: PackedIds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """One forward pass, which every rank does at the same time. No answer: the sums are."""

    model: ModelName
    token_ids: PackedIds
    slices: tuple[StepSlice, ...]
    logits_rows: PackedIds | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeModel:
    """A planned step of one token of each sequence, which every rank does at the same time. The tokens come from rank 0's device."""

    model: ModelName
    context_lens: PackedIds
    block_ids: tuple[PackedIds, ...]
    graph: str | None  # which of the graphs of so many rows it runs by, so that all ranks capture and replay the same; None: none


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailed:
    """This rank can do no more; its process ends."""

    error: ErrorReport
