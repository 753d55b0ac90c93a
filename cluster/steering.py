"""Who prefills, who decodes, and which batch moves: the controller's books as views for `disagg/roles.py` and `disagg/balance.py`."""

from __future__ import annotations

from collections.abc import Iterable

from polymux.cluster.config import ClusterConfig
from polymux.cluster.pool import Member, Pool
from polymux.cluster.snapshots import ModelRecord
from polymux.disagg.balance import Balance, BatchMove
from polymux.disagg.roles import BOTH, ArrivalRate, AutoSplit
from polymux.disagg.views import BalanceView, RoleWorkerView, SplitView
from polymux.transport.errors import InvalidRequest
from polymux.transport.units import ModelName, WorkerId

TRANSFER_BYTES_PER_S = 1e9  # of KV between two workers; a guess, which only says whether a move could pay
HEADED_S = 5.0  # for the sequences of a batch that moves to come by, and be sent where it was meant to go


class Steering:
    """The memory of the two policies, and what they decided last."""

    def __init__(self, config: ClusterConfig, pool: Pool) -> None:
        self._pool = pool
        self._split = AutoSplit() if config.pools.split == "auto" else None
        self._is_shared = config.pools.split == "shared"
        self._balance = Balance(max_quota_s=config.policies.max_quota_s) if config.policies.rebalance else None
        self._split_memory = AutoSplit().start()
        self._balance_memory = Balance().start()
        self._arriving = ArrivalRate()
        self._headed: dict[tuple[ModelName, WorkerId], tuple[WorkerId, float]] = {}

    def arrived(self, prefill_s: float, now_s: float) -> None:
        """A prompt was placed that takes a prefill worker so long."""
        self._arriving = self._arriving.add(prefill_s, now_s)

    def steer(self, records: Iterable[ModelRecord], now_s: float) -> BatchMove | None:
        """Give roles as the load wants them; the batch that should move now, if any. Call it about once a second."""
        self._headed = {key: value for key, value in self._headed.items() if value[1] > now_s}
        self.split(now_s)
        if self._balance is None or len(self._pool) < 2 or not any(member.decode.placed for member in self._pool.members.values()):
            return None
        view = self._balance_view(records, now_s)
        move, self._balance_memory = self._balance.next_move(view, self._balance_memory)
        if move is not None:
            self._headed[move.model, move.source] = (move.target, now_s + HEADED_S)
        return move

    def split(self, now_s: float) -> None:
        """As the configuration says, or as the load does."""
        if self._is_shared:
            for worker_id in [key for key, member in self._pool.members.items() if member.roles and member.roles != BOTH]:
                self._pool.assign(worker_id, BOTH)
        if self._split is None:
            return
        workers = tuple(_role_view(member, now_s) for member in self._pool.members.values() if member.roles)
        view = SplitView(now_s=now_s, workers=workers, prefill_rate=self._arriving.read(now_s))
        assignment, self._split_memory = self._split.assign(view, self._split_memory)
        for worker_id, roles in assignment.items():
            self._pool.assign(worker_id, roles)

    def drain(self, worker_id: WorkerId, now_s: float) -> None:
        """Give a worker nothing more. Raises InvalidRequest when there is no such worker, or nobody else for what it does."""
        member = self._pool.members.get(worker_id)
        if member is None:
            raise InvalidRequest(f"no worker {worker_id!r} is alive; polymux topology lists them", param="worker")
        others = [other for key, other in self._pool.members.items() if key != worker_id and other.roles]
        if not others:
            raise InvalidRequest(f"worker {worker_id!r} is the last one; start another before this one is drained", param="worker")
        if self._split is None and not self._is_shared:
            for role in sorted(member.roles):
                if not any(role in other.roles for other in others):
                    raise InvalidRequest(
                        f"worker {worker_id!r} is the last {role} worker; raise pools.{role}.workers, or set pools.split to auto",
                        param="worker",
                    )
        self._pool.assign(worker_id, frozenset())
        self.split(now_s)

    def undrain(self, worker_id: WorkerId) -> None:
        """It stays after all."""
        member = self._pool.members.get(worker_id)
        if member is not None and not member.roles:
            self._pool.assign(worker_id, BOTH if self._is_shared else frozenset({member.main.hello.role}))

    def headed(self, model: ModelName, source: WorkerId) -> WorkerId | None:
        """Where this batch of that worker was meant to go."""
        target = self._headed.get((model, source))
        return target[0] if target and target[0] in self._pool.decode else None

    def _balance_view(self, records: Iterable[ModelRecord], now_s: float) -> BalanceView:
        known = {record.spec.model: record for record in records}
        targets = frozenset(self._pool.decode) - self._pool.stalled
        books = [m.decode for key, m in sorted(self._pool.members.items()) if m.roles and (m.decode.placed or key in targets)]
        return BalanceView(
            now_s=now_s,
            workers=tuple(book.view() for book in books),
            targets=targets,
            token_bytes={model: record.spec.kv.block_bytes / record.spec.kv.block_size for model, record in known.items()},
            weight_bytes={model: record.spec.weight_bytes for model, record in known.items()},
            transfer_bytes_per_s=TRANSFER_BYTES_PER_S,
        )


def _role_view(member: Member, now_s: float) -> RoleWorkerView:
    running = member.decode.running()
    return RoleWorkerView(
        worker_id=member.main.hello.worker_id,
        roles=member.roles,
        prefill_s=max(0.0, member.prefill.busy_until_s - now_s),
        decode_load=sum(one.step_s / one.tpot_slo_s for one in running.values()),
        num_seqs=sum(one.num_seqs for one in running.values()),
    )
