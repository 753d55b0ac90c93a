"""Linear weights in oneDNN's blocked layout: pack them, take their bytes, and use those bytes again from any memory, without a copy.

torch packs for its own use only and keeps the result opaque. The bytes are reachable all the same: `pack` gives them with oneDNN's
description of the layout, and `bind` makes of both a tensor over memory that the caller owns. The layout belongs to the CPU that packed.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; what oneDNN wants of a buffer
MIN_PACKED_FP32 = 1 << 20  # elements; measured: at 0.6 million even, at 1 million ahead from 4 rows on

_NUM_WORDS = 136  # of oneDNN's description that `pair_layout` reads

_mkldnn: Any = torch.ops.mkldnn


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed weight. `memory` is a view of bytes that `owner` holds."""

    memory: memoryview
    metadata: bytes  # oneDNN's own serialized description
    owner: Tensor


def pack(weight: Tensor, *, for_few_rows: bool = False) -> Packed:
    """Reorder a dense weight [out, in] into the layout that this CPU multiplies fastest. Holds both copies while it runs.

    `for_few_rows` may choose one that streams faster at up to 16 rows (a tenth, in bf16 with AMX) and multiplies many rows slower.
    """
    hint = 1 if for_few_rows and weight.dtype != torch.float32 else None
    packed = _mkldnn._reorder_linear_weight(weight.contiguous(), hint)
    nbytes = _mkldnn._nbytes(packed)
    memory = memoryview((ctypes.c_char * nbytes).from_address(_mkldnn.data_ptr(packed))).cast("B")
    return Packed(memory, bytes(_mkldnn._get_mkldnn_serialized_md(packed).tolist()), packed)


def use_one_thread() -> None:
    """From now on what the calling thread asks of torch runs in that thread alone, whatever `torch.set_num_threads` says of others.

    For threads that pack beside each other: were each to lead a team, the teams would share the cores and spin while they wait for them.
    """
    torch.get_num_threads()  # torch sets its own number at a thread's first question
    set_num_threads = getattr(torch_library(), "omp_set_num_threads", None)
    if set_num_threads is not None:
        set_num_threads(1)


def pays_off(weight: Tensor) -> bool:
    """Whether packing this weight [out, in] gains anything. In fp32 MKL is ahead while a weight stays in cache, and oneDNN keeps some
    half a megabyte of generated code for each shape and count of rows, which a catalogue of small models would add up."""
    return weight.dtype != torch.float32 or weight.numel() >= MIN_PACKED_FP32


def row_view(packed: Tensor, weight: Tensor) -> Tensor | None:
    """Packed bytes as [row blocks, columns / n, rows of a block, n], whose single rows `embed` reads; None when they lie otherwise.

    oneDNN's layouts of a plain product differ in the two block sizes only; they are found by comparing rows, to the bit.
    """
    values = packed.view(weight.dtype)
    num_rows, num_columns = weight.shape
    rows = torch.linspace(0, num_rows - 1, min(num_rows, 256)).long()
    for block, interleave in itertools.product((64, 48, 32, 16, 8), (1, 2, 4)):
        columns, rest = divmod(values.numel(), -(-num_rows // block) * block)
        if rest or columns < num_columns or columns % interleave:
            continue
        view = values.view(-1, columns // interleave, block, interleave)
        if torch.equal(embed(view, rows)[:, :num_columns], weight[rows]):
            return view
    return None


def embed(view: Tensor, token_ids: Tensor) -> Tensor:
    """Rows [T, columns] of a `row_view`, with the columns that padding added."""
    block = view.shape[2]
    return view[token_ids // block, :, token_ids % block].flatten(1)


def bind(memory: Tensor, metadata: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The opaque weight [out, in] over packed bytes; `memory`, uint8 and 64-byte aligned, must outlive it. Copies nothing.

    Raises ValueError when the description wants other bytes than `memory` has, RuntimeError when torch refuses it.
    """
    assert memory.data_ptr() % ALIGNMENT == 0, f"packed weights lie at {memory.data_ptr():#x}, off the {ALIGNMENT}-byte grid"
    create, steal, layout, dtypes = _entry_points()
    handle = ctypes.c_void_p()
    status = create(
        memory.data_ptr(),
        2,
        (ctypes.c_int64 * 2)(*shape),
        (ctypes.c_int64 * 2)(shape[1], 1),
        0,
        dtypes[dtype],
        0,  # device type: CPU
        0,
        ctypes.byref(handle),
        layout,
        metadata,
        len(metadata),
    )
    if status:
        raise RuntimeError(f"torch refused a packed weight of shape {shape} and {dtype}")
    weight = steal(handle)
    if _mkldnn._nbytes(weight) != memory.numel():
        raise ValueError(f"a packed weight of shape {shape} describes {_mkldnn._nbytes(weight)} bytes and has {memory.numel()}")
    return weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return _linear(x, weight, bias, activation, [], "")


def linear_binary(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, operation: str) -> Tensor:
    """`linear(x) operation other` in one pass; operation is "add" or "mul"."""
    return _linear_binary(x, other, weight, bias, operation)


_linear: Callable[..., Tensor] = _mkldnn._linear_pointwise.default
_linear_binary: Callable[..., Tensor] = _mkldnn._linear_pointwise.binary


@cache
def is_available(dtype: torch.dtype) -> bool:
    """Whether this torch on this CPU packs, binds and multiplies weights of `dtype`: tried, not guessed."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.linspace(-1, 1, 48 * 64).view(48, 64).to(dtype)
    x = torch.linspace(-1, 1, 3 * 64).view(3, 64).to(dtype)
    try:
        packed = pack(weight)
        memory = torch.empty(len(packed.memory) + ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT
        memory = memory[start : start + len(packed.memory)]
        memory.copy_(torch.frombuffer(packed.memory, dtype=torch.uint8))
        found = linear(x, bind(memory, packed.metadata, (48, 64), dtype), None)
    except (RuntimeError, AttributeError, OSError):
        return False
    return torch.allclose(found.float(), x.float() @ weight.float().t(), rtol=2e-2, atol=2e-2)


@cache
def _entry_points() -> tuple[Callable[..., int], Callable[[ctypes.c_void_p], Tensor], int, dict[torch.dtype, int]]:
    """torch's C entry points for a tensor over foreign memory, the number of the oneDNN layout, and the numbers of the dtypes."""
    library = torch_library()
    create = library.aoti_torch_create_tensor_from_blob_v2
    create.restype = ctypes.c_int32
    pointer, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    sizes = ctypes.POINTER(int64)
    create.argtypes = [pointer, int64, sizes, sizes, int64, int32, int32, int32, ctypes.POINTER(pointer), int32, ctypes.c_char_p, int64]
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = [pointer, ctypes.c_char_p, pointer]
    take: Callable[[Any], Tensor] = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr

    def steal(handle: ctypes.c_void_p) -> Tensor:
        return take(capsule(handle, None, None))

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    dtypes = {dtype: getattr(library, f"aoti_torch_dtype_{name}")() for dtype, name in names.items()}
    return create, steal, library.aoti_torch_layout__mkldnn(), dtypes


@cache
def torch_library() -> ctypes.CDLL:
    """Which also finds the symbols of the OpenMP that torch runs on."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@dataclass(frozen=True, slots=True)
class PairLayout:
    """[row blocks, pairs, block, 2]: neighbouring columns of a row lie side by side, and rows of a block beside each other."""

    block: int
    pairs: int


def pair_layout(weight: Tensor) -> PairLayout | None:
    """The layout of a packed bf16 weight, read from oneDNN's description; None when it lies otherwise, or is not packed."""
    if not weight.is_mkldnn or weight.dtype != torch.bfloat16:
        return None
    description = bytes(_mkldnn._get_mkldnn_serialized_md(weight).tolist())
    if len(description) < 4 * _NUM_WORDS:
        return None
    words = np.frombuffer(description[: 4 * _NUM_WORDS], np.int32)
    (rows, columns), padded = weight.shape, (int(words[28]), int(words[30]))
    blocks, dims = words[106:112:2].tolist(), words[130:136:2].tolist()  # inner ones, and whether of rows or columns
    strides = (int(words[80]), int(words[82]))
    if (int(words[2]), int(words[4])) != (rows, columns) or words[104] != 3 or dims != [1, 0, 1] or blocks[0] != 16 or blocks[2] != 2:
        return None
    block, is_dense = blocks[1], strides == (padded[1] * blocks[1], 2 * blocks[0] * blocks[1])
    return PairLayout(block, padded[1] // 2) if is_dense and block in (32, 64) and padded[0] == -(-rows // block) * block else None


def address(weight: Tensor) -> int:
    """Of a packed weight's bytes."""
    found: int = _mkldnn.data_ptr(weight)
    return found
