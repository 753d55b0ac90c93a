"""Compiles the operations' kernels, as their own wrappers launch them, for a chip that need not be here; prints facts as JSON.

A process of its own, since the interpreter must be off: python compiled_ops.py ARCH
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from polymux.kernels.gpu import blocks, edit_logits, pick, rms_norm, rotate_write, silu_mul
from polymux.kernels.paged import CacheShape
from polymux.kernels.row_sampling import Edits, Picks, RowPick, pack_picks
from polymux.kernels.sample import Draw

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def compile_instead(
    target: GPUTarget, found: list[dict[str, Any]], kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any
) -> None:
    """In the place of a launch: specialize on the arguments as Triton does, and compile."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: options.pop(name) for name in list(options) if name in names}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
            attributes[i,] = [["tt.divisibility", 16]] if value % 16 == 0 and not parameter.do_not_specialize else []
    source = ASTSource(kernel, signature, constexprs=constants, attrs={at: kinds for at, kinds in attributes.items() if kinds})
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    found.append(
        {
            "kernel": kernel.__name__,
            "fma": len(re.findall(r"\bfma\.rn\.f(?:32|64)\b", ptx)),
            "wide_loads": len(re.findall(r"\bld\.global[.\w:]*\.(?:v4\.b32|v2\.b64)", ptx)),
            "wide_stores": len(re.findall(r"\bst\.global[.\w:]*\.(?:v4\.b32|v2\.b64)", ptx)),
            "shared_bytes": compiled.metadata.shared,
        }
    )


def launches() -> Iterator[Callable[[], object]]:
    x = torch.zeros(4, 3584, dtype=torch.bfloat16)
    yield partial(rms_norm.rms_norm, x, x[0], 1e-6)
    yield partial(rms_norm.add_rms_norm, x, x, x[0], 1e-6)
    yield partial(silu_mul.silu_mul, *torch.zeros(4, 2 * 18944, dtype=torch.bfloat16).chunk(2, dim=1))
    for dim in (64, 96, 128):
        yield rotation(dim, torch.bfloat16)
    kv = torch.zeros(4, 2, 2, 4, 16, 128, dtype=torch.bfloat16)
    ids = torch.zeros(4, dtype=torch.int32)
    for copy in (blocks.gather_blocks, blocks.scatter_blocks):
        yield partial(copy, kv, ids, torch.zeros(4, 1, 2, 4, 16, 128, dtype=torch.bfloat16), slice(0, 1), slice(None))
        yield partial(copy, kv, ids, torch.zeros(4, 2, 2, 2, 16, 128, dtype=torch.bfloat16), slice(None), slice(2, 4))
        yield partial(copy, kv, ids, torch.zeros(4, 2, 2, 8, 16, 128, dtype=torch.bfloat16)[:, :, :, 4:], slice(None), slice(None))
    words, draws, filters = pack_picks([RowPick(draw=Draw(word=0, top_k=5, top_p=0.5))] * 2)
    for size in (1, 151_936):
        yield partial(pick.pick, torch.zeros(2, size), Picks.of(torch.from_numpy(words), draws=draws, filters=filters))
    yield partial(pick.weight_sums, torch.zeros(2, 151_936))
    rows = torch.zeros(3, dtype=torch.int64)
    entries = (rows, rows, torch.zeros(3))
    edits = Edits(banned=(rows, rows), biased=entries, penalized=entries, penalties=torch.zeros(3, 2))
    yield partial(edit_logits.edit_, torch.zeros(2, 151_936), edits)


def rotation(dim: int, dtype: torch.dtype) -> Callable[[], object]:
    shape = CacheShape(num_layers=2, num_kv_heads=4, block_size=16, head_dim=dim)
    heads, norms = torch.zeros(4, 36, dim, dtype=dtype), torch.zeros(32, dim, dtype=dtype)
    numbers, count = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows = torch.zeros(4096, dim, dtype=dtype)
    places = (torch.zeros(8, dim, dtype=dtype), numbers, numbers, count, rows, shape)
    return partial(rotate_write.rotate_write, heads, norms, 1e-6, *places)


def main() -> None:
    found: list[dict[str, Any]] = []
    target = GPUTarget("cuda", int(sys.argv[1]), 32)

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        compile_instead(target, found, kernel, *args, **options)

    with patch.object(JITFunction, "run", run):
        for launch in launches():
            launch()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
