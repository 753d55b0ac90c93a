"""Where a sequence runs: the prefill worker that would finish it first, the decode worker that would end it first, both in seconds.

The published rules count requests and batches; seconds see that a long prompt is not a short one, that the model a worker has
loaded is free, and that one worker may be slower than another. Ties go to the lower worker id.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from polymux.disagg.multiplex import round_load
from polymux.disagg.views import AskView, DecodeModelView, DecodeWorkerView, PrefillWorkerView
from polymux.transport.units import ModelName, WorkerId

Coefficients = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChoice:
    worker_id: WorkerId
    finish_s: float  # from now
    prefill_s: float  # of it, this prompt's own computation
    switch_s: float  # of it, loading its model
    joins: bool  # a waiting group of its model


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeChoice:
    worker_id: WorkerId
    wait_s: float  # predicted until its blocks are granted
    switch_s: float
    tpot_s: float  # predicted


def choose_prefill(
    ask: AskView,
    workers: Iterable[PrefillWorkerView],
    *,
    now_s: float,
    max_group_size: int = 8,
    handover_s: Mapping[WorkerId, float] | None = None,
) -> PrefillChoice | None:
    """Join a waiting group of the same model if that is sooner than anything that a switch elsewhere would buy.

    A switch counts twice: for the time that this prompt waits for it, and for the same time that it takes from everyone behind. A cached
    prefix counts for the seconds that computing it would take. `handover_s` is what bringing the KV to its decode worker takes from each,
    where that differs: it counts once, for the transfers of others wait behind it, though most of it hides behind this prefill.
    None when every worker is excluded.
    """
    best: tuple[float, WorkerId] | None = None
    choice: PrefillChoice | None = None
    for worker in workers:
        if worker.worker_id in ask.excluded:
            continue
        base, per_token, per_square = worker.costs[ask.model]
        num_tokens, num_cached = ask.num_prompt_tokens, num_cached_tokens(ask, worker)
        prefill_s = base + (num_tokens - num_cached) * (per_token + (num_tokens + num_cached) * per_square)
        num_waiting = worker.waiting.get(ask.model, 0)
        joins = 0 < num_waiting < max_group_size
        is_free = joins or (ask.model in worker.resident and not num_waiting)
        switch_s = 0.0 if is_free else ask.weight_bytes / worker.switch_bytes_per_s
        finish_s = max(0.0, worker.busy_until_s - now_s) + switch_s + prefill_s
        rank = (finish_s + switch_s + (handover_s or {}).get(worker.worker_id, 0.0), worker.worker_id)
        if best is None or rank < best:
            best = rank
            choice = PrefillChoice(worker_id=worker.worker_id, finish_s=finish_s, prefill_s=prefill_s, switch_s=switch_s, joins=joins)
    return choice


def num_cached_tokens(ask: AskView, worker: PrefillWorkerView) -> int:
    """The tokens that this prompt begins with and the worker has, by the marks of its blocks; one at least is left to compute."""
    num_blocks = 0
    for mark in ask.prefix_marks:
        if not any(mark in marks for marks in worker.cached):
            break
        num_blocks += 1
    return min(num_blocks, (ask.num_prompt_tokens - 1) // ask.block_size) * ask.block_size


def worker_view(
    worker_id: WorkerId,
    models: Mapping[ModelName, DecodeModelView],
    *,
    resident: frozenset[ModelName],
    costs: Mapping[ModelName, Coefficients],
    weight_bytes: Mapping[ModelName, int],
    switch_bytes_per_s: float,
    free_kv_bytes: int,
    max_num_seqs: int,
) -> DecodeWorkerView:
    """A decode worker by the work that it has; the sums over its models are taken here."""
    return DecodeWorkerView(
        worker_id=worker_id,
        models=models,
        resident=resident,
        costs=costs,
        load=sum(one.step_s / one.tpot_slo_s for one in models.values()),
        round_switch_s=sum(weight_bytes[model] / switch_bytes_per_s for model in models if model not in resident),
        min_steps=min((one.tpot_slo_s / one.step_s for one in models.values()), default=math.inf),
        num_seqs=sum(one.num_seqs for one in models.values()),
        free_kv_bytes=max(0, free_kv_bytes),
        max_num_seqs=max_num_seqs,
        switch_bytes_per_s=switch_bytes_per_s,
    )


def step_s(costs: Coefficients, num_seqs: int, kv_tokens: int) -> float:
    """Of one decode step over so many sequences."""
    base, per_seq, per_token = costs
    return base + per_seq * num_seqs + per_token * kv_tokens


def choose_decode(ask: AskView, workers: Iterable[DecodeWorkerView], *, max_quota_s: float = 4.0) -> DecodeChoice | None:
    """Where the sequence costs the pool least, in shares of a worker's time, and is on time itself.

    With it added, a round takes `load` of the time that its tokens may take (`multiplex.round_load`), so they come every TPOT * load: on
    time up to 1. What the sequence adds to the load counts twice, since everybody there pays it: so a model's sequences gather where
    it runs, a batch of two costing little more than one, until that worker is late and another is not. A wait counts twice too, as a
    share of the time that the sequence takes there, and a switch once, of the time that it may take. None when every worker is excluded.
    """
    best: tuple[float, float, WorkerId] | None = None
    choice: DecodeChoice | None = None
    for worker in workers:
        if worker.worker_id in ask.excluded:
            continue
        found, load, load_before = _placed(ask, worker, max_quota_s)
        added = load - load_before + found.wait_s / (ask.num_output_tokens * found.tpot_s)
        cost = max(load, 1.0) + 2 * added + found.switch_s / (ask.num_output_tokens * ask.tpot_slo_s)
        rank = (cost, load, worker.worker_id)
        if best is None or rank < best:
            best, choice = rank, found
    return choice


def _placed(ask: AskView, worker: DecodeWorkerView, max_quota_s: float) -> tuple[DecodeChoice, float, float]:
    """What this sequence would meet on the worker, and the worker's load with it and without."""
    here = worker.models.get(ask.model)
    num_here, kv_tokens, tpot_slo_s, old_load = 0, 0, ask.tpot_slo_s, 0.0
    if here is not None:
        num_here, kv_tokens, tpot_slo_s = here.num_seqs, here.kv_tokens, min(here.tpot_slo_s, ask.tpot_slo_s)
        old_load = here.step_s / here.tpot_slo_s
    num_tokens = ask.num_prompt_tokens + ask.num_output_tokens
    new_step_s = step_s(worker.costs[ask.model], min(num_here + 1, worker.max_num_seqs), kv_tokens + num_tokens)
    switch_s = 0.0 if ask.model in worker.resident else ask.weight_bytes / worker.switch_bytes_per_s
    num_models, round_switch_s, min_steps = len(worker.models), worker.round_switch_s, worker.min_steps
    load_before = round_load(worker.load, num_models=num_models, switch_s=round_switch_s, min_steps=min_steps, max_quota_s=max_quota_s)
    load = round_load(
        worker.load - old_load + new_step_s / tpot_slo_s,
        num_models=num_models + (here is None),
        switch_s=round_switch_s + (switch_s if here is None else 0.0),
        min_steps=min(min_steps, tpot_slo_s / new_step_s),
        max_quota_s=max_quota_s,
    )
    tpot_s = tpot_slo_s * load
    short = max(0, num_here + 1 - worker.max_num_seqs) + max(0.0, ask.kv_bytes - worker.free_kv_bytes) / max(ask.kv_bytes, 1)
    wait_s = ask.num_output_tokens * tpot_s * short / worker.num_seqs if worker.num_seqs else 0.0  # nobody to wait for: room is made
    return DecodeChoice(worker_id=worker.worker_id, wait_s=wait_s, switch_s=switch_s, tpot_s=tpot_s), load, load_before
