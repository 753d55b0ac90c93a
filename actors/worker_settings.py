"""Everything that a worker needs to know, in one value."""

from __future__ import annotations

from dataclasses import dataclass, field

from polymux.actors.engine import EngineSettings
from polymux.actors.kept import KEEP_S
from polymux.actors.parallel.leader import RankSettings
from polymux.transport.kv import KVSettings
from polymux.transport.messages import Role
from polymux.transport.units import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Everything a worker needs to know, in one value that crosses the process once."""

    worker_id: WorkerId
    role: Role  # its first assignment; the controller may give it the other, or both
    arena_bytes: int
    engine: EngineSettings
    token: str = field(repr=False)  # the cluster's shared secret
    store_address: str
    host: str = "127.0.0.1"
    num_threads: int = 1  # of each rank
    num_ranks: int = 1  # processes of this instance, which share every model; arena and engine are those of each
    rank_timeout_s: float = 30.0  # a rank that answers no other for so long is lost, and the instance with it
    prefill_policy: str = "deadline"  # of `disagg.prefill`
    prefill_settings: tuple[tuple[str, float], ...] = ()
    decode_policy: str = "slack"  # of `disagg.turn_policies`
    decode_settings: tuple[tuple[str, float], ...] = ()
    kv: KVSettings = field(default_factory=KVSettings)
    keep_s: float = KEEP_S  # how long a sequence that was given up here waits with its KV for the worker that goes on
    costs_path: str | None = None  # folder of the costs that outlive a worker
    probe_interval_s: float = 10.0  # how often an idle engine proves that it still computes

    @property
    def ranks(self) -> RankSettings:
        """What its ranks have in common, where there are several."""
        return RankSettings(
            worker_id=self.worker_id,
            num_ranks=self.num_ranks,
            arena_bytes=self.arena_bytes,
            weight_reserve_bytes=self.engine.weight_reserve_bytes,
            num_threads=self.num_threads,
            batch_invariant=self.engine.batch_invariant,
            store_address=self.store_address,
            token=self.token,
            timeout_s=self.rank_timeout_s,
        )
