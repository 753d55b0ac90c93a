"""Decode steps of a few sequences in one compiled call, or one a layer: where a step is bound by memory and torch's dispatch costs a third.

numba compiles, when it is installed; torch's own OpenMP team runs, so that no second pool of threads spins beside it. The weights are
oneDNN's packed bytes, read in place: the products of many rows use the same image.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from polymux.kernels import onednn
from polymux.kernels.decode_records import GROUP_LINES, LAYER, MATRIX, RUN, SLOTS, STEP
from polymux.kernels.paged import CacheShape

MAX_ROWS = 16
MAX_ROWS_WITHOUT_TILES = 8  # then the products of more rows are bound by arithmetic, and torch does as well
LANES = 16
COMPILE_S = 120.0  # to wait for another process that compiles
COMPILED = ("decode_layer", "decode_attention", "decode_math", "decode_records", "packed_dot", "packed_sums", "llvm_vectors")


class Layer(Protocol):
    """Views of weights, bf16."""

    @property
    def input_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> Tensor: ...
    @property
    def qkv_bias(self) -> Tensor | None: ...
    @property
    def head_norms(self) -> Tensor | None: ...
    @property
    def output(self) -> Tensor: ...
    @property
    def output_bias(self) -> Tensor | None: ...
    @property
    def post_norm(self) -> Tensor: ...
    @property
    def gate(self) -> Tensor: ...
    @property
    def gate_bias(self) -> Tensor | None: ...
    @property
    def up(self) -> Tensor: ...
    @property
    def up_bias(self) -> Tensor | None: ...
    @property
    def down(self) -> Tensor: ...
    @property
    def down_bias(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    num_heads: int
    eps: float
    scale: float
    windows: Sequence[int | None]  # by layer


class FewRows:
    """One bound model's decode steps. Its tensors, and those given to `begin` until the step's end, must outlive it; one thread uses it."""

    def __init__(self, layers: Sequence[Layer], final_norm: Tensor, head: Tensor, kv: Tensor, heads: Heads) -> None:
        """Raises ValueError for weights or a cache that the compiled layer cannot read."""
        shape = CacheShape.of(kv)
        if kv.dtype != torch.bfloat16 or shape.head_dim % (2 * LANES) or shape.block_size % LANES:
            raise ValueError(
                f"a cache of {kv.dtype} and heads of {shape.head_dim} in blocks of {shape.block_size} is not read in whole vectors"
            )
        self._size, self._vocab_size = final_norm.shape[0], head.shape[0]
        self._records = np.zeros(len(layers) + 1, LAYER)
        self._run = np.zeros(1, RUN)
        strip = 2 * shape.block_size * shape.head_dim
        for i, (layer, window) in enumerate(zip(layers, heads.windows, strict=True)):
            record = self._records[i]
            for name in ("input_norm", "head_norms", "post_norm"):
                record[name] = _address(getattr(layer, name))
            for name in ("qkv", "output", "gate", "up", "down"):
                record[name] = _matrix(getattr(layer, name), getattr(layer, f"{name}_bias"))
            record["k"] = kv.data_ptr() + i * 2 * shape.num_kv_heads * strip
            record["v"] = record["k"] + shape.num_kv_heads * strip
            record["window"] = window or 0
        last = self._records[-1]
        last["input_norm"], last["qkv"] = _address(final_norm), _matrix(head, None)
        self._step = self._first_step(shape, heads)
        self._compiled = compiled()
        self._run["layers"], self._run["last"] = self._records.ctypes.data, len(layers)
        self._alive: tuple[object, ...] = ()
        self._kept = (layers, final_norm, head, kv)
        self._memory: list[Tensor] = []
        self._num_threads = 0
        self.max_rows = MAX_ROWS if self._compiled.tiles[1] is not None else MAX_ROWS_WITHOUT_TILES

    def without_tiles(self) -> None:
        """From now on as on a CPU that has none."""
        self._compiled = replace(self._compiled, tiles=(None,) * (MAX_ROWS + 1))
        self.max_rows = MAX_ROWS_WITHOUT_TILES

    def _first_step(self, shape: CacheShape, heads: Heads) -> Any:
        step = np.zeros(1, STEP)[0]
        step["size"], step["num_heads"], step["num_kv_heads"] = self._size, heads.num_heads, shape.num_kv_heads
        step["head_dim"], step["slots"] = shape.head_dim, shape.block_size
        step["block_bytes"] = 2 * shape.strips_per_block * shape.block_size * shape.head_dim
        step["eps"], step["scale"] = heads.eps, heads.scale
        attention = LANES * (2 * shape.head_dim + SLOTS + 4)
        step["scratch_bytes"] = -(-4 * max(GROUP_LINES * LANES * MAX_ROWS, attention) // 64) * 64
        return step

    def _take_memory(self, num_threads: int) -> None:
        """Room between the steps of a layer, for the most rows. Rows of what products read are padded, and the padding stays zero."""
        step, first, last = self._step, self._records[0], self._records[-1]
        widest = 2 * max(int(m["pairs"]) for m in (first["qkv"], first["gate"], last["qkv"]))
        sizes = {
            "heads": 4 * int(first["qkv"]["rows"]) * MAX_ROWS,
            "attended": 4 * int(first["output"]["pairs"]) * MAX_ROWS,
            "hidden": 4 * int(first["down"]["pairs"]) * MAX_ROWS,
            "normed": 2 * widest * MAX_ROWS * num_threads,
            "scratch": int(step["scratch_bytes"]) * num_threads,
        }
        self._memory = []
        for name, nbytes in sizes.items():
            memory = torch.zeros(nbytes + 64, dtype=torch.uint8)
            self._memory.append(memory)
            step[name] = -(-memory.data_ptr() // 64) * 64
        self._num_threads = num_threads

    def begin(self, x: Tensor, tables: Sequence[Sequence[int]], lengths: Sequence[int], cos: Tensor, sin: Tensor) -> None:
        """A step of one token each of sequences with `lengths` tokens in the cache. x [T, H] is overwritten; cos and sin as of `rotate`."""
        num_rows, longest = x.shape[0], max(map(len, tables))
        assert num_rows <= MAX_ROWS and x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        if torch.get_num_threads() != self._num_threads:
            self._take_memory(torch.get_num_threads())
        padded = np.zeros((num_rows, longest), np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        counts = np.array(lengths, np.int64)
        logits = torch.empty(num_rows, self._vocab_size)
        tiles, wide_tiles = self._compiled.tiles[num_rows], self._compiled.tiles[MAX_ROWS]
        step = self._step
        step["rows"], step["table_size"] = num_rows, longest
        step["tables"], step["lengths"] = padded.ctypes.data, counts.ctypes.data
        step["x"], step["cos"], step["sin"], step["logits"] = (_address(tensor) for tensor in (x, cos, sin, logits))
        step["tiles"] = tiles.ctypes.data if tiles is not None else 0
        step["wide_tiles"] = wide_tiles.ctypes.data if wide_tiles is not None else 0
        self._alive = (x, cos, sin, padded, counts, tiles, wide_tiles)
        self._logits = logits

    def layers(self, first: int, end: int) -> None:
        """Layers `first` to `end` of the step: afterwards their K and V are in the cache."""
        self._compute(first, end)

    def logits(self, first: int | None = None) -> Tensor:
        """fp32 [T, V], as bf16 holds them, after the last layer; and after layers `first` to the last, which are run at once, if given."""
        last = len(self._records) - 1
        self._compute(last if first is None else first, last + 1)
        return self._logits

    def _compute(self, first: int, end: int) -> None:
        self._run["first"], self._run["end"], self._run["step"] = first, end, self._step
        self._compiled.parallel(self._compiled.run, self._run.ctypes.data, self._num_threads, 0)


@dataclass(frozen=True, slots=True)
class Compiled:
    run: int  # address of the C function
    tiles: tuple[Any, ...]  # by number of rows: their configuration, or None
    parallel: Callable[..., None]
    alive: object


@cache
def is_available() -> bool:
    """Whether numba is installed, torch's OpenMP is the one whose team we can join, and packed weights lie as we read them."""
    if platform.machine() != "x86_64" or find_spec("numba") is None or _openmp() is None or not onednn.is_available(torch.bfloat16):
        return False
    weight = torch.arange(70 * 100, dtype=torch.bfloat16).view(70, 100)
    packed = onednn.pack(weight)
    layout = onednn.pair_layout(packed.owner)
    view = onednn.row_view(torch.frombuffer(packed.memory, dtype=torch.uint8), weight)
    return layout is not None and view is not None and tuple(view.shape[1:]) == (layout.pairs, layout.block, 2)


@cache
def _openmp() -> Any:
    library = onednn.torch_library()
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    return library if all(hasattr(library, name) for name in names) else None


@cache
def compiled() -> Compiled:
    """The compiled functions of this process."""
    from llvmlite import binding

    library = _openmp()
    for name in ("GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
        binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    from polymux.kernels import decode_layer, packed_dot

    folder = _cache_folder()
    with _alone_in(folder):
        run = decode_layer.compile_run(folder)
    parallel = library.GOMP_parallel
    parallel.restype, parallel.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    has_tiles = packed_dot.HAS_TILES and torch.cpu._init_amx()
    tiles = [np.frombuffer(packed_dot.tile_configuration(n), np.uint8) if has_tiles and n else None for n in range(MAX_ROWS + 1)]
    return Compiled(run.address, tuple(tiles), parallel, run)


def _cache_folder() -> str | None:
    """Where compiled code outlives the process, by the sources it came from; None when there is no such place."""
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in COMPILED]
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "polymux" / hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return str(folder) if os.access(folder, os.W_OK) else None


@contextmanager
def _alone_in(folder: str | None) -> Iterator[None]:
    """One process of the machine compiles, and those that wait find its code; for `COMPILE_S` at most, then this one compiles too."""
    if folder is None:
        yield
        return
    with (Path(folder) / "lock").open("w") as file:
        until_s = time.monotonic() + COMPILE_S
        while not _try_lock(file) and time.monotonic() < until_s:
            time.sleep(0.1)
        yield  # closing the file lets go of the lock


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(weight: Tensor, bias: Tensor | None) -> Any:
    layout = onednn.pair_layout(weight)
    if layout is None:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not packed in pairs of columns")
    record = np.zeros(1, MATRIX)[0]
    record["weight"], record["bias"], record["rows"] = onednn.address(weight), _address(bias), weight.shape[0]
    record["pairs"], record["lines"] = layout.pairs, layout.block // LANES
    return record
