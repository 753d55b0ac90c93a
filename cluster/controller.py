"""Who is alive, which model is where, and where each request runs: the controller, as a plain class that one Ray actor wraps."""

from __future__ import annotations

from collections.abc import Callable

from polymux.cluster.config import ClusterConfig
from polymux.cluster.topology import Expired, Stats, Topology
from polymux.transport.messages import Admit, Joined, ModelSpec, Placement, Release, Reported, WorkerHello, WorkerReport
from polymux.transport.units import ClientId, Epoch, WorkerId


class Controller:
    """Not thread-safe: one actor's event loop calls it. Every method returns at once.

    `clock` is monotonic seconds; `next_epoch` gives numbers that no earlier incarnation of anything has had (nanoseconds since 1970 do).
    """

    def __init__(self, config: ClusterConfig, *, clock: Callable[[], float], next_epoch: Callable[[], int]) -> None: ...

    def register(self, spec: ModelSpec) -> ModelSpec:
        """The spec as kept (with `created`). Raises ConfigError for a bad name, or a name taken by other weights; equal digests are fine."""
        raise NotImplementedError

    def models(self) -> tuple[ModelSpec, ...]:
        """All registered, in the order in which they came."""
        raise NotImplementedError

    def join(self, hello: WorkerHello) -> Joined:
        """A new incarnation of a worker. One of the same id that was alive is lost by this."""
        raise NotImplementedError

    def report(self, report: WorkerReport) -> Reported:
        """Renew the lease, correct the books. Raises StaleEpoch for an incarnation that is gone or was never known: join again."""
        raise NotImplementedError

    def lost(self, worker_id: WorkerId, epoch: Epoch | None = None) -> bool:
        """A worker left or died; with an epoch, only if that incarnation is the present one. False when there was nothing to do."""
        raise NotImplementedError

    def admit(self, ask: Admit) -> Placement:
        """Place every sequence of a request, or raise ModelNotFound, ContextLengthExceeded, Overloaded, ModelLoading, DeadlineExceeded.

        The same ask again gives the same placement. With `excluded`, or where a worker has died since, the sequences that were there
        are placed anew and the others stay: a replay. An id that another client holds is InvalidRequest.
        """
        raise NotImplementedError

    def release(self, release: Release) -> bool:
        """The request has ended. False, and no harm done, when it is not in the books."""
        raise NotImplementedError

    def client_seen(self, client_id: ClientId) -> None:
        """A front door is alive; `admit` says so too."""
        raise NotImplementedError

    def expired(self) -> Expired:
        """Sweep: worker leases, client leases, request deadlines. Call it about once a second."""
        raise NotImplementedError

    def topology(self) -> Topology:
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError
