"""What the whole stack adds to the bare engine at concurrency 1: seconds to the first token, and seconds per token after it.

The same prompts, the same model, greedy, in one run: first by an Engine in this process, then through HTTP, front door, controller, prefill
worker, KV migration and decode worker on a local Ray. Medians over the requests of several interleaved rounds; the first round warms up.

    python bench/stack.py --out docs/results/stack.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from machine import describe
from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.model_runner import ForwardBatch, SequenceSlice
from polymux.actors.store_client import StoreClient
from polymux.actors.store_server import StoreServer
from polymux.actors.tokenizer import Tokenizer
from polymux.actors.weight_store import ModelSource
from polymux.transport.messages import ModelSpec
from polymux.transport.region import Region
from polymux.transport.units import MIB, ModelName

MODELS = Path(__file__).parent.parent / "deploy" / "demo" / "models"
WORDS = "module class method function argument value return raise error iterator file path string when missing".split()  # noqa: SIM905


@dataclass
class Times:
    """Seconds, over all requests of all rounds."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)


class BareEngine:
    """One model, one sequence at a time, no sockets: the floor."""

    def __init__(self, path: Path, dtype: str) -> None:
        token = "bench-" + os.urandom(16).hex()
        self._store = StoreServer(budget_bytes=512 * MIB, layout="auto", token=token)
        self.spec: ModelSpec = self._store.register(ModelSource(model=ModelName("bench"), path=str(path), dtype=dtype))
        settings = EngineSettings(weight_reserve_bytes=max(self.spec.weight_bytes * 2, 8 * MIB))
        region = Region.create(settings.weight_reserve_bytes + 64 * MIB)
        self._engine = Engine(region, settings, StoreClient(self._store.address, token))
        self._engine.add_model(self.spec)
        self._engine.activate(self.spec.model)

    def generate(self, prompt: list[int], num_tokens: int) -> tuple[float, float]:
        """TTFT and TPOT in seconds."""
        pool = self._engine.pool(self.spec.model)
        blocks = pool.allocate(self.spec.kv.num_blocks(len(prompt) + num_tokens))
        began = time.perf_counter()
        token = self._step(prompt, 0, blocks)
        first = time.perf_counter()
        for index in range(num_tokens - 1):
            token = self._step([token], len(prompt) + index, blocks)
        last = time.perf_counter()
        pool.free(blocks)
        return first - began, (last - first) / (num_tokens - 1)

    def _step(self, tokens: list[int], context_len: int, blocks: list[int]) -> int:
        cut = SequenceSlice(start=0, num_tokens=len(tokens), context_len=context_len, block_ids=blocks)
        logits = self._engine.forward(ForwardBatch(token_ids=torch.tensor(tokens), slices=(cut,), logits_rows=None))
        return int(logits.argmax())

    def close(self) -> None:
        self._engine.close()
        self._store.close()


async def stream_once(client: httpx.AsyncClient, prompt: list[int], num_tokens: int) -> tuple[float, float]:
    """One streamed completion over HTTP: TTFT and TPOT in seconds."""
    body = {"model": "bench", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    began = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        stamps = [time.perf_counter() async for line in response.aiter_lines() if line.startswith("data: {")]
    return stamps[0] - began, (stamps[-1] - stamps[0]) / (num_tokens - 1)


@contextmanager
def serving(path: Path, dtype: str, threads: int) -> Iterator[str]:
    """The whole stack on a Ray of its own, for as long as the block lasts."""
    import ray

    from polymux.cluster.bootstrap import start_local_ray
    from polymux.cluster.config import ClusterConfig
    from polymux.deploy.app import start_serving, stop_serving

    pool = {"workers": 1, "num_threads": threads}
    config = ClusterConfig.from_dict(
        {
            "name": "bench-stack",
            "models": [{"name": "bench", "path": str(path), "dtype": dtype}],
            "pools": {"prefill": pool, "decode": pool},
            "engine": {"prefix_caching": False},  # every round sends the same prompts
            "serve": {"port": 18_431},
        }
    )
    with tempfile.TemporaryDirectory(prefix="pmx-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start_local_ray(2, folder)
        try:
            yield start_serving(config)
            stop_serving(config)
        finally:
            ray.shutdown()


def prompts(path: Path, count: int, num_tokens: int) -> list[list[int]]:
    """Prompts of one length that differ from each other, so that nothing can be answered from a cache."""
    tokenizer = Tokenizer.open(path)
    found = []
    for number in range(count):
        text = " ".join(WORDS[(number + 3 * i) % len(WORDS)] for i in range(4 * num_tokens))
        found.append(list(tokenizer.encode(text))[:num_tokens])
    return found


async def measure(args: argparse.Namespace, url: str, engine: BareEngine) -> tuple[Times, Times]:
    bare, stack = Times(), Times()
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for round_number in range(args.rounds + 1):
            for prompt in prompts(args.model, args.requests, args.prompt_tokens):
                for times, (ttft, tpot) in (
                    (bare, engine.generate(prompt, args.output_tokens)),
                    (stack, await stream_once(client, prompt, args.output_tokens)),
                ):
                    if round_number:
                        times.ttft.append(ttft)
                        times.tpot.append(tpot)
    return bare, stack


def spread(values: list[float]) -> str:
    ordered = sorted(1e3 * value for value in values)
    return f"{statistics.median(ordered):.2f} ({ordered[len(ordered) // 10]:.2f} to {ordered[-1 - len(ordered) // 10]:.2f})"


def report(args: argparse.Namespace, bare: Times, stack: Times) -> tuple[str, dict[str, Any]]:
    added = {name: 1e3 * (statistics.median(getattr(stack, name)) - statistics.median(getattr(bare, name))) for name in ("ttft", "tpot")}
    figures = {"ttft_added_ms": round(added["ttft"], 3), "tpot_added_ms": round(added["tpot"], 3), "model": args.model.name}
    text = "\n".join(
        [
            "# What the stack adds to the engine",
            "",
            f"{describe()}; {args.model.name} in {args.dtype}, prompt {args.prompt_tokens}, output {args.output_tokens}, concurrency 1, "
            f"{args.rounds} rounds of {args.requests} requests, {args.threads} thread(s) a worker. Milliseconds: median (p10 to p90).",
            "",
            "| | TTFT | TPOT |",
            "|---|---|---|",
            f"| engine alone, in process | {spread(bare.ttft)} | {spread(bare.tpot)} |",
            f"| through the whole stack | {spread(stack.ttft)} | {spread(stack.tpot)} |",
            f"| added | {added['ttft']:.2f} | {added['tpot']:.2f} |",
            "",
            "Aims: below 15 ms and 2 ms. Made by `python bench/stack.py --out docs/results/stack.md`.",
            "",
        ]
    )
    return text, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=MODELS / "llama-large")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = BareEngine(args.model, args.dtype)
    with serving(args.model, args.dtype, args.threads) as url:
        bare, stack = asyncio.run(measure(args, url, engine))
    engine.close()
    text, figures = report(args, bare, stack)
    print(text)
    if args.out:
        args.out.write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
