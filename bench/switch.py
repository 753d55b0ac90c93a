"""Switching models: the copy against memcpy, the time to the first decode step, cold starts, and ten thousand switches.

Two checkpoints of random weights in the shape of Qwen2.5-0.5B, with fewer layers, go through a weight store, its socket and an engine whose
arena holds one of them (or both, for switches between residents). What is compared is measured in turns in one process; medians.

    python bench/switch.py --out docs/results/switch.md
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from switch_growth import Growth, measure_growth
from switch_store import MODELS, A, B, Bench, step
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging as transformers_logging

from machine import describe
from polymux.actors.engine import Engine
from polymux.actors.weights.builder import ENVIRONMENT
from polymux.transport.bulk_copy import TUNABLES, copy_bytes, piece_bytes
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName

QWEN25_05B = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
T = TypeVar("T")


@dataclass
class Samples:
    """Seconds by what was measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def spread(self, name: str, scale: float = 1e3) -> str:
        values = [scale * value for value in self.seconds[name]]
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


# ---------------------------------------------------------------- the copy, and the first step


def measure_switches(bench: Bench, rounds: int, samples: Samples) -> None:
    """Per round: memcpy of an image's bytes by one thread, the loader alone, a whole switch, and a switch up to its first token."""
    engine = bench.engine(1)
    nbytes = bench.specs[A].weight_bytes
    twin = warm_copy_of_image(bench, nbytes)
    target = engine.arena.region.buffer[:nbytes]
    for model in (A, B):  # both verified, the arena's pages touched
        engine.activate(model)
        step(engine, model)
    for number in range(rounds + 1):
        into = samples if number else Samples()
        engine.residency.evict(B)
        into.time("memcpy", lambda: copy_bytes(target, twin))
        into.time("loader alone", lambda: load_behind(engine, bench.specs[A]))
        engine.activate(A)
        into.time("resident step", lambda: step(engine, A))
        into.time("switch, whole", lambda: load_all(engine, B))
        step(engine, B)
        into.time("switch and first step", lambda: (engine.activate(A), step(engine, A)))
        load_all(engine, B)
    engine.close()


def warm_copy_of_image(bench: Bench, nbytes: int) -> memoryview:
    """Shared memory, as an image is, mapped and read once."""
    fd = os.memfd_create("twin", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    view = memoryview(mmap.mmap(fd, nbytes))
    os.close(fd)
    with bench.client().fetch(A) as image:
        os.preadv(image.fd, [view], 0)
    return view


def load_behind(engine: Engine, spec: ModelSpec) -> None:
    """A prefetch with an idle engine: nobody helps."""
    assert engine.prefetch(spec.model)
    load = engine.residency.residents[spec.model].load
    if load is not None:
        load.wait(helps=False)


def load_all(engine: Engine, model: ModelName) -> None:
    engine.activate(model)
    load = engine.residency.residents[model].load
    if load is not None:
        load.wait()
    engine.residency.settle()


def measure_resident_switches(bench: Bench, count: int, samples: Samples) -> None:
    engine = bench.engine(2)
    for model in (A, B):
        engine.activate(model)
        step(engine, model)
    for number in range(count):
        model = (A, B)[number % 2]
        samples.time("resident switch", lambda model=model: engine.activate(model))
    engine.close()


# ---------------------------------------------------------------- cold


def measure_cold(path: Path, dtype: str, rounds: int, samples: Samples) -> None:
    """From files that are in no cache to the first token's logits, by each in turn; imports are not counted, nor the first round, nor
    what it takes to let go of everything.
    """
    for number in range(rounds + 1):
        into = samples if number else Samples()
        for name, work in (("polymux", cold_polymux), ("transformers", cold_transformers), ("safetensors, read only", cold_safetensors)):
            forget(path)
            with ExitStack() as after:
                into.time(f"cold {name}", partial(work, path, dtype, after, into))
            gc.collect()


def cold_polymux(path: Path, dtype: str, after: ExitStack, into: Samples) -> None:
    bench = into.time("cold polymux, image", lambda: Bench({A: path}, dtype))
    after.callback(bench.close)
    engine = bench.engine(1)
    after.callback(engine.close)
    into.time("cold polymux, load", lambda: load_all(engine, A))
    into.time("cold polymux, step", lambda: step(engine, A))


def cold_transformers(path: Path, dtype: str, after: ExitStack, _into: Samples) -> None:
    model = after.enter_context(nullcontext(AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()))
    with torch.inference_mode():
        model(torch.tensor([[1]])).logits.argmax()


def cold_safetensors(path: Path, _dtype: str, _after: ExitStack, _into: Samples) -> None:
    """Map the file and touch each page: the least that any loader must do."""
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                tensors.get_tensor(name).view(-1).view(torch.uint8)[::4096].max()


def forget(path: Path) -> None:
    """Out of the page cache with it, where the system obliges."""
    for file in path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ---------------------------------------------------------------- report


@contextmanager
def checkpoints(layers: int, dtype: str) -> Iterator[dict[ModelName, Path]]:
    """Two of random weights, tied, with a tokenizer, in folders that go with the block."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for seed, model in enumerate((A, B)):
            torch.manual_seed(seed)
            config = Qwen2Config(**QWEN25_05B, num_hidden_layers=layers, tie_word_embeddings=True, max_position_embeddings=4096)
            torch.set_default_dtype(getattr(torch, dtype))
            paths[model] = Path(folder) / model
            AutoModelForCausalLM.from_config(config).save_pretrained(paths[model])
            torch.set_default_dtype(torch.float32)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODELS / "qwen3-small" / name, paths[model])
        yield paths


def report(args: argparse.Namespace, samples: Samples, nbytes: int, growth: Growth) -> tuple[str, dict[str, Any]]:
    speed = {name: nbytes / samples.median(name) / 1e9 for name in ("memcpy", "loader alone", "switch, whole")}
    figures = {
        "copy_ratio": round(speed["loader alone"] / speed["memcpy"], 3),
        "first_step_ms": round(1e3 * samples.median("switch and first step"), 2),
        "resident_switch_us": round(1e6 * samples.median("resident switch"), 2),
        "growth_bytes": growth.total("allocated_bytes"),
        "growth_bytes_per_switch": round(growth.slope("allocated_bytes"), 4),
        "growth_rss_bytes": growth.total("private_bytes"),
        "cold_vs_transformers": round(samples.median("cold transformers") / samples.median("cold polymux"), 3),
        "wake_vs_transformers": round(samples.median("cold transformers") / samples.median("switch and first step"), 1),
    }
    text = "\n".join(
        [
            "# Switching models",
            "",
            f"{describe()}; Qwen2.5-0.5B's shape with {args.layers} layers and random weights, {args.dtype}, image of {nbytes >> 20} MiB, "
            f"{args.threads} thread(s), pieces of {piece_bytes(nbytes) >> 20} MiB. Medians of {args.rounds} interleaved rounds after one "
            f"that warms up (least to most). The load average was {os.getloadavg()[1]:.1f} when it ended: well above "
            f"{args.threads} the machine was shared, which waiting threads pay for.",
            "",
            "| | ms | GB/s | of memcpy |",
            "|---|---|---|---|",
            *(
                f"| {label} | {samples.spread(name)} | {speed[name]:.1f} | {speed[name] / speed['memcpy']:.2f} |"
                for name, label in (
                    ("memcpy", "memcpy of the image's bytes, shared memory to the arena, one thread"),
                    ("loader alone", "the loader's thread alone: a prefetch, from the call to the last byte"),
                    ("switch, whole", "a switch, from the call to the last byte: the waiting engine helps"),
                )
            ),
            "",
            "| | ms |",
            "|---|---|",
            f"| a decode step of a resident model | {samples.spread('resident step')} |",
            f"| a switch from the node's store and its first decode step | {samples.spread('switch and first step')} |",
            f"| cold: files to the first token, polymux | {samples.spread('cold polymux')} |",
            f"| - of it, the image in the node's store: read, hashed, packed, written | {samples.spread('cold polymux, image')} |",
            f"| - of it, the image in the arena: copied, checksums compared | {samples.spread('cold polymux, load')} |",
            f"| - of it, the decode step | {samples.spread('cold polymux, step')} |",
            f"| cold: files to the first token, transformers' from_pretrained and a forward | {samples.spread('cold transformers')} |",
            f"| cold: the files mapped by safetensors, each page touched | {samples.spread('cold safetensors, read only')} |",
            "",
            f"A switch between resident models takes {1e6 * samples.median('resident switch'):.1f} µs.",
            "",
            f"Over {growth.footprints[-1].num_switches} switches between models of 3 MiB, each with a copy and a decode step "
            f"({1e3 * growth.switch_and_step_s:.2f} ms together), the bytes that the process had allocated grew by "
            f"{growth.total('allocated_bytes')} ({growth.slope('allocated_bytes'):.4f} a switch, the slope of the line through "
            f"{len(growth.footprints)} readings), the resident memory of its own by {growth.total('private_bytes')}, its descriptors by "
            f"{growth.total('num_fds')}, its arena's ranges by {growth.total('weight_spans')}. The readings of allocated bytes, less the "
            f"first: {', '.join(str(f.allocated_bytes - growth.footprints[0].allocated_bytes) for f in growth.footprints[1:])}. glibc's "
            "caches for each thread are off in this process: with them, which is the default, the same readings creep up by some "
            "kilobytes in ten thousand switches, because freed chunks that stay in such a cache count as allocated.",
            "",
            "`copy_ratio` is of the loader alone, one thread against one. `cold_vs_transformers` is above 1 where polymux is faster. Both "
            "begin with files that are in no cache and end with the first token's logits; neither counts imports. transformers maps the "
            "file and computes on the mapping: no byte is written, and none checked. polymux parses the tokenizer, reads and hashes "
            "every byte, packs it for this CPU, writes the image to shared memory, copies it into the worker's arena (pages never touched "
            "before, here) and compares its checksums; from then on the model comes and goes as `wake_vs_transformers` says, "
            "which compares a switch from the node's store, its first decode step included.",
            "",
            f"Made by `python bench/switch.py {shlex.join(sys.argv[1:])}`.",
            "",
        ]
    )
    return text, figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--switches", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    for name in ("layers", "threads", "rounds", "cold_rounds", "switches"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main() -> None:
    args = parse()
    wanted = {**TUNABLES, **ENVIRONMENT}  # of workers and stores; read once, at a process's start
    if not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    samples = Samples()
    with checkpoints(args.layers, args.dtype) as paths:
        bench = Bench(paths, args.dtype)
        nbytes = bench.specs[A].weight_bytes
        measure_switches(bench, args.rounds, samples)
        measure_resident_switches(bench, 2000, samples)
        bench.close()
        measure_cold(paths[A], args.dtype, args.cold_rounds, samples)
    text, figures = report(args, samples, nbytes, measure_growth(args.switches))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
