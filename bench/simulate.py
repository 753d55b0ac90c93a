"""Compare all policies on published request lists, by the published costs and by physical ones, and say what no scheduler could exceed.

python bench/simulate.py --out docs/results/simulation.md
python bench/simulate.py --trace-dir DIR --points 64,0.1 40,0.7 48,0.1,2.0,1.0

The last line is JSON: `points` (default SLO), `half_slo` and `physical`, each by point and policy, in percent.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sim_report import draw, report

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


def measure(
    section: Section, key: str, path: Path, costs: CostModel, targets: Targets, pool: Pool, policies: Sequence[str], *, lanes: bool = False
) -> None:
    requests = read_artifact(path)
    section.bounds[key] = percent(max_on_time(requests, costs, targets, num_workers=pool.num_devices))
    results = section.results[key] = {}
    for policy in policies:
        journal = Journal() if lanes and policy in ("slack", "wrr", "sllm-idle") else None
        one = results[policy] = run_policy(policy, requests, costs, targets, pool, journal=journal)
        shares = " ".join(f"{name} {100 * getattr(one.attainment, name):6.2f}" for name in ("qos", "tok", "req"))
        print(f"{section.title:28} {key:10} {policy:12} {shares}  failed {one.attainment.num_failed:4}  {one.wall_s:5.1f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace-dir", type=Path, help="with simreq-MODELS-RATE-INSCALE-OUTSCALE.csv files; default: shared/data/aegaeon")
    parser.add_argument(
        "--points", nargs="+", action="extend", type=Point.parse, metavar="N,R[,IN,OUT]", help="default: every list of the folder"
    )
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="NAME")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--no-physical", action="store_true", help="only the published costs")
    parser.add_argument("--out", type=Path, help="write the report there, and its pictures beside it")
    options = parser.parse_args(arguments)
    files = trace_files(options.trace_dir or default_folder())
    points = options.points or sorted(files)
    if missing := [point.key for point in points if point not in files]:
        raise SystemExit(f"no list for {', '.join(missing)}; there are {', '.join(point.key for point in sorted(files)) or 'none'}")
    print(describe())
    half = Targets(ttft_us=DEFAULT_SLO.ttft_us // 2, tpot_us=DEFAULT_SLO.tpot_us // 2)
    published, halved = Section("published costs"), Section("published costs, half SLO")
    physical, physical_half = Section("physical costs"), Section("physical costs, half SLO")
    pool = Pool(num_devices=options.devices)
    roomy = Pool(num_devices=options.devices, weight_budget_bytes=PHYSICAL_BUDGET)
    real = physical_costs("h100")
    for point in points:
        measure(published, point.key, files[point], H100_ARTIFACT, DEFAULT_SLO, pool, options.policies, lanes=True)
        measure(halved, point.key, files[point], H100_ARTIFACT, half, pool, options.policies)
        if not options.no_physical:
            measure(physical, point.key, files[point], real, DEFAULT_SLO, roomy, options.policies)
            measure(physical_half, point.key, files[point], real, half, roomy, options.policies)
    sections = [section for section in (published, halved, physical, physical_half) if section.results]
    if options.out is not None:
        draw(options.out, points, sections, DEFAULT_SLO)
        options.out.write_text(report(options.out, points, sections, describe()), encoding="utf-8")
    line = {"unit": "percent", "devices": options.devices, "points": published.to_dict(), "half_slo": halved.to_dict()}
    line["bound"] = {section.title: section.bounds for section in sections}
    line["physical"], line["physical_half_slo"] = physical.to_dict(), physical_half.to_dict()
    print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
