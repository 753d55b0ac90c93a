"""The jobs of `gpu_check.py`: test files and benchmarks, each in a process of its own that is ended, with its children, at a deadline."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu.harness import NOTE, Target

ROOT = Path(__file__).parent.parent
NAMESPACE = str(ROOT / ".namespace")
GRACE_S = 4.0  # from the interrupt at a deadline, after which a test run still writes what it had, to the kill
START_S = 10.0  # of a benchmark's deadline, for imports and the first launch
USE = 0.8  # of the rest: what a benchmark is told to use
ENV = {
    "PYTHONPATH": os.pathsep.join((NAMESPACE, f"{ROOT}/bench", f"{ROOT}/tests/transport")),
    "PYTHONUNBUFFERED": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
PYTEST = ("-m", "pytest", "-c", f"{ROOT}/bench/gpu/pytest.ini", f"--rootdir={ROOT}", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
PASSED = re.compile(r"^(?:.*, )?(\d+) passed", re.MULTILINE)
PROGRESS = re.compile(r"^([.FEsxX]+)(?:\s*\[ *\d+%\])?$", re.MULTILINE)
NO_TESTS = 5  # pytest's exit status


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process that ended, or was ended at its deadline: then `status` is None."""

    status: int | None
    seconds: float
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PytestFile:
    path: str
    only_marked: bool = False  # run its tests that are marked `gpu`, rather than all

    @property
    def runs_alone(self) -> bool:
        """Whether it measures time or fills memory: not the comparisons of kernels and of a worker's tokens, which mostly compile."""
        return not self.path.startswith(("tests/kernels/", "tests/gpu/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileResult:
    """What became of a test file. `reason` is what failed, or why it did not run."""

    path: str
    outcome: str  # "passed", "failed", or "not run"
    num_passed: int = 0
    num_failed: int = 0
    skipped: tuple[str, ...] = ()  # a reason each
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    name: str  # of its module in bench/gpu
    title: str = ""
    targets: tuple[Target, ...] = ()
    budget_s: float = 60.0  # what it would like
    broken: str = ""  # why it cannot be imported


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What became of a benchmark. A failed one may have no figures."""

    benchmark: Benchmark
    outcome: str  # "measured", "failed", or "not run"
    figures: Mapping[str, float]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    reason: str = ""


def run(command: Sequence[str], deadline_s: float, log: Path) -> Ended:
    """Run it in a session of its own. At the deadline its group is interrupted, then killed, as is whatever it leaves behind."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | ENV
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            status: int | None = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # inside a driver that hangs it may outlive the kill
                process.wait(GRACE_S)
    return Ended(status=status, seconds=time.monotonic() - began, output=log.read_text(errors="replace"))


# -- tests --------------------------------------------------------------------------------------------------------------------------


def find_tests() -> list[PytestFile]:
    """All of tests/kernels/gpu and tests/gpu, and of the other files what is marked `gpu`. The end-to-end tests need Ray, and stay away."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT))
        if name.startswith(("tests/kernels/gpu/", "tests/gpu/")):
            found.append(PytestFile(path=name))
        elif "pytest.mark.gpu" in path.read_text() and not name.startswith("tests/e2e/"):
            found.append(PytestFile(path=name, only_marked=True))
    return found


def run_tests(file: PytestFile, deadline_s: float, folder: Path) -> FileResult:
    """One file by pytest."""
    stem = file.path.replace("/", "-").removesuffix(".py")
    report = folder / f"{stem}.xml"
    marked = ("-m", "gpu") if file.only_marked else ()
    ended = run((sys.executable, *PYTEST, f"--junitxml={report}", *marked, file.path), deadline_s, folder / f"{stem}.log")
    if lacking := absent_module(ended):
        return FileResult(path=file.path, outcome="not run", seconds=ended.seconds, reason=f"needs {lacking}, which is not installed here")
    if ended.status == NO_TESTS:
        return FileResult(path=file.path, outcome="not run", seconds=ended.seconds, reason="no test of it is meant for a GPU")
    cases = _cases(report)
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = tuple(case_name(case) + ": " + skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None)
    reason = "\n".join(case_name(case) + ": " + _first_line(case) for case in failed)
    if ended.status is None:
        reason = f"did not end within {deadline_s:.0f} s\n{reason}\n{tail(ended.output, 5)}"
    elif ended.status != 0 and not failed:
        reason = f"exit status {ended.status}\n{tail(ended.output)}"
    return FileResult(
        path=file.path,
        outcome="passed" if ended.status == 0 else "failed",
        num_passed=_num_passed(ended.output),  # of the cases one may have been interrupted
        num_failed=len(failed),
        skipped=skipped,
        seconds=ended.seconds,
        reason=reason.strip(),
    )


def _num_passed(output: str) -> int:
    """By pytest's last line, or where it was killed, as a GPU that hangs makes it be, by its dots."""
    passed = PASSED.findall(output)
    return int(passed[-1]) if passed else sum(line.count(".") for line in PROGRESS.findall(output))


def _cases(report: Path) -> list[ET.Element]:
    """Of a run that was killed there may be half a report, or none."""
    try:
        return list(ET.parse(report).iter("testcase"))
    except (OSError, ET.ParseError):
        return []


def absent_module(ended: Ended) -> str | None:
    """The library for want of which nothing could be collected. One of ours, or one that is installed, is no excuse."""
    if ended.status not in (1, 2, 4) or " passed" in ended.output or " failed" in ended.output:
        return None
    names = {match.split(".")[0] for match in NO_MODULE.findall(ended.output)}
    return ", ".join(sorted(names)) if names and not any(is_ours(name) or importlib.util.find_spec(name) for name in names) else None


def is_ours(module: str) -> bool:
    return module in ("polymux", "gpu") or any(ROOT.glob(f"*/**/{module}.py"))


def case_name(case: ET.Element) -> str:
    return case.get("name", "")


def _first_line(case: ET.Element) -> str:
    found = next(one for kind in ("failure", "error") if (one := case.find(kind)) is not None)
    return found.get("message", "").strip().splitlines()[0] if found.get("message", "").strip() else "failed"


def tail(text: str, num_lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-num_lines:])


# -- benchmarks ---------------------------------------------------------------------------------------------------------------------


def find_benchmarks() -> list[Benchmark]:
    """Every module of bench/gpu that has TARGETS and `measure`, the rates that others are compared with first."""
    if NAMESPACE not in sys.path:
        sys.path.insert(0, NAMESPACE)  # for this checkout's polymux, installed or not
    found = []
    for path in sorted((ROOT / "bench" / "gpu").glob("*.py")):
        try:
            module = importlib.import_module(f"gpu.{path.stem}")
        except Exception as error:  # whatever it is, the others are to run
            found.append(Benchmark(name=path.stem, broken=repr(error)))
            continue
        if hasattr(module, "TARGETS") and hasattr(module, "measure"):
            title = (module.__doc__ or path.stem).strip().splitlines()[0]
            budget_s = float(getattr(module, "BUDGET_S", Benchmark.budget_s))
            found.append(Benchmark(name=path.stem, title=title, targets=tuple(module.TARGETS), budget_s=budget_s))
    return sorted(found, key=lambda one: (one.name != "rates", one.name))


def run_benchmark(benchmark: Benchmark, deadline_s: float, folder: Path) -> Measured:
    """One module's `measure`, told to use most of its time."""
    if benchmark.broken:
        return Measured(benchmark=benchmark, outcome="failed", figures={}, reason=f"cannot be imported: {benchmark.broken}")
    result = folder / f"{benchmark.name}.json"
    budget_s = max((deadline_s - START_S) * USE, 1.0)
    command = (sys.executable, "-m", "gpu.one", benchmark.name, "--budget-s", f"{budget_s:.1f}", "--result", str(result))
    ended = run(command, deadline_s, folder / f"bench-{benchmark.name}.log")
    notes = tuple(line.removeprefix(NOTE) for line in ended.output.splitlines() if line.startswith(NOTE))
    reason = ""
    if ended.status is None:
        reason = f"did not end within {deadline_s:.0f} s\n{tail(ended.output)}"
    elif ended.status != 0:
        reason = f"exit status {ended.status}\n{tail(ended.output)}"
    return Measured(
        benchmark=benchmark,
        outcome="failed" if reason else "measured",
        figures=json.loads(result.read_text()) if result.exists() else {},
        notes=notes,
        seconds=ended.seconds,
        reason=reason,
    )
