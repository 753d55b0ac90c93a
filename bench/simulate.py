"""Compare all policies on published request lists, by the published costs and by physical ones, and say what no scheduler could exceed.

python bench/simulate.py --out docs/results/simulation.md
python bench/simulate.py --trace-dir DIR --points 64,0.1 40,0.7 48,0.1,2.0,1.0

The last line is JSON: `points` (default SLO), `half_slo` and `physical`, each by point and policy, in percent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from sim_report import TOLD, draw, report

from machine import describe
from polymux.deploy.simulation.runs import Result, percent, run_policy
from polymux.disagg.sim.bound import max_on_time
from polymux.disagg.sim.costs import H100_ARTIFACT, MS, SECOND, CostModel
from polymux.disagg.sim.loop import Journal
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.physical import GIB, physical_costs
from polymux.disagg.sim.policies import POLICIES, Pool
from polymux.disagg.sim.workload import read_artifact

ROOT = Path(__file__).resolve().parents[1]
COMPARED = [name for name in POLICIES if name != "slack-split"]  # which differs by what is handed over, and here that is free
NAME = re.compile(r"simreq-(\d+)-([\d.]+?)(?:-([\d.]+?))?(?:-([\d.]+?))?\.csv")
DEFAULT_SLO = Targets(ttft_us=10 * SECOND, tpot_us=100 * MS)
PHYSICAL_BUDGET = 48 * GIB  # for weights, of 72


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """So many models, each with so many requests a second; lengths scaled."""

    rate: float
    num_models: int
    in_scale: float = 1.0
    out_scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Point:
        parts = [float(part) for part in re.split(r"[,x]", text)]
        if not 2 <= len(parts) <= 4:
            raise argparse.ArgumentTypeError(f"{text!r} is no point; it is MODELS,RATE[,IN-SCALE,OUT-SCALE]")
        return cls(parts[1], int(parts[0]), *parts[2:])

    @property
    def key(self) -> str:
        scales = "" if (self.in_scale, self.out_scale) == (1, 1) else f"x{self.in_scale:g}x{self.out_scale:g}"
        return f"{self.num_models}x{self.rate:g}{scales}"


@dataclass(slots=True)
class Section:
    """One cost model with one SLO: results by point and policy, and the bound by point."""

    title: str
    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        keys = ("qos", "tok", "req", "failed")
        return {
            point: {policy: {key: result.to_dict()[key] for key in keys} for policy, result in results.items()}
            for point, results in self.results.items()
        }


def trace_files(folder: Path) -> dict[Point, Path]:
    """The lists of a folder, by what their names say."""
    found = {}
    for path in sorted(folder.glob("simreq-*.csv")):
        if match := NAME.fullmatch(path.name):
            models, rate, in_scale, out_scale = match.groups()
            found[Point(float(rate), int(models), float(in_scale or 1), float(out_scale or 1))] = path
    return found


def default_folder() -> Path:
    for parent in (ROOT, *ROOT.parents):
        if (folder := parent / "shared" / "data" / "aegaeon").is_dir():
            return folder
    raise SystemExit("no request lists found; name their folder with --trace-dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One cost model with one SLO, for a section of the report."""

    costs: CostModel
    targets: Targets
    pool: Pool
    has_lanes: bool = False


def measure(title: str, setting: Setting, key: str, path: Path, policies: Sequence[str]) -> tuple[float, dict[str, Result]]:
    """The bound at one point, and every policy's result."""
    requests = read_artifact(path)
    costs, targets, pool = setting.costs, setting.targets, setting.pool
    bound = percent(max_on_time(requests, costs, targets, num_workers=pool.num_devices))
    results = {}
    for policy in policies:
        journal = Journal() if setting.has_lanes and key == TOLD and policy in ("slack", "wrr", "sllm-idle") else None
        one = results[policy] = run_policy(policy, requests, costs, targets, pool, journal=journal)
        shares = " ".join(f"{name} {100 * getattr(one.attainment, name):6.2f}" for name in ("qos", "tok", "req"))
        print(f"{title:28} {key:10} {policy:12} {shares}  failed {one.attainment.num_failed:4}  {one.wall_s:5.1f} s", flush=True)
    return bound, results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace-dir", type=Path, help="with simreq-MODELS-RATE-INSCALE-OUTSCALE.csv files; default: shared/data/aegaeon")
    parser.add_argument(
        "--points", nargs="+", action="extend", type=Point.parse, metavar="N,R[,IN,OUT]", help="default: every list of the folder"
    )
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=COMPARED, metavar="NAME")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; the results do not depend on it")
    parser.add_argument("--no-physical", action="store_true", help="only the published costs")
    parser.add_argument("--out", type=Path, help="write the report there, and its pictures beside it")
    options = parser.parse_args(arguments)
    files = trace_files(options.trace_dir or default_folder())
    points = options.points or sorted(files)
    if missing := [point.key for point in points if point not in files]:
        raise SystemExit(f"no list for {', '.join(missing)}; there are {', '.join(point.key for point in sorted(files)) or 'none'}")
    print(describe())
    chosen = settings(options.devices, has_physical=not options.no_physical)
    sections = [Section(title) for title in chosen]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("forkserver")) as processes:
        work = [
            (section, point.key, processes.submit(measure, section.title, chosen[section.title], point.key, files[point], options.policies))
            for point in reversed(points)  # the longest first
            for section in reversed(sections)
        ]
        for section, key, future in reversed(work):
            section.bounds[key], section.results[key] = future.result()
    if options.out is not None:
        draw(options.out, points, sections, DEFAULT_SLO)
        options.out.write_text(report(options.out, points, sections, describe()), encoding="utf-8")
    line: dict[str, object] = {"unit": "percent", "devices": options.devices}
    line |= {
        name: section.to_dict() for name, section in zip(("points", "half_slo", "physical", "physical_half_slo"), sections, strict=False)
    }
    line["bound"] = {section.title: section.bounds for section in sections}
    print(json.dumps(line))


def settings(num_devices: int, *, has_physical: bool) -> dict[str, Setting]:
    """By title of their sections, in the order of the report."""
    half = Targets(ttft_us=DEFAULT_SLO.ttft_us // 2, tpot_us=DEFAULT_SLO.tpot_us // 2)
    pool = Pool(num_devices=num_devices)
    roomy = Pool(num_devices=num_devices, weight_budget_bytes=PHYSICAL_BUDGET)
    found = {
        "published costs": Setting(costs=H100_ARTIFACT, targets=DEFAULT_SLO, pool=pool, has_lanes=True),
        "published costs, half SLO": Setting(costs=H100_ARTIFACT, targets=half, pool=pool),
    }
    if has_physical:
        found["physical costs"] = Setting(costs=physical_costs("h100"), targets=DEFAULT_SLO, pool=roomy)
        found["physical costs, half SLO"] = Setting(costs=physical_costs("h100"), targets=half, pool=roomy)
    return found


if __name__ == "__main__":
    sys.exit(main())
