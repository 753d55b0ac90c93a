"""The few calls of the CUDA runtime that KV edges need, typed, over the library that torch has loaded already.

torch has no way to export a whole allocation once and to name bytes in it by offset, nor to ask for another process's event, so these go
to the library itself. Nothing here waits for the device but `free`, `free_pinned` and `close_memory`, at the end of a worker or an edge.
A stream, an event and an address are plain integers. Every failure is a CudaError.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from pathlib import Path

from polymux.transport.errors import CudaError
from polymux.transport.units import MIB

HANDLE_BYTES = 64  # of CUDA IPC, for memory and for events
PIECE_BYTES = 2 * MIB  # of device memory: smaller allocations may share one, and a handle exports all that is in it
_NOT_READY = 600
_STICKY = frozenset({4, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 810, 911, 999})  # the context is lost with all it holds
_NON_BLOCKING = 0x01  # a stream beside the default one
_DISABLE_TIMING, _INTERPROCESS = 0x02, 0x04
_ENABLE_PEER = 0x01
_PROPERTIES_BYTES = 8192  # more than cudaDeviceProp of any release
_UUID_OFFSET = 256  # behind its name


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_char * HANDLE_BYTES)]


_SIGNATURES: dict[str, list[object]] = {
    "cudaRuntimeGetVersion": [POINTER(c_int)],
    "cudaGetDeviceCount": [POINTER(c_int)],
    "cudaSetDevice": [c_int],
    "cudaMalloc": [POINTER(c_void_p), c_size_t],
    "cudaFree": [c_void_p],
    "cudaHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cudaFreeHost": [c_void_p],
    "cudaDeviceGetStreamPriorityRange": [POINTER(c_int), POINTER(c_int)],
    "cudaStreamCreateWithPriority": [POINTER(c_void_p), c_uint, c_int],
    "cudaStreamDestroy": [c_void_p],
    "cudaStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cudaEventCreateWithFlags": [POINTER(c_void_p), c_uint],
    "cudaEventRecord": [c_void_p, c_void_p],
    "cudaEventQuery": [c_void_p],
    "cudaEventDestroy": [c_void_p],
    "cudaIpcGetMemHandle": [POINTER(_Handle), c_void_p],
    "cudaIpcOpenMemHandle": [POINTER(c_void_p), _Handle, c_uint],
    "cudaIpcCloseMemHandle": [c_void_p],
    "cudaIpcGetEventHandle": [POINTER(_Handle), c_void_p],
    "cudaIpcOpenEventHandle": [POINTER(c_void_p), _Handle],
}


class CudaRuntime:
    """One loaded libcudart. Streams and events belong to the device that was set in the calling thread when they were made."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = c_int, arguments
        properties = "cudaGetDeviceProperties_v2" if hasattr(library, "cudaGetDeviceProperties_v2") else "cudaGetDeviceProperties"
        self._properties = getattr(library, properties)
        self._properties.restype, self._properties.argtypes = c_int, [c_void_p, c_int]
        library.cudaGetErrorString.restype, library.cudaGetErrorString.argtypes = c_char_p, [c_int]
        library.cudaGetLastError.restype, library.cudaGetLastError.argtypes = c_int, []

    @classmethod
    def load(cls, path: str | None = None) -> CudaRuntime:
        """The runtime of this process's torch, or the one at `path`. Raises OSError where there is none."""
        return cls(ctypes.CDLL(path)) if path else _of_torch()

    def version(self) -> int:
        found = c_int()
        self._call("cudaRuntimeGetVersion", byref(found))
        return found.value

    def num_devices(self) -> int:
        """0 where there is no driver."""
        found = c_int()
        if self._library.cudaGetDeviceCount(byref(found)):
            self._library.cudaGetLastError()
            return 0
        return found.value

    def uuid(self, device: int) -> str:
        """Names the device to every process that sees it, whatever number it has there."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        self._check("cudaGetDeviceProperties", self._properties(properties, device))
        return "GPU-" + properties.raw[_UUID_OFFSET : _UUID_OFFSET + 16].hex()

    def set_device(self, device: int) -> None:
        """For the calling thread."""
        self._call("cudaSetDevice", device)

    def malloc(self, nbytes: int) -> int:
        """One allocation of its own, which can be exported whole."""
        return self._made("cudaMalloc", -(-nbytes // PIECE_BYTES) * PIECE_BYTES)

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, nbytes: int) -> int:
        """Host memory that the device reads and writes at full speed."""
        return self._made("cudaHostAlloc", nbytes, 0)

    def free_pinned(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def stream(self, *, is_urgent: bool = False) -> int:
        """A stream of its own; one that is not urgent gives way to the streams of the computation."""
        least, greatest = c_int(), c_int()
        self._call("cudaDeviceGetStreamPriorityRange", byref(least), byref(greatest))
        return self._made("cudaStreamCreateWithPriority", _NON_BLOCKING, greatest.value if is_urgent else least.value)

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def wait_event(self, stream: int, event: int) -> None:
        """What is enqueued from here on waits for the event, on the device."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def event(self, *, is_interprocess: bool = False) -> int:
        return self._made("cudaEventCreateWithFlags", _DISABLE_TIMING | (_INTERPROCESS if is_interprocess else 0))

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", event, stream)

    def is_done(self, event: int) -> bool:
        """Whether all that was enqueued before the event's last record is finished."""
        code = self._library.cudaEventQuery(event)
        if code == _NOT_READY:
            self._library.cudaGetLastError()  # or the next caller of it, torch perhaps, takes it for an error
            return False
        self._check("cudaEventQuery", code)
        return True

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def memory_handle(self, address: int) -> bytes:
        """Names an allocation of `malloc` to other processes of this host."""
        handle = _Handle()
        self._call("cudaIpcGetMemHandle", byref(handle), address)
        return bytes(handle)

    def open_memory(self, handle: bytes) -> int:
        """Map another process's allocation; where it begins here. One's own cannot be opened."""
        return self._made("cudaIpcOpenMemHandle", _Handle.from_buffer_copy(handle), _ENABLE_PEER)

    def close_memory(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", address)

    def event_handle(self, event: int) -> bytes:
        handle = _Handle()
        self._call("cudaIpcGetEventHandle", byref(handle), event)
        return bytes(handle)

    def open_event(self, handle: bytes) -> int:
        return self._made("cudaIpcOpenEventHandle", _Handle.from_buffer_copy(handle))

    def _made(self, call: str, *arguments: object) -> int:
        made = c_void_p()
        self._call(call, byref(made), *arguments)
        return made.value or 0

    def _call(self, call: str, *arguments: object) -> None:
        self._check(call, getattr(self._library, call)(*arguments))

    def _check(self, call: str, code: int) -> None:
        if code:
            self._library.cudaGetLastError()
            text = self._library.cudaGetErrorString(code).decode(errors="replace")
            error = CudaError(f"{call}: {text} (CUDA error {code})")
            error.is_sticky = code in _STICKY
            raise error


@cache
def _of_torch() -> CudaRuntime:
    """torch's own copy: two runtimes in one process would share a context, but not what they know of it."""
    import torch

    if torch.version.cuda is None:
        raise OSError("torch was built without CUDA")
    name = f"libcudart.so.{torch.version.cuda.split('.')[0]}"
    try:
        return CudaRuntime(ctypes.CDLL(name))  # loaded already, so found by its name
    except OSError:
        found = [path for root in sys.path for path in Path(root).glob(f"nvidia/*/lib/{name}")]
        if not found:
            raise
        return CudaRuntime(ctypes.CDLL(str(found[0])))
