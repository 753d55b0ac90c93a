"""How many workers prefill and how many decode: the split follows the load, one worker at a time, and does not swing.

The measure is a worker's time: the seconds of prefill that arrive every second, and the share of their time that decode workers need for
their SLOs. A worker that changes its role drains nothing: it takes new work of the new kind at once, and ends or hands over the old.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from polymux.disagg.views import RoleWorkerView, SplitView
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Role
from polymux.transport.units import WorkerId

BOTH = frozenset(Role)
_ONLY = {role: frozenset({role}) for role in Role}


@dataclass(frozen=True, slots=True)
class SplitMemory:
    wanted: Role | None = None  # the role that has wanted a worker more
    since_s: float = 0.0


Assignment = dict[WorkerId, frozenset[Role]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSplit:
    """A worker changes sides when the busier side has been too busy for `hold_s`, and would stay the less busy one afterwards.

    `min_pressure`: the share of its time below which a side asks for nobody. `margin`: by how much the busier side must fall, so that
    what the change costs is worth it and the next look does not undo it. `horizon_s`: within which a backlog is to be worked off.
    """

    hold_s: float = 3.0
    min_pressure: float = 0.5
    margin: float = 0.1
    horizon_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("hold_s", "min_pressure", "margin", "horizon_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0", param=name)

    def start(self) -> SplitMemory:
        return SplitMemory()

    def assign(self, view: SplitView, memory: SplitMemory) -> tuple[Assignment, SplitMemory]:
        """Workers whose roles change, with their new ones; mostly nobody. A lone worker has both roles, and each role has a worker."""
        workers = sorted(view.workers, key=lambda w: w.worker_id)
        if len(workers) < 2:
            return {w.worker_id: BOTH for w in workers if w.roles != BOTH}, SplitMemory()
        if (repair := self._repair(workers)) is not None:
            return repair, SplitMemory()
        wanted = self._wanted(view, workers)
        if wanted is None:
            return {}, SplitMemory()
        if wanted is not memory.wanted:
            memory = SplitMemory(wanted, view.now_s)
        if view.now_s - memory.since_s < self.hold_s:
            return {}, memory
        giver = min((w for w in workers if wanted not in w.roles), key=_least_busy)
        return {giver.worker_id: _ONLY[wanted]}, SplitMemory()

    def _repair(self, workers: Sequence[RoleWorkerView]) -> Assignment | None:
        """Where a worker came or was lost: one role each, and at least one worker of each."""
        roles = {w.worker_id: w.roles if len(w.roles) == 1 else frozenset[Role]() for w in workers}
        free = [w for w in workers if not roles[w.worker_id]]
        for role in Role:
            if _ONLY[role] not in roles.values():
                taker = free.pop(0) if free else min(workers, key=_least_busy)
                roles[taker.worker_id] = _ONLY[role]
        for worker in free:
            roles[worker.worker_id] = _ONLY[Role.DECODE]
        changed = {w.worker_id: roles[w.worker_id] for w in workers if roles[w.worker_id] != w.roles}
        return changed or None

    def _wanted(self, view: SplitView, workers: Sequence[RoleWorkerView]) -> Role | None:
        """The role that should have one worker more, by this look alone."""
        num_prefill = sum(Role.PREFILL in w.roles for w in workers)
        prefill = view.prefill_rate + sum(w.prefill_s for w in workers) / self.horizon_s
        decode = sum(w.decode_load for w in workers)
        now = (prefill / num_prefill, decode / (len(workers) - num_prefill))
        wanted, step = (Role.PREFILL, 1) if now[0] > now[1] else (Role.DECODE, -1)
        num_after = num_prefill + step
        if max(now) < self.min_pressure or not 0 < num_after < len(workers):
            return None
        after = max(prefill / num_after, decode / (len(workers) - num_after))
        return wanted if max(now) >= after * (1 + self.margin) else None


def _least_busy(worker: RoleWorkerView) -> tuple[float, int, WorkerId]:
    return worker.prefill_s + worker.decode_load, worker.num_seqs, worker.worker_id


@dataclass(frozen=True, slots=True)
class ArrivalRate:
    """Seconds of prefill work that arrive each second, smoothed over `tau_s`."""

    per_s: float = 0.0
    at_s: float = 0.0
    tau_s: float = 5.0

    def add(self, seconds: float, now_s: float) -> ArrivalRate:
        return replace(self, per_s=self.read(now_s) + seconds / self.tau_s, at_s=now_s)

    def read(self, now_s: float) -> float:
        return self.per_s * math.exp(-max(0.0, now_s - self.at_s) / self.tau_s)
