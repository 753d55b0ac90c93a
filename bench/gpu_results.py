"""What `gpu_check.py` writes: one machine's results as Markdown and JSON, and the list of figures that no machine has given yet."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_jobs import Benchmark, FileResult, Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    gpu: str  # its name, by which the files are called
    machine: str  # everything else that a reader must know of it
    tests: tuple[FileResult, ...]
    benchmarks: tuple[Measured, ...]
    seconds: float

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")

    @property
    def has_failed(self) -> bool:
        """Whether anything broke. A target that was missed is a figure, not a failure."""
        return any(one.outcome == "failed" for one in (*self.tests, *self.benchmarks))


def verdict(measured: Measured, name: str) -> str:
    target = next((one for one in measured.benchmark.targets if one.name == name), None)
    if name not in measured.figures:
        return "not measured"
    if target is None or not target.bound:
        return ""
    return "met" if target.is_met_by(measured.figures[name]) else "missed"


def number(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4g}"


def markdown(report: Report) -> str:
    lines = [f"# {report.gpu}", "", f"`make gpu-check` in {report.seconds:.0f} s. {report.machine}", "", *_summary(report)]
    for measured in report.benchmarks:
        lines += ["", f"## {measured.benchmark.name}", "", *_benchmark(measured)]
    lines += ["", "## Tests", "", "| file | outcome | passed | failed | skipped | seconds |", "|---|---|---|---|---|---|"]
    for one in report.tests:
        counts = f"{one.num_passed} | {one.num_failed} | {len(one.skipped)} | {one.seconds:.0f}"
        lines.append(f"| {one.path} | {one.outcome} | {counts} |")
    lines += _details("Failures", [(one.path, one.reason) for one in report.tests if one.outcome == "failed"])
    lines += _details("Not run", [(one.path, one.reason) for one in report.tests if one.outcome == "not run"])
    lines += _details("Skipped", [(one.path, "\n".join(one.skipped)) for one in report.tests if one.skipped])
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> list[str]:
    verdicts = [verdict(one, target.name) for one in report.benchmarks for target in one.benchmark.targets]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("met", "missed", "not measured") if word in verdicts)
    passed = sum(one.num_passed for one in report.tests)
    failed = sum(one.num_failed for one in report.tests)
    outcomes = [f"{one.path} ({one.outcome})" for one in report.tests if one.outcome != "passed"]
    outcomes += [f"{one.benchmark.name} ({one.outcome})" for one in report.benchmarks if one.outcome != "measured"]
    lines = [f"Targets: {counts or 'none'}. Tests: {passed} passed, {failed} failed."]
    return lines + ([f"Not as it should be: {', '.join(outcomes)}."] if outcomes else [])


def _benchmark(measured: Measured) -> list[str]:
    lines = [f"{measured.benchmark.title} ({measured.outcome} in {measured.seconds:.0f} s)", ""]
    lines += ["| figure | measured | target | |", "|---|---|---|---|"]
    named = {target.name for target in measured.benchmark.targets}
    for target in measured.benchmark.targets:
        figure = f"{number(measured.figures.get(target.name))} {target.unit}".strip()
        lines.append(f"| {target.name}: {target.claim} | {figure} | {target.bound} | {verdict(measured, target.name)} |")
    lines += [f"| {name} | {number(figure)} | | |" for name, figure in measured.figures.items() if name not in named]
    if measured.notes:
        lines += ["", *(f"- {text}" for text in measured.notes)]
    return lines + (["", "```", measured.reason, "```"] if measured.reason else [])


def _details(title: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["", f"## {title}"] if entries else []
    for name, text in entries:
        lines += ["", f"{name}:", "", "```", text, "```"]
    return lines


def as_json(report: Report) -> str:
    benchmarks: dict[str, Any] = {}
    for one in report.benchmarks:
        figures = {name: figure if math.isfinite(figure) else None for name, figure in one.figures.items()}
        verdicts = {target.name: verdict(one, target.name) for target in one.benchmark.targets}
        facts = {"outcome": one.outcome, "seconds": round(one.seconds, 1), "notes": one.notes, "reason": one.reason}
        benchmarks[one.benchmark.name] = {"figures": figures, "verdicts": verdicts, **facts}
    tests = [asdict(one) for one in report.tests]
    facts = {"gpu": report.gpu, "machine": report.machine, "seconds": round(report.seconds, 1)}
    return json.dumps({**facts, "benchmarks": benchmarks, "tests": tests}, indent=1) + "\n"


# -- what is owed -------------------------------------------------------------------------------------------------------------------


def measured_before(folder: Path) -> set[tuple[str, str]]:
    """Benchmark and name of each figure in the results of any GPU."""
    found: set[tuple[str, str]] = set()
    for path in folder.glob("*.json"):
        benchmarks = json.loads(path.read_text()).get("benchmarks", {})
        found |= {(name, figure) for name, one in benchmarks.items() for figure, value in one["figures"].items() if value is not None}
    return found


def owed(benchmarks: Iterable[Benchmark], folder: Path) -> str:
    """The list as Markdown: it changes only with the benchmarks and with results."""
    known = measured_before(folder)
    lines = ["# Figures that are owed", ""]
    lines += ["No GPU has given these yet. Where there is one, `make gpu-check` takes them in under 8 minutes; commit what it writes here."]
    num_owed = 0
    for one in benchmarks:
        missing = [target for target in one.targets if (one.name, target.name) not in known]
        num_owed += len(missing)
        if missing or one.broken:
            lines += ["", f"## {one.name}", "", one.title or f"Cannot be imported here: {one.broken}", ""]
        if missing:
            lines += ["| figure | target |", "|---|---|"]
            lines += [f"| {target.name}: {target.claim} | {f'{target.bound} {target.unit}'.strip() or 'a figure'} |" for target in missing]
    return "\n".join(lines) + "\n" if num_owed else "# Figures that are owed\n\nNone: every figure was measured on some GPU.\n"
