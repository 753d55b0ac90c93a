"""Which model's batch should leave its decode worker for another: only where it pays what the move costs.

A worker's load is the share of its time that the SLOs of its sequences need, switches included (`dispatch.choose_decode` counts the same);
above 1 tokens come late. A batch moves whole, since half a batch costs each of two workers almost what the whole costs one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from polymux.disagg.multiplex import round_load
from polymux.disagg.views import BalanceView, DecodeModelView, DecodeWorkerView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMove:
    model: ModelName
    source: WorkerId
    target: WorkerId
    gain: float  # by which the busier of the two becomes less loaded
    cost_s: float  # for which the batch makes no token, and the target may make none


@dataclass(frozen=True, slots=True)
class BalanceMemory:
    """When each model was moved last."""

    moved_at_s: tuple[tuple[ModelName, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """One move at a time: the best, if it wins back its cost several times over within `horizon_s`.

    `rest_s`: for which a model that was moved stays where it is, so that nothing travels to and fro.
    """

    horizon_s: float = 5.0
    min_load: float = 1.0  # of the worker that gives: below it every token is on time
    min_gain: float = 0.15
    times_cost: float = 3.0
    rest_s: float = 5.0
    max_quota_s: float = 4.0

    def __post_init__(self) -> None:
        for name in ("horizon_s", "min_load", "min_gain", "times_cost", "rest_s", "max_quota_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0", param=name)

    def start(self) -> BalanceMemory:
        return BalanceMemory()

    def next_move(self, view: BalanceView, memory: BalanceMemory) -> tuple[BatchMove | None, BalanceMemory]:
        """The batch to move now, if any. Ties go to the cheaper move, then by names."""
        resting = tuple((model, at_s) for model, at_s in memory.moved_at_s if view.now_s - at_s < self.rest_s)
        held = {model for model, _ in resting}
        found: list[BatchMove] = []
        for source in view.workers:
            load = self.load(source.models, source)
            if load < self.min_load:
                continue
            for model in source.models.keys() - held:
                found += [
                    move
                    for target in view.workers
                    if target.worker_id in view.targets
                    and target.worker_id != source.worker_id
                    and (move := self._move(view, model, source, target, load)) is not None
                ]
        best = min(found, key=lambda m: (-(m.gain * self.horizon_s - m.cost_s), m.cost_s, m.model, m.source, m.target), default=None)
        return best, BalanceMemory(resting if best is None else (*resting, (best.model, view.now_s)))

    def _move(
        self, view: BalanceView, model: ModelName, source: DecodeWorkerView, target: DecodeWorkerView, load: float
    ) -> BatchMove | None:
        batch = source.models[model]
        kv_bytes = batch.kv_tokens * view.token_bytes[model]
        here = target.models.get(model)
        if kv_bytes > target.free_kv_bytes or batch.num_seqs + (here.num_seqs if here else 0) > target.max_num_seqs:
            return None
        left = {other: one for other, one in source.models.items() if other != model}
        joined = {**target.models, model: _joined(batch, here, target, model)}
        new_bytes = 0 if model in target.resident or model in target.models else view.weight_bytes[model]
        gain = load - max(self.load(left, source), self.load(joined, target, new_bytes))
        switch_s = new_bytes / target.switch_bytes_per_s
        cost_s = view.move_s * batch.num_seqs + kv_bytes / view.transfer_bytes_per_s + switch_s
        if gain < self.min_gain * load or gain * self.horizon_s < self.times_cost * cost_s:
            return None
        return BatchMove(model=model, source=source.worker_id, target=target.worker_id, gain=gain, cost_s=cost_s)

    def load(self, models: Mapping[ModelName, DecodeModelView], worker: DecodeWorkerView, new_weight_bytes: int = 0) -> float:
        """The share of its time that a worker needs for these batches; `new_weight_bytes` are of a model that it had no work for."""
        return round_load(
            math.fsum(one.step_s / one.tpot_slo_s for one in models.values()),
            num_models=len(models),
            switch_s=worker.round_switch_s + new_weight_bytes / worker.switch_bytes_per_s,
            min_steps=min((one.tpot_slo_s / one.step_s for one in models.values()), default=math.inf),
            max_quota_s=self.max_quota_s,
        )


def _joined(batch: DecodeModelView, here: DecodeModelView | None, target: DecodeWorkerView, model: ModelName) -> DecodeModelView:
    """The batch on the target, with what of its model is there already."""
    num_seqs, kv_tokens, tpot_slo_s = batch.num_seqs, batch.kv_tokens, batch.tpot_slo_s
    if here is not None:
        num_seqs, kv_tokens, tpot_slo_s = num_seqs + here.num_seqs, kv_tokens + here.kv_tokens, min(tpot_slo_s, here.tpot_slo_s)
    base, per_seq, per_token = target.costs[model]
    step_s = base + per_seq * min(num_seqs, target.max_num_seqs) + per_token * kv_tokens
    return DecodeModelView(num_seqs=num_seqs, kv_tokens=kv_tokens, tpot_slo_s=tpot_slo_s, step_s=max(step_s, 1e-9))
