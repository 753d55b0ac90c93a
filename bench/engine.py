"""The bare engine against transformers: one model, greedy, decode at several batch sizes and the prefill of a long prompt.

A checkpoint of random weights in the shape of Qwen2.5-0.5B is made once and run by both, in one process, in turns: each round runs every
engine once on every case, so that drifting memory bandwidth meets all of them. Figures are medians over the rounds. A third party runs
oneDNN's matrix products of each step and nothing else: what the operations of torch would reach if all the rest were free.

    python bench/engine.py --out docs/results/engine.md
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, Qwen2Config
from transformers.utils import logging as transformers_logging

from machine import describe
from polymux.actors.arena import Arena
from polymux.actors.model_runner import BoundModel, ForwardBatch, ModelRunner, SequenceSlice
from polymux.actors.weights.bind import bind_weights
from polymux.actors.weights.builder import build_image
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import DTYPES
from polymux.kernels import ops
from polymux.kernels.sample import greedy
from polymux.transport.region import Region
from polymux.transport.units import BLOCK_SIZE, MIB
from polymux.transport.weights import read_image

QWEN25_05B = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
SMALL = QWEN25_05B | {"vocab_size": 8192, "num_hidden_layers": 6}  # for the comparison of tokens in fp32
BATCHES = (1, 4, 16)
PRODUCTS = "oneDNN's products alone"


@dataclass(frozen=True)
class Run:
    """One generation: the tokens of each sequence, and where the time went."""

    token_ids: list[list[int]]
    prefill_s: float
    decode_s: float  # of all tokens but the first


class Generator(Protocol):
    def generate(self, prompts: Tensor, num_tokens: int) -> Run: ...


class Stamps(LogitsProcessor):
    """When generate() had the logits of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores


class Transformers:
    """`generate` with SDPA attention and a static batch."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()

    def generate(self, prompts: Tensor, num_tokens: int) -> Run:
        stamps = Stamps()
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                logits_processor=[stamps],
            )
        return Run(out[:, prompts.shape[1] :].tolist(), stamps.times[0] - began, stamps.times[-1] - stamps.times[0])


class Polymux:
    """The model runner over a weight image and a paged cache whose block ids are shuffled."""

    def __init__(self, path: Path, dtype: str, *, batch_invariant: bool, max_tokens: int) -> None:
        checkpoint = Checkpoint.open(path)
        began = time.perf_counter()
        fd = os.memfd_create("bench")
        manifest = build_image(checkpoint, fd, dtype=dtype, layout="auto")
        built_s = time.perf_counter() - began
        self._arena = Arena(Region.create(manifest.nbytes + 64 * MIB), weight_reserve_bytes=manifest.nbytes)
        weights = self._arena.memory[: manifest.nbytes]
        read_image(fd, self._arena.region.buffer[: manifest.nbytes], 0, manifest.nbytes)
        os.close(fd)
        layout = checkpoint.config.kv_layout(dtype)
        self._blocks_of_sequence = layout.num_blocks(max_tokens)
        num_blocks = max(BATCHES) * self._blocks_of_sequence
        kv = torch.zeros(num_blocks, layout.num_layers, 2, layout.num_kv_heads, BLOCK_SIZE, layout.head_dim, dtype=DTYPES[dtype])
        self._block_ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        began = time.perf_counter()
        self._model: BoundModel = ModelRunner(batch_invariant=batch_invariant).bind(manifest, weights, kv)
        bound_s = time.perf_counter() - began
        self.weights = bind_weights(checkpoint.config, manifest, weights)
        self.load = f"Image of {manifest.nbytes >> 20} MiB ({manifest.layout}) built in {built_s:.2f} s, bound in {1e3 * bound_s:.1f} ms"

    def generate(self, prompts: Tensor, num_tokens: int) -> Run:
        num_sequences, prompt_len = prompts.shape
        size = self._blocks_of_sequence
        tables = [self._block_ids[i * size : (i + 1) * size] for i in range(num_sequences)]
        began = time.perf_counter()
        firsts = []
        for prompt, table in zip(prompts, tables, strict=True):
            firsts.append(self._step(prompt, (SequenceSlice(start=0, num_tokens=prompt_len, context_len=0, block_ids=table),)))
        steps = [torch.cat(firsts)]
        prefilled = time.perf_counter()
        for context_len in range(prompt_len, prompt_len + num_tokens - 1):
            slices = tuple(SequenceSlice(start=i, num_tokens=1, context_len=context_len, block_ids=table) for i, table in enumerate(tables))
            steps.append(self._step(steps[-1], slices))
        return Run(torch.stack(steps, dim=1).tolist(), prefilled - began, time.perf_counter() - prefilled)

    def _step(self, token_ids: Tensor, slices: tuple[SequenceSlice, ...]) -> Tensor:
        return greedy(self._model.forward(ForwardBatch(token_ids=token_ids, slices=slices, logits_rows=None)))


class Products:
    """Only the matrix products of each step, in order, over the engine's own weights. Its tokens mean nothing."""

    def __init__(self, engine: Polymux) -> None:
        self._weights = engine.weights

    def generate(self, prompts: Tensor, num_tokens: int) -> Run:
        num_sequences, prompt_len = prompts.shape
        began = time.perf_counter()
        for _ in range(num_sequences):
            self._step(prompt_len, 1)
        prefilled = time.perf_counter()
        for _ in range(num_tokens - 1):
            self._step(num_sequences, num_sequences)
        return Run([[0] * num_tokens] * num_sequences, prefilled - began, time.perf_counter() - prefilled)

    def _step(self, num_rows: int, num_logits: int) -> None:
        norm = self._weights.final_norm
        x = torch.ones(num_rows, norm.shape[0], dtype=norm.dtype)
        with torch.inference_mode():
            for layer in self._weights.layers:
                ops.linear(x, layer.qkv, layer.qkv_bias)
                ops.linear_add(x, layer.output, layer.output_bias, x)
                hidden = ops.gated_linear(x, layer.gate, layer.gate_bias, layer.up, layer.up_bias)
                ops.linear_add(hidden, layer.down, layer.down_bias, x)
            ops.linear(x[:num_logits], self._weights.head)


@dataclass
class Results:
    """Tokens per second by engine and case, one value a round; and each engine's last tokens by case."""

    rates: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    tokens: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)

    def add(self, engine: str, case: str, rate: float, token_ids: list[list[int]]) -> None:
        self.rates.setdefault((engine, case), []).append(rate)
        self.tokens[engine, case] = token_ids

    def rate(self, engine: str, case: str) -> float:
        return statistics.median(self.rates[engine, case])


def run_rounds(engines: dict[str, Generator], args: argparse.Namespace, vocab_size: int) -> Results:
    """Every case by every engine in turn, round by round; the first round warms up and is not counted."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocab_size, (max(BATCHES), args.prompt_tokens), generator=generator)
    long_prompt = torch.randint(vocab_size, (1, args.prefill_tokens), generator=generator)
    results = Results()
    for round_number in range(args.rounds + 1):
        for batch in BATCHES:
            for name, engine in engines.items():
                run = engine.generate(prompts[:batch], args.output_tokens)
                if round_number:
                    results.add(name, f"decode b{batch}", batch * (args.output_tokens - 1) / run.decode_s, run.token_ids)
        for name, engine in engines.items():
            run = engine.generate(long_prompt, 1)
            if round_number:
                results.add(name, f"prefill {args.prefill_tokens}", args.prefill_tokens / run.prefill_s, run.token_ids)
    return results


def share_of_equal_tokens(left: list[list[int]], right: list[list[int]]) -> float:
    """Of the positions up to and including each sequence's first difference: after it the two continue different texts."""
    same = total = 0
    for a, b in zip(left, right, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        same += len(a) if first is None else first
        total += len(a) if first is None else first + 1
    return same / total


@contextmanager
def random_checkpoint(shape: dict[str, int], dtype: str) -> Iterator[Path]:
    """A checkpoint of random weights, tied, in a folder that goes with the block. Scaled so that tokens differ clearly in likelihood."""
    torch.manual_seed(0)
    config = Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=4096, initializer_range=0.04)
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(DTYPES[dtype])
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        yield Path(folder)


def compare_tokens_in_fp32(args: argparse.Namespace) -> float:
    """Share of equal greedy tokens at batch 4 on a smaller model in fp32, where rounding hides nothing."""
    with random_checkpoint(SMALL, "float32") as path:
        prompts = torch.randint(SMALL["vocab_size"], (4, args.prompt_tokens), generator=torch.Generator().manual_seed(2))
        ours = Polymux(path, "float32", batch_invariant=False, max_tokens=args.prompt_tokens + args.output_tokens)
        theirs = Transformers(path, "float32")
        return share_of_equal_tokens(*(engine.generate(prompts, args.output_tokens).token_ids for engine in (ours, theirs)))


def report(args: argparse.Namespace, results: Results, load: str, fp32_share: float) -> tuple[str, dict[str, Any]]:
    cases = [*(f"decode b{batch}" for batch in BATCHES), f"prefill {args.prefill_tokens}"]
    names = list(dict.fromkeys(name for name, _ in results.rates))
    ratios = {case: results.rate("polymux", case) / results.rate("transformers", case) for case in cases}
    bounds = {case: results.rate(PRODUCTS, case) / results.rate("transformers", case) for case in cases}
    costs = {case: results.rate("polymux", case) / results.rate("polymux, batch_invariant", case) for case in cases}
    shares = [share_of_equal_tokens(results.tokens["polymux", case], results.tokens["transformers", case]) for case in cases]
    figures = {
        f"{case.replace('decode b', 'decode_b').replace('prefill ', 'prefill')}_vs_transformers": round(r, 3) for case, r in ratios.items()
    }
    figures |= {
        **{f"decode_b{batch}_products_vs_transformers": round(bounds[f"decode b{batch}"], 3) for batch in BATCHES},
        "same_tokens": fp32_share == 1.0,
        f"same_tokens_share_{args.dtype}": round(statistics.mean(shares), 4),
        "batch_invariant_cost": round(costs["decode b16"], 3),
        "batch_invariant_prefill_cost": round(costs[cases[-1]], 3),
    }
    rows = [[name, *(f"{results.rate(name, case):.1f}" for case in cases)] for name in names]
    rows.append(["polymux / transformers", *(f"{ratios[case]:.2f}" for case in cases)])
    rows.append([f"{PRODUCTS} / transformers", *(f"{bounds[case]:.2f}" for case in cases)])
    rows.append(["slowdown of batch_invariant", *(f"{costs[case]:.2f}" for case in cases)])
    lines = [
        "# The engine beside transformers",
        "",
        f"{describe()}; Qwen2.5-0.5B's shape with random weights, {args.dtype}, {args.threads} thread(s), prompt {args.prompt_tokens}, "
        f"output {args.output_tokens}, greedy. Tokens per second, medians of {args.rounds} interleaved rounds after one that warms up.",
        "",
        f"| | {' | '.join(cases)} |",
        "|---|" + "---|" * len(cases),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"{load}. Greedy tokens equal to transformers': {fp32_share:.1%} in fp32 (a smaller shape, batch 4), "
        f"{statistics.mean(shares):.1%} in {args.dtype}, counted up to a sequence's first difference.",
        "",
        f"Made by `python bench/engine.py {shlex.join(sys.argv[1:])}`.",
        "",
    ]
    return "\n".join(lines), figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    max_tokens = max(args.prompt_tokens + args.output_tokens, args.prefill_tokens + 1)
    with random_checkpoint(QWEN25_05B, args.dtype) as path:
        ours = Polymux(path, args.dtype, batch_invariant=False, max_tokens=max_tokens)
        engines: dict[str, Generator] = {
            "transformers": Transformers(path, args.dtype),
            "polymux": ours,
            PRODUCTS: Products(ours),
            "polymux, batch_invariant": Polymux(path, args.dtype, batch_invariant=True, max_tokens=max_tokens),
        }
        results = run_rounds(engines, args, QWEN25_05B["vocab_size"])
    text, figures = report(args, results, ours.load, compare_tokens_in_fp32(args))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
