"""What the two ends of KV migration say to the engine: settings, events, references and counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from polymux.transport.errors import ConfigError, PolymuxError
from polymux.transport.kv_choice import BACKENDS
from polymux.transport.messages import Prefilled
from polymux.transport.units import GIB, SequenceId, TransferId, WorkerId

_NUMBERS = ("bytes", "moves", "committed", "stale_moves", "seconds", "num_outstanding", "bytes_outstanding")
_MAX_PAST_PEERS = 256
_OTHERS = WorkerId("others")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSettings:
    """Bounds and deadlines of KV migration, the same on both sides of an edge."""

    backend: str = "auto"  # or one of BACKENDS: what to try; auto takes the first that works
    max_transfers: int = 256  # outstanding on one edge
    max_bytes: int = 8 * GIB  # granted and outstanding on one edge, of each rank
    silence_s: float = 10.0  # an edge with work on it that hears nothing for so long is dead
    acknowledge_s: float = 5.0  # for the peer to confirm an aborted transfer; then the edge is dropped
    handshake_s: float = 5.0
    checksum_every: int = 64  # every so many moves carry a CRC that is compared after the copy; 1 all, 0 none

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *BACKENDS):
            raise ConfigError(f"backend={self.backend!r} is not one of auto, {', '.join(BACKENDS)}")
        for name in ("max_transfers", "max_bytes", "silence_s", "acknowledge_s", "handshake_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        if self.checksum_every < 0:
            raise ConfigError(f"checksum_every={self.checksum_every} must be 0 (never) or a number of moves")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCommitted:
    """Every layer of every granted block has landed and was checked: attention may read them. They are the sequence's now.

    `began_s` and `ended_s` are readings of this process's monotonic clock at the first move and at the commit.
    """

    transfer_id: TransferId
    sequence_id: SequenceId
    prefilled: Prefilled
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFailed:
    """The transfer ended without a commit. Its blocks are in quarantine: do not read them, do not free them yet."""

    transfer_id: TransferId
    sequence_id: SequenceId
    error: PolymuxError


@dataclass(frozen=True, slots=True, kw_only=True)
class KVQuiesced:
    """After a KVFailed: nobody can write to the granted blocks any more; free them."""

    transfer_id: TransferId


KVEvent = KVCommitted | KVFailed | KVQuiesced


@dataclass(frozen=True, slots=True)
class OrderRef:
    """Names one order on the prefill side. Transfer ids alone are unique only within an edge."""

    edge: int
    transfer_id: TransferId


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeStats:
    """Counters of all edges to one peer by one backend, lost ones included, from the side that reports them. They never fall."""

    peer: WorkerId
    backend: str
    bytes: int  # landed (decode side) or handed to the transport (prefill side)
    moves: int
    committed: int
    failed: tuple[tuple[str, int], ...]  # by error class
    stale_moves: int  # for transfers that had ended: dropped, never written
    seconds: float  # from order to commit, summed over the committed
    num_outstanding: int
    bytes_outstanding: int


class EdgeHistory:
    """The counters of edges that are lost, so that totals never fall; by peer and backend, in bounded number."""

    def __init__(self) -> None:
        self._past: dict[tuple[WorkerId, str], EdgeStats] = {}

    def add(self, stats: EdgeStats) -> None:
        key = (stats.peer, stats.backend)
        if key not in self._past and len(self._past) >= _MAX_PAST_PEERS:
            stats = replace(stats, peer=_OTHERS)
            key = (_OTHERS, stats.backend)
        self._past[key] = _sum(self._past[key], stats) if key in self._past else stats

    def with_live(self, live: Iterable[EdgeStats]) -> tuple[EdgeStats, ...]:
        totals = dict(self._past)
        for stats in live:
            key = (stats.peer, stats.backend)
            totals[key] = _sum(totals[key], stats) if key in totals else stats
        return tuple(totals.values())


def _sum(one: EdgeStats, other: EdgeStats) -> EdgeStats:
    failed = Counter(dict(one.failed)) + Counter(dict(other.failed))
    numbers = {name: getattr(one, name) + getattr(other, name) for name in _NUMBERS}
    return replace(one, failed=tuple(sorted(failed.items())), **numbers)


@dataclass(slots=True)
class EdgeCounters:
    """What an edge counts as it goes; its owner's lock guards it."""

    bytes: int = 0
    moves: int = 0
    committed: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    stale_moves: int = 0
    seconds: float = 0.0

    def stats(self, peer: WorkerId, backend: str, num_outstanding: int, bytes_outstanding: int) -> EdgeStats:
        return EdgeStats(
            peer=peer,
            backend=backend,
            bytes=self.bytes,
            moves=self.moves,
            committed=self.committed,
            failed=tuple(sorted(self.failed.items())),
            stale_moves=self.stale_moves,
            seconds=self.seconds,
            num_outstanding=num_outstanding,
            bytes_outstanding=bytes_outstanding,
        )
