"""Compiles attention for a chip that need not be here, and prints as JSON what it takes of it. A process of its own: no interpreter.

python compiled.py ARCH SHARED_BYTES < a JSON list of [head_dim, item type, group, "decode" or "prefill", is_windowed]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polymux.kernels.gpu.attend import _attend
from polymux.kernels.gpu.config import Chip, Tiles, padded_dim

POINTERS = ("block_ids", "items", "arrived")
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_attend(arch: int, shared_bytes: int, head_dim: int, kind: str, group: int, phase: str, is_windowed: bool) -> dict[str, int]:
    tiles = Tiles.choose(head_dim, ITEM_BYTES[kind], group, Chip(num_sms=100, shared_bytes=shared_bytes), batch_invariant=False)
    config = tiles.decode if phase == "decode" else tiles.prefill
    constants = {
        "IS_WINDOWED": is_windowed,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_dim(head_dim),
        "BLOCK_SIZE": 16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    types = dict.fromkeys(("q", "kv", "out"), f"*{kind}") | dict.fromkeys(POINTERS, "*i32")
    types |= {"partials": "*fp32", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    names = _attend.arg_names
    aligned = [i for i, name in enumerate(names) if name not in constants and name not in ("scale", "window")]
    source = ASTSource(
        _attend,
        {name: types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"shared_bytes": kernel.metadata.shared, **_resources(kernel.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


if __name__ == "__main__":
    arch, shared_bytes = int(sys.argv[1]), int(sys.argv[2])
    json.dump([compile_attend(arch, shared_bytes, *case) for case in json.load(sys.stdin)], sys.stdout)
