"""Which backends an edge may try, and why not the others: from what the two sides said of themselves, before anything is tried."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from polymux.transport.messages import Peer
from polymux.transport.nccl.api import version_text
from polymux.transport.protocol import DeviceTerms
from polymux.transport.units import Epoch, WorkerId

# The first that works. Copying from mapped memory needs neither a communicator nor the peer's device, so it comes before NCCL.
BACKENDS = ("local", "cuda_ipc", "nccl", "shm", "tcp")
RETRY_S = 60.0  # after which a backend that failed with a peer is tried again
_MAX_FAILURES = 256
HOST_BACKENDS, DEVICE_BACKENDS = ("local", "shm", "tcp"), ("local", "cuda_ipc", "nccl")


@dataclass(frozen=True, slots=True)
class Side:
    """One end of an edge, as it describes itself."""

    peer: Peer
    device: DeviceTerms
    backends: tuple[str, ...]  # that it offers


def offered(wanted: str, device: DeviceTerms, *, has_descriptor: bool) -> tuple[str, ...]:
    """What a worker with this setting (`auto` or one name) has to offer, in order."""
    able = DEVICE_BACKENDS if device.uuid else HOST_BACKENDS
    unable = {"nccl"} if not device.nccl_version else set()
    if not has_descriptor:
        unable.add("shm")
    return tuple(name for name in able if name not in unable and wanted in ("auto", name))


def to_try(wanted: str, device: DeviceTerms) -> tuple[str, ...]:
    """What a sink with this setting tries, in order."""
    return (wanted,) if wanted != "auto" else DEVICE_BACKENDS if device.uuid else HOST_BACKENDS


def why_not(backend: str, wanted: str, sink: Side, source: Side) -> str | None:
    """Why this backend cannot join these two; None: try it. `wanted` is the sink's setting."""
    here, there = sink.device, source.device
    if bool(here.uuid) != bool(there.uuid):
        return "one side's KV is on a GPU and the other's in host memory"
    if backend == "nccl" and here.uuid and not (here.nccl_version and there.nccl_version):
        return f"no NCCL {'here' if not here.nccl_version else 'there'}: {here.no_nccl or there.no_nccl}"
    if backend not in (DEVICE_BACKENDS if here.uuid else HOST_BACKENDS):
        return f"KV is {'on a GPU' if here.uuid else 'in host memory'}"
    if backend not in source.backends:
        return "the source does not offer it"
    if backend in ("shm", "cuda_ipc") and sink.peer.host_id != source.peer.host_id:
        return "another host"
    is_forced = wanted == "nccl" or source.backends == ("nccl",)
    return _why_not_nccl(here, there, is_forced=is_forced) if backend == "nccl" else None


def _why_not_nccl(here: DeviceTerms, there: DeviceTerms, *, is_forced: bool) -> str | None:
    if here.nccl_version != there.nccl_version:
        return f"NCCL {version_text(here.nccl_version)} here and {version_text(there.nccl_version)} there; run one release of torch"
    if here.uuid == there.uuid and not is_forced:
        return "both are on one GPU, which NCCL refuses"
    return None


class RecentFailures:
    """Backends that broke with one incarnation of a worker: not tried again for a while, and then once. Bounded."""

    def __init__(self) -> None:
        self._failed: OrderedDict[tuple[WorkerId, Epoch, str], tuple[float, str]] = OrderedDict()

    def add(self, peer: Peer, backend: str, why: str, now_s: float) -> None:
        key = (peer.worker_id, peer.epoch, backend)
        self._failed.pop(key, None)
        self._failed[key] = (now_s, why)
        if len(self._failed) > _MAX_FAILURES:
            self._failed.popitem(last=False)

    def why(self, peer: Peer, backend: str, now_s: float) -> str | None:
        """Why not to try it now."""
        failed = self._failed.get((peer.worker_id, peer.epoch, backend))
        if failed is None or now_s - failed[0] > RETRY_S:
            return None
        return f"it failed {now_s - failed[0]:.0f} s ago: {failed[1]}"
