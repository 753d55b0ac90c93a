"""The few calls of the CUDA driver that torch has no door for: one plain allocation, and pinning memory that somebody else mapped.

The driver rather than the runtime: its library has one name and a stable interface, whichever CUDA torch was built with; and a call that
fails leaves no error behind for torch's next check to find. `cuMemAlloc` is what `cudaMalloc` calls, so the memory can be shared over IPC.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache

from polymux.transport.cuda.runtime import PIECE_BYTES
from polymux.transport.errors import ConfigError, OutOfMemory, PolymuxError

PORTABLE, READ_ONLY = 0x01, 0x08  # of CU_MEMHOSTREGISTER_*
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

_Pointer = ctypes.c_uint64  # CUdeviceptr


class Driver:
    """Of one device. From any thread: each is bound to the context that torch uses, the primary one, when it first calls."""

    def __init__(self, ordinal: int) -> None:
        """`ordinal` as torch counts. Raises ConfigError where there is no driver or no such device."""
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ConfigError(f"device=cuda needs NVIDIA's driver, and libcuda.so.1 cannot be loaded: {error}; use device=cpu") from error
        self._context = ctypes.c_void_p()
        self._bound = threading.local()
        device = ctypes.c_int()
        self._declare()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def _declare(self) -> None:
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        signatures = {
            "cuInit": [ctypes.c_uint],
            "cuDeviceGet": [pointer, ctypes.c_int],
            "cuDevicePrimaryCtxRetain": [pointer, ctypes.c_int],
            "cuCtxSetCurrent": [pointer],
            "cuMemAlloc_v2": [pointer, size],
            "cuMemFree_v2": [_Pointer],
            "cuMemHostRegister_v2": [pointer, size, ctypes.c_uint],
            "cuMemHostUnregister": [pointer],
            "cuGetErrorName": [ctypes.c_int, pointer],
        }
        for name, arguments in signatures.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int

    def allocate(self, nbytes: int) -> int:
        """The address of that much device memory, alone in its pieces. Raises OutOfMemory, or PolymuxError with the driver's reason."""
        self._bind()
        address = _Pointer()
        status = self._library.cuMemAlloc_v2(ctypes.byref(address), -(-nbytes // PIECE_BYTES) * PIECE_BYTES)
        if status == _OUT_OF_MEMORY:
            raise OutOfMemory(f"the GPU has no {nbytes} bytes in one piece for the arena; lower arena_bytes, or see who else uses it")
        self._check("cuMemAlloc", status)
        return address.value

    def free(self, address: int) -> None:
        self._bind()
        self._call("cuMemFree_v2", address)

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Pin mapped host memory, whole pages of it. Raises PolymuxError with the driver's reason."""
        self._bind()
        self._call("cuMemHostRegister_v2", address, nbytes, PORTABLE | (READ_ONLY if read_only else 0))

    def unregister(self, address: int) -> None:
        self._bind()
        self._call("cuMemHostUnregister", address)

    def _bind(self) -> None:
        if not getattr(self._bound, "is_done", False):
            self._call("cuCtxSetCurrent", self._context)
            self._bound.is_done = True

    def _call(self, name: str, *arguments: object) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise PolymuxError(f"{name} failed with {(text.value or b'an unknown error').decode()} ({status})")


@cache
def driver(ordinal: int) -> Driver:
    return Driver(ordinal)
