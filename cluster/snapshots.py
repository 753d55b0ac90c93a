"""From the controller's books to what it shows of them (`topology.py`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from polymux.cluster.books import WorkerBook
from polymux.cluster.pool import Pool, counters_of
from polymux.cluster.topology import ModelState, ModelStatus, Topology, WorkerState, WorkerStatus
from polymux.transport.messages import ModelLoad, ModelSpec, WorkerReport
from polymux.transport.units import ModelName, WorkerId


@dataclass(slots=True)
class ModelRecord:
    """What the controller counts of one model."""

    spec: ModelSpec
    block_bytes: int
    mean_output_tokens: float = 128.0  # of one sequence, smoothed; a guess until the first request ends
    num_inflight: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_attained: int = 0
    num_output_tokens: int = 0


def topology(records: Iterable[ModelRecord], pool: Pool, *, now_s: float) -> Topology:
    """Ready means: of each role, a worker is alive, has reported, and steps when it has work."""
    reasons = [reason for role, books in (("prefill", pool.prefill), ("decode", pool.decode)) if (reason := _missing(role, books, pool))]
    alive = sorted(pool.books(), key=lambda book: book.hello.worker_id)
    return Topology(
        is_ready=not reasons,
        reasons=tuple(reasons),
        workers=tuple(_worker(book, pool, now_s) for book in [*alive, *pool.lost]),
        models=tuple(sorted((_model(record, pool) for record in records), key=lambda status: status.model)),
    )


def summed_counters(pool: Pool) -> dict[str, float]:
    total = Counter(pool.retired)
    for book in pool.books():
        total.update(counters_of(book))
    return dict(sorted(total.items()))


def _missing(role: str, books: Mapping[WorkerId, WorkerBook], pool: Pool) -> str | None:
    if not books:
        return f"no {role} worker is alive"
    reported = [worker_id for worker_id, book in books.items() if book.reported is not None]
    if not reported:
        return f"no {role} worker has reported yet"
    if all(worker_id in pool.stalled for worker_id in reported):
        return f"every {role} worker has work and takes no step"
    return None


def _worker(book: WorkerBook, pool: Pool, now_s: float) -> WorkerStatus:
    hello, report = book.hello, book.reported
    member = None if book.is_lost else pool.members[hello.worker_id]
    state = WorkerState.STALLED if hello.worker_id in pool.stalled else WorkerState.ALIVE
    if member is not None and not member.roles:
        state = WorkerState.DRAINING
    return WorkerStatus(
        worker_id=hello.worker_id,
        role=member.role if member else hello.role,
        state=WorkerState.LOST if book.is_lost else state,
        epoch=book.peer.epoch,
        address=hello.address,
        host_id=hello.host_id,
        pid=hello.pid,
        num_ranks=hello.num_ranks,
        arena_bytes=hello.arena_bytes,
        active_model=report.active_model if report else None,
        loads=_merged(report) if report else (),
        num_placed=member.num_placed if member else len(book.placed),
        busy_s=max(0.0, member.prefill.busy_until_s - now_s) if member else 0.0,
        num_free_kv_bytes=report.num_free_kv_bytes if report else 0,
        num_free_host_bytes=report.num_free_host_bytes if report else None,
        num_used_kv_bytes=report.num_used_kv_bytes if report else 0,
        num_blocks_out=report.num_blocks_out if report else 0,
        report_age_s=now_s - book.reported_at_s if report else None,
        step_age_s=book.step_age_s(now_s),
        edges=report.edges if report else (),
        counters=dict(counters_of(book)),
    )


def both_roles(report: WorkerReport) -> tuple[ModelLoad, ...]:
    return (*report.loads, *report.prefills)


def _merged(report: WorkerReport) -> tuple[ModelLoad, ...]:
    """Both roles' work, one entry a model."""
    found: dict[ModelName, ModelLoad] = {}
    for load in both_roles(report):
        other = found.get(load.model)
        found[load.model] = load if other is None else _sum(load, other)
    return tuple(found[model] for model in sorted(found))


def _sum(one: ModelLoad, other: ModelLoad) -> ModelLoad:
    return ModelLoad(
        model=one.model,
        is_resident=one.is_resident or other.is_resident,
        num_waiting=one.num_waiting + other.num_waiting,
        num_running=one.num_running + other.num_running,
        waiting_tokens=one.waiting_tokens + other.waiting_tokens,
        kv_tokens=one.kv_tokens + other.kv_tokens,
    )


def _model(record: ModelRecord, pool: Pool) -> ModelStatus:
    spec = record.spec
    resident_on = tuple(sorted(book.hello.worker_id for book in pool.books() if spec.model in book.resident))
    able = pool.able(spec)
    state = ModelState.PARKED if able.prefill and able.decode else ModelState.REGISTERED
    return ModelStatus(
        model=spec.model,
        state=ModelState.RESIDENT if resident_on else state,
        created=spec.created,
        max_model_len=spec.max_model_len,
        weight_bytes=spec.weight_bytes,
        block_size=spec.kv.block_size,
        block_bytes=spec.kv.block_bytes,
        num_inflight=record.num_inflight,
        num_finished=record.num_finished,
        num_failed=record.num_failed,
        num_attained=record.num_attained,
        num_output_tokens=record.num_output_tokens,
        resident_on=resident_on,
    )
