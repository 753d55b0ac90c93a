"""What the controller shows: snapshots for readiness, metrics and the console. Plain values; ages and not clock readings."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from polymux.transport.messages import EdgeReport, ModelLoad, Role
from polymux.transport.units import Epoch, ModelName, WorkerId


class WorkerState(enum.StrEnum):
    ALIVE = "alive"
    DRAINING = "draining"  # takes nothing new, and stops once what it has went elsewhere or ended
    STALLED = "stalled"  # reports, but has work and has not stepped for too long
    LOST = "lost"


class ModelState(enum.StrEnum):
    REGISTERED = "registered"  # no worker could hold it now
    PARKED = "parked"  # in no arena; a request wakes it
    RESIDENT = "resident"  # in at least one arena


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    worker_id: WorkerId
    role: Role
    state: WorkerState
    epoch: Epoch
    address: str
    host_id: str
    pid: int
    num_ranks: int  # processes that share its models
    arena_bytes: int  # of all ranks together, as all bytes here
    active_model: ModelName | None
    loads: tuple[ModelLoad, ...]  # as last reported
    num_placed: int  # sequences that the controller placed here and that have not ended
    busy_s: float  # predicted seconds of prefill work given to it
    num_free_kv_bytes: int
    num_free_host_bytes: int | None  # of its node's host tier; None without one
    num_used_kv_bytes: int  # in blocks that are held
    num_blocks_out: int
    report_age_s: float | None  # None: not yet reported
    step_age_s: float | None  # None: idle
    edges: tuple[EdgeReport, ...]  # how KV comes to it, from whom, and why that way
    counters: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    model: ModelName
    state: ModelState
    created: int
    max_model_len: int
    weight_bytes: int
    block_size: int  # tokens
    block_bytes: int
    num_inflight: int  # requests
    num_finished: int
    num_failed: int  # failed, refused by a worker or overdue: each an SLO miss; requests that the client gave up count nowhere
    num_attained: int  # of the finished, with TTFT and TPOT within their SLOs
    num_output_tokens: int
    resident_on: tuple[WorkerId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    is_ready: bool
    reasons: tuple[str, ...]  # why not
    workers: tuple[WorkerStatus, ...]  # alive ones by id, then the lost ones that are remembered
    models: tuple[ModelStatus, ...]  # by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Totals since the controller started; worker counters go on counting across the loss of a worker."""

    uptime_s: float
    num_inflight: int  # requests
    num_queued: int  # sequences without a first token, as far as reports show
    num_queued_tokens: int
    num_clients: int
    num_workers_alive: int
    num_workers_lost: int
    num_blocks_out: int
    outcomes: dict[str, int]  # admitted | replayed | moved | refused | finished | cancelled | failed | expired | client_lost
    counters: dict[str, float]  # the sum of workers' counters, by metric name


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """What a sweep found gone. `is_orphaned`: no front door called for so long that all should stop."""

    workers: tuple[WorkerId, ...]
    clients: tuple[str, ...]
    requests: tuple[str, ...]
    is_orphaned: bool
