"""Every sensible tile of attention, timed: what `kernels/gpu/config.py` should choose on this GPU. Run by hand, where there is one.

PYTHONPATH=.namespace:bench python -m gpu.attention_sweep
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch
from triton.runtime.errors import OutOfResources

from gpu.attention_cases import LLAMA_8B, NUM_LAYERS, QWEN_7B, QWEN_HALF_B, Case, Heads, Step, graph_of
from gpu.harness import copy_bytes_per_s, matrix_flops_per_s, time_s
from polymux.kernels.gpu.config import Chip, Tiles
from polymux.kernels.gpu.work import TileConfig

WIDE = Heads(name="256 wide", num_heads=16, num_kv_heads=8, head_dim=256)
DECODE_TILES = tuple(product((32, 64, 128), (4,), (3, 5, 7)))  # block_n, num_warps, num_stages
PREFILL_TILES = tuple(product((64, 128), (32, 64, 128), (4, 8), (2, 3)))  # and block_m first
SPLITS = (2, 4, 6, 8)  # thread blocks a multiprocessor


def main() -> None:
    chip = Chip.of(torch.device("cuda"))
    for heads in (LLAMA_8B, QWEN_7B, QWEN_HALF_B, WIDE):
        chosen = Tiles.choose(heads.head_dim, 2, heads.num_heads // heads.num_kv_heads, chip, batch_invariant=False)
        decode = Case(heads=heads, sizes=((1, 4095),) * 32)
        least_s = decode.kv_bytes / copy_bytes_per_s()
        tiles = [replace(chosen.decode, block_n=n, num_warps=warps, num_stages=stages) for n, warps, stages in DECODE_TILES]
        _sweep(f"{heads.name}, decode, share of copy bandwidth", decode, chosen, [replace(chosen, decode=tile) for tile in tiles], least_s)
        splits = [replace(chosen, num_blocks=blocks * chip.num_sms) for blocks in SPLITS]
        _sweep(f"{heads.name}, splits of decode, share of copy bandwidth", decode, chosen, splits, least_s)
        prefill = Case(heads=heads, sizes=((8192, 0),))
        least_s = prefill.flops / matrix_flops_per_s()
        tiles = [TileConfig(block_m=m, block_n=n, num_warps=warps, num_stages=stages) for m, n, warps, stages in PREFILL_TILES]
        _sweep(f"{heads.name}, prefill, share of matrix rate", prefill, chosen, [replace(chosen, prefill=tile) for tile in tiles], least_s)


def _sweep(title: str, case: Case, chosen: Tiles, candidates: Iterable[Tiles], least_s: float) -> None:
    """Print the best, with a star at what is chosen today."""
    step, found = Step(case=case), []
    for tiles in candidates:
        try:
            graph = graph_of(step.ours(step.plan(tiles)))
        except OutOfResources:
            continue
        found.append((least_s / (time_s(graph.replay, rounds=8) / NUM_LAYERS), tiles))
    print(f"\n{title}")
    for share, tiles in sorted(found, key=lambda one: -one[0])[:6]:
        print(f"  {share:.3f} {'*' if tiles == chosen else ' '} {tiles}")


if __name__ == "__main__":
    main()
