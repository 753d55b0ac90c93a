"""The few calls of NCCL that KV edges and an instance's ranks need, typed, over torch's own libnccl; two releases would not agree.

An edge's communicator has two ranks and does not block: a call that is not finished says so (`IN_PROGRESS`), and `async_error` tells when
it is. An instance's one blocks: what a call enqueues is on its stream when the call returns. A communicator is a plain integer. Whatever
NCCL refuses is an NcclError.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

from polymux.transport.errors import NcclError, PolymuxError

LIBRARY_VARIABLE = "POLYMUX_NCCL_LIBRARY"
UNIQUE_ID_BYTES = 128
NUM_RANKS = 2
SUCCESS, IN_PROGRESS, REMOTE_ERROR = 0, 7, 6
MIN_VERSION = 21800  # whose configuration is the one below
_LIBRARY = "libnccl.so.2"
_MAGIC = 0xCAFEBEEF
_UNSET = -(2**31)
_UINT8 = 1
_TYPES = {"int64": 4, "float16": 6, "float32": 7, "bfloat16": 9}  # of what is summed
_SUM = 0


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", c_char * UNIQUE_ID_BYTES)]


class _Config(ctypes.Structure):
    """`ncclConfig_t` of release 2.18. It only grows: a newer library reads `version` and fills in the rest by itself."""

    _fields_ = [
        ("size", c_size_t),
        ("magic", c_uint),
        ("version", c_uint),
        ("blocking", c_int),
        ("cga_cluster_size", c_int),
        ("min_ctas", c_int),
        ("max_ctas", c_int),
        ("net_name", c_char_p),
        ("split_share", c_int),
    ]


_SIGNATURES: dict[str, list[object]] = {
    "ncclGetVersion": [POINTER(c_int)],
    "ncclGetUniqueId": [POINTER(_UniqueId)],
    "ncclCommInitRankConfig": [POINTER(c_void_p), c_int, _UniqueId, c_int, POINTER(_Config)],
    "ncclCommGetAsyncError": [c_void_p, POINTER(c_int)],
    "ncclCommAbort": [c_void_p],
    "ncclSend": [c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclRecv": [c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclAllReduce": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclAllGather": [c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p],
    "ncclBroadcast": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
}


class Nccl:
    """One loaded libnccl. Raises OSError or AttributeError where it is not one, NcclError where it is too old."""

    def __init__(self, library: ctypes.CDLL, path: str = "") -> None:
        self.path = path
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = c_int, arguments
        library.ncclGetErrorString.restype, library.ncclGetErrorString.argtypes = c_char_p, [c_int]
        library.ncclGetLastError.restype, library.ncclGetLastError.argtypes = c_char_p, [c_void_p]
        found = c_int()
        self._check("ncclGetVersion", library.ncclGetVersion(byref(found)))
        self.version = found.value
        if self.version < MIN_VERSION:
            raise NcclError(f"NCCL {version_text(self.version)} is older than {version_text(MIN_VERSION)}")

    @classmethod
    def load(cls, path: str | None = None) -> Nccl:
        """The library at `path`, else the one that the environment names, else torch's."""
        chosen = path or os.environ.get(LIBRARY_VARIABLE) or find_library()
        return cls(ctypes.CDLL(chosen), chosen)

    def unique_id(self) -> bytes:
        """Where the ranks of one communicator meet. Never used twice. This process listens there from now on."""
        made = _UniqueId()
        self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(byref(made)))
        return bytes(made)

    def init(
        self, unique_id: bytes, rank: int, num_ranks: int = NUM_RANKS, *, is_blocking: bool = False, max_ctas: int | None = None
    ) -> int:
        """Begin to join; the communicator is usable once `async_error` says SUCCESS. On the calling thread's device.

        `is_blocking`: return when every rank has come, which may be never; its operations are enqueued when their calls return.
        """
        config = _Config(
            size=ctypes.sizeof(_Config),
            magic=_MAGIC,
            version=MIN_VERSION,
            blocking=int(is_blocking),
            cga_cluster_size=_UNSET,
            min_ctas=_UNSET,
            max_ctas=_UNSET if max_ctas is None else max_ctas,
            net_name=None,
            split_share=_UNSET,
        )
        made = c_void_p()
        name = _UniqueId.from_buffer_copy(unique_id)
        code = self._library.ncclCommInitRankConfig(byref(made), num_ranks, name, rank, byref(config))
        if code not in (SUCCESS, IN_PROGRESS):
            self._check("ncclCommInitRankConfig", code)
        return made.value or 0

    def async_error(self, comm: int) -> int:
        """SUCCESS, IN_PROGRESS, or the code of what went wrong since."""
        state = c_int()
        self._check("ncclCommGetAsyncError", self._library.ncclCommGetAsyncError(comm, byref(state)))
        return state.value

    def send(self, comm: int, address: int, nbytes: int, peer: int, stream: int) -> None:
        """Enqueue; not on the stream before `async_error` says SUCCESS."""
        self._check("ncclSend", self._library.ncclSend(address, nbytes, _UINT8, peer, comm, stream))

    def recv(self, comm: int, address: int, nbytes: int, peer: int, stream: int) -> None:
        self._check("ncclRecv", self._library.ncclRecv(address, nbytes, _UINT8, peer, comm, stream))

    def all_reduce(self, comm: int, address: int, count: int, dtype: str, stream: int) -> None:
        """Enqueue the sum over all ranks, in place; in which order the ranks' parts are added depends on where a number stands."""
        self._check("ncclAllReduce", self._library.ncclAllReduce(address, address, count, _TYPES[dtype], _SUM, comm, stream))

    def all_gather(self, comm: int, source: int, target: int, nbytes: int, stream: int) -> None:
        """Enqueue: every rank's `nbytes`, one after another, to `target` on every rank."""
        self._check("ncclAllGather", self._library.ncclAllGather(source, target, nbytes, _UINT8, comm, stream))

    def broadcast(self, comm: int, address: int, nbytes: int, stream: int) -> None:
        """Enqueue: rank 0's bytes to the same place of every rank's own."""
        self._check("ncclBroadcast", self._library.ncclBroadcast(address, address, nbytes, _UINT8, 0, comm, stream))

    @contextmanager
    def group(self) -> Iterator[None]:
        """Sends and receives in this block are one operation, in which none waits for another."""
        self._check("ncclGroupStart", self._library.ncclGroupStart())
        try:
            yield
        finally:
            code = self._library.ncclGroupEnd()
        self._check("ncclGroupEnd", code)

    def abort(self, comm: int) -> None:
        """Give everything back, whatever the peer does. May take long, or for ever: not for a thread that is needed."""
        self._check("ncclCommAbort", self._library.ncclCommAbort(comm))

    def text(self, code: int, comm: int = 0) -> str:
        """What an error code means, and what NCCL last complained of."""
        said = (self._library.ncclGetErrorString(code) or b"").decode(errors="replace")
        last = (self._library.ncclGetLastError(comm or None) or b"").decode(errors="replace").strip()
        return f"{said} ({last})" if last else said

    def _check(self, call: str, code: int) -> None:
        if code not in (SUCCESS, IN_PROGRESS):
            raise NcclError(f"{call}: {self.text(code)}")


def load_error(error: Exception) -> PolymuxError:
    """Why `Nccl.load` failed, as one of ours."""
    return error if isinstance(error, PolymuxError) else NcclError(f"libnccl cannot be loaded: {error}")


def find_library() -> str:
    """torch's libnccl: the one in this process already, the wheel beside torch, or what the system's loader finds by name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and Path(fields[5]).name.startswith(_LIBRARY):
            return fields[5]
    wheels = (Path(root, "nvidia", "nccl", "lib", _LIBRARY) for root in sys.path if root)
    return next((str(path) for path in wheels if path.exists()), _LIBRARY)


def version_text(version: int) -> str:
    """22907 as people write it."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
