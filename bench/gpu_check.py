"""Everything that only a GPU can show, in under 8 minutes: the GPU tests, then each benchmark of bench/gpu. `make gpu-check` runs it.

Needs torch, triton, numpy, msgpack and pytest, nothing of Ray, and no installation. Writes `<gpu>.md` and `<gpu>.json` into the folder of
results. A part that fails, hangs or lacks a library is reported and the rest still runs; the exit status is 1 if anything failed. A target
that is missed is a figure, not a failure. Without a GPU it prints which figures are owed, writes that list, and the exit status is 0.

    python bench/gpu_check.py --out docs/results
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpu_jobs import START_S, USE, Benchmark, FileResult, Measured, PytestFile, find_benchmarks, find_tests, run_benchmark, run_tests
from gpu_results import Report, as_json, markdown, owed, verdict
from machine import describe

TOTAL_S = 455.0  # under 8 minutes with what comes before and after
KERNELS_UNTIL_S = 140.0  # kernels against their references, and a worker's tokens: several files at a time, since most of it is compilation
TESTS_UNTIL_S = 220.0  # then the tests that want the GPU for themselves; what time is left goes on to the benchmarks
MIN_JOB_S = 15.0
OWED = "gpu-owed.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "results", help="folder of results")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only test files and benchmarks whose name has one of these in it")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="when to be done")
    args = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background; what it starts is ended by an interrupt all the same
        signal.signal(signal.SIGINT, signal.default_int_handler)
    benchmarks = find_benchmarks()
    args.out.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        text = owed(benchmarks, args.out)
        (args.out / OWED).write_text(text)
        print(f"No GPU here: these are owed.\n\n{text}")
        return 0
    began, chosen = time.monotonic(), Chosen(args.only)
    tests, measured = check(chosen.tests(find_tests()), chosen.benchmarks(benchmarks), args.total_s)
    seconds = time.monotonic() - began
    report = Report(gpu=torch.cuda.get_device_name(), machine=machine(), tests=tuple(tests), benchmarks=tuple(measured), seconds=seconds)
    stem = args.out / (report.slug + ("-partial" if args.only else ""))
    stem.with_suffix(".md").write_text(markdown(report))
    stem.with_suffix(".json").write_text(as_json(report))
    (args.out / OWED).write_text(owed(benchmarks, args.out))
    print(f"\n{markdown(report)}\nwritten: {stem}.md, {stem}.json, {args.out / OWED}")
    return int(report.has_failed)


class Chosen:
    """What `--only` leaves."""

    def __init__(self, words: Sequence[str] | None) -> None:
        self._words = words

    def tests(self, files: Sequence[PytestFile]) -> list[PytestFile]:
        return [one for one in files if self._has(one.path)]

    def benchmarks(self, found: Sequence[Benchmark]) -> list[Benchmark]:
        return [one for one in found if self._has(f"bench/gpu/{one.name}.py")]

    def _has(self, name: str) -> bool:
        return self._words is None or any(word in name for word in self._words)


def check(files: Sequence[PytestFile], benchmarks: Sequence[Benchmark], total_s: float) -> tuple[list[FileResult], list[Measured]]:
    """Tests, then benchmarks. Each gets its share of the time that is left, so that one that hangs takes nobody else's."""
    began, scale = time.monotonic(), total_s / TOTAL_S

    def left_s(until_s: float) -> float:
        return until_s * scale - (time.monotonic() - began)

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        tests = _test_kernels([one for one in files if not one.runs_alone], left_s, folder)
        alone = [one for one in files if one.runs_alone]
        for i, file in enumerate(alone):
            rest_s = left_s(TESTS_UNTIL_S)
            tests.append(_test(file, min(rest_s, max(2 * rest_s / (len(alone) - i), MIN_JOB_S)), folder))
        measured = []
        for i, benchmark in enumerate(benchmarks):
            rest_s, wanted_s = left_s(TOTAL_S), sum(one.budget_s for one in benchmarks[i:])
            deadline_s = min(rest_s * benchmark.budget_s / wanted_s, START_S + benchmark.budget_s / USE)
            measured.append(_measure(benchmark, deadline_s, folder))
    return tests, measured


def _test_kernels(files: Sequence[PytestFile], left_s: Callable[[float], float], folder: Path) -> list[FileResult]:
    with ThreadPoolExecutor(max_workers=min(max((os.cpu_count() or 1) // 2, 1), 8)) as pool:
        return list(pool.map(lambda file: _test(file, left_s(KERNELS_UNTIL_S), folder), files))


def _test(file: PytestFile, deadline_s: float, folder: Path) -> FileResult:
    if deadline_s < 1:
        return FileResult(path=file.path, outcome="failed", reason="no time was left for it")
    tested = run_tests(file, deadline_s, folder)
    print(f"{tested.outcome:8} {file.path}: {tested.num_passed} passed in {tested.seconds:.0f} s. {tested.reason}", flush=True)
    return tested


def _measure(benchmark: Benchmark, deadline_s: float, folder: Path) -> Measured:
    if deadline_s < 1:
        return Measured(benchmark=benchmark, outcome="failed", figures={}, reason="no time was left for it")
    measured = run_benchmark(benchmark, deadline_s, folder)
    print(f"{measured.outcome:8} bench/gpu/{benchmark.name}.py in {measured.seconds:.0f} s. {measured.reason}", flush=True)
    for name, figure in measured.figures.items():
        print(f"         {name} = {figure:.4g} {verdict(measured, name)}", flush=True)
    return measured


def machine() -> str:
    """The GPU, its driver and the libraries that ran on it, then all that `machine.py` says."""
    gpu = torch.cuda.get_device_properties(0)
    facts = [f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors, compute capability {gpu.major}.{gpu.minor}"]
    facts += [f"driver {driver()}, CUDA {torch.version.cuda}", f"{torch.cuda.device_count()} visible"]
    return f"{'; '.join(facts)}; {describe()}."


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
