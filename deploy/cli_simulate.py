"""`polymux simulate` and `polymux plan`: policies on traces, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from polymux.deploy.simulation import plots
from polymux.deploy.simulation.cluster import ClusterSpec
from polymux.deploy.simulation.planner import STRATEGIES, Answer, Goal, parse_prices, plan, production_trace, to_dict
from polymux.deploy.simulation.runs import Result, quantile, run_policy
from polymux.deploy.simulation.traces import Catalogue, read_trace
from polymux.disagg.sim.bound import max_on_time
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.loop import Journal
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.policies import POLICIES
from polymux.disagg.sim.workload import SimRequest
from polymux.transport.errors import ConfigError

PRODUCTION = "production"
DEFAULT_POLICIES = ("slack", "wrr", "sllm", "sllm-idle")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    traces: tuple[str, ...]
    cluster: Path | None = None
    policies: tuple[str, ...] = DEFAULT_POLICIES
    slo: str = "ttft=10,tpot=0.1"
    speeds: tuple[float, ...] = (1.0,)
    models: int = 16  # for traces that name none
    zipf: float = 1.0
    seed: int = 0
    limit: int | None = None
    json_path: Path | None = None
    plots_path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    trace: str
    gpu: str = "h100:2.5/h"
    cluster: Path | None = None
    slo: str = "ttft=10,tpot=0.1"
    measure: str = "req"
    share: float = 0.9
    max_devices: int = 512
    models: int = 16
    zipf: float = 1.0
    seed: int = 0
    limit: int | None = None
    json_path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One trace at one speed."""

    name: str
    requests: tuple[SimRequest, ...]

    @property
    def num_models(self) -> int:
        return len({request.model for request in self.requests})

    @property
    def rate_per_s(self) -> float:
        return len(self.requests) / max(self.requests[-1].arrival_us / SECOND, 1e-6)


def parse_slo(text: str) -> Targets:
    """`ttft=10,tpot=0.1`, seconds. Raises ConfigError."""
    values: dict[str, float] = {}
    for part in text.split(","):
        key, _, number = part.strip().partition("=")
        try:
            values[key] = float(number)
        except ValueError:
            raise ConfigError(f"--slo {text!r} is not like ttft=10,tpot=0.1", param="slo") from None
    if values.keys() != {"ttft", "tpot"} or not all(value > 0 for value in values.values()):
        raise ConfigError(f"--slo {text!r} needs ttft and tpot, in seconds above 0", param="slo")
    return Targets(ttft_us=round(values["ttft"] * SECOND), tpot_us=round(values["tpot"] * SECOND))


def simulate(options: SimulateOptions, out: Console) -> int:
    """Every policy on every load; a table, and JSON and pictures where they are wanted."""
    spec, targets = ClusterSpec.read(options.cluster), parse_slo(options.slo)
    if unknown := [policy for policy in options.policies if policy not in POLICIES]:
        raise ConfigError(f"policy {unknown[0]!r} is unknown; there are: {', '.join(POLICIES)}", param="policy")
    gpus = spec.one_size()
    costs, pool = spec.cost_model(gpus), spec.pool(gpus=gpus)
    catalogue = Catalogue(num_models=options.models, zipf=options.zipf, seed=options.seed, kinds=spec.kind_names())
    loads = [_load(trace, speed, catalogue, options.limit) for trace, speed in product(options.traces, options.speeds)]
    found: list[tuple[Load, list[Result], float]] = []
    with _progress(out) as progress:
        for load in loads:
            results = []
            for policy in options.policies:
                task = progress.add_task(f"{load.name} {policy}", total=len(load.requests))
                journal = Journal() if options.plots_path is not None else None
                beat = _beat(progress, task)
                results.append(run_policy(policy, load.requests, costs, targets, pool, journal=journal, on_arrival=beat))
                progress.update(task, completed=len(load.requests))
            found.append((load, results, max_on_time(load.requests, costs, targets, num_workers=pool.num_devices)))
    for load, results, bound in found:
        out.print(_table(load, results, bound, spec))
        for line in _link_lines(results):
            out.print(line, highlight=False)
    if options.json_path is not None:
        data = {"slo": options.slo, "seed": options.seed, "cluster": spec.to_dict(), "loads": [_load_dict(*one) for one in found]}
        options.json_path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.plots_path is not None:
        for path in _draw(options.plots_path, found, targets):
            out.print(f"wrote {path}", markup=False, highlight=False)
    return 0


def plan_cluster(options: PlanOptions, out: Console) -> int:
    """The fewest devices of each kind for each strategy; 1 when polymux meets the goal on none."""
    base, targets = ClusterSpec.read(options.cluster), parse_slo(options.slo)
    goal = Goal(measure=options.measure, share=options.share)
    found: dict[tuple[str, str], list[Answer]] = {}
    with _progress(out) as progress:
        task = progress.add_task("sizes", total=None)
        for device, price in parse_prices(options.gpu).items():
            spec = replace(base, device=device)
            requests, gpus_of = _planned(options, spec), spec.gpus_of()

            def tell(strategy: str, size: int, device: str = device) -> None:
                progress.update(task, description=f"{device}: {strategy} on {size}", advance=1)

            for strategy, gpus in product(STRATEGIES, sorted(set(gpus_of.values()))):
                asked = [request for request in requests if gpus_of[request.kind] == gpus]
                if asked:
                    answer = plan(
                        strategy, asked, spec, targets, goal, price_per_h=price, max_devices=options.max_devices, gpus=gpus, on_size=tell
                    )
                    found.setdefault((device, strategy), []).append(answer)
    dedicated = {device: sum(one.num_devices for one in answers) for (device, name), answers in found.items() if name == "dedicated"}
    rows = [to_dict(answers, dedicated[device]) for (device, _), answers in found.items()]
    out.print(_plan_table(rows, goal))
    if options.json_path is not None:
        options.json_path.write_text(
            json.dumps({"slo": options.slo, "trace": options.trace, "plans": rows}, indent=1) + "\n", encoding="utf-8"
        )
    return 0 if any(row["is_met"] for row in rows if row["strategy"] == "polymux") else 1


def _planned(options: PlanOptions, spec: ClusterSpec) -> tuple[SimRequest, ...]:
    if options.trace == PRODUCTION:
        return production_trace(spec.cost_model(), spec.kind_names(), seed=options.seed)
    catalogue = Catalogue(num_models=options.models, zipf=options.zipf, seed=options.seed, kinds=spec.kind_names())
    return read_trace(options.trace, catalogue, limit=options.limit)


def _load(trace: str, speed: float, catalogue: Catalogue, limit: int | None) -> Load:
    if not speed > 0:
        raise ConfigError(f"--speed {speed} must be above 0", param="speed")
    requests = read_trace(trace, catalogue, speed=speed, limit=limit)
    if not requests:
        raise ConfigError(f"trace {trace!r} has no requests", param="trace")
    name = Path(trace).name if Path(trace).is_file() else trace
    return Load(name=name if speed == 1.0 else f"{name} at speed {speed:g}", requests=requests)


def _progress(out: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=out, transient=True)


def _beat(progress: Progress, task: Any) -> Any:
    def beat(num_arrived: int) -> None:
        if num_arrived % 256 == 0:
            progress.update(task, completed=num_arrived)

    return beat


def _table(load: Load, results: Sequence[Result], bound: float, spec: ClusterSpec) -> Table:
    title = f"{load.name}: {len(load.requests)} requests, {load.num_models} models, {load.rate_per_s:.2f}/s, {spec.devices} devices"
    caption = f"no scheduler has more than {100 * bound:.1f}% of the requests on time; all shares in %"
    table = Table(title=title, caption=caption, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("policy", "req", "tok", "qos", "fail", "good/s", "TTFT, s\np50    p99", "TPOT, ms\np50    p99"):
        table.add_column(head, justify="left" if head == "policy" else "right", no_wrap=True)
    for one in results:
        found = one.attainment
        shares = [f"{100 * share:.1f}" for share in (found.req, found.tok, found.qos)]
        ttft = " ".join(f"{quantile(one.ttft_s, share):6.2f}" for share in (0.5, 0.99))
        tpot = " ".join(f"{1e3 * quantile(one.tpot_s, share):6.1f}" for share in (0.5, 0.99))
        table.add_row(one.policy, *shares, str(found.num_failed), f"{one.goodput_per_s:.2f}", ttft, tpot)
    return table


def _link_lines(results: Sequence[Result]) -> list[str]:
    """The busiest link under each policy, and what all carried."""
    found = []
    for one in results:
        if one.links is None or one.links.busiest is None:
            continue
        name, used, busy = one.links.busiest.name, 100 * one.links.busiest.used, 100 * one.links.busiest.busy
        moved = ", ".join(f"{kind} {nbytes / 1e9:.0f} GB" for kind, nbytes in one.links.nbytes.items())
        found.append(f"{one.policy} links: {name} {used:.1f}% used, busy {busy:.1f}% of the time; {moved}")
    return found


def _plan_table(rows: Sequence[dict[str, Any]], goal: Goal) -> Table:
    table = Table(title=f"fewest devices for {goal.measure} of {100 * goal.share:g}%", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("strategy", "device", "count", "saved %", "cost/h", "per M tok", "req", "tok", "qos"):
        table.add_column(head, justify="left" if head in ("strategy", "device") else "right", no_wrap=True)
    for row in rows:
        devices = f"{row['devices']}" if row["is_met"] else f"> {row['devices']}"
        shares = [f"{row[measure]:.1f}" for measure in ("req", "tok", "qos")]
        costs = f"{row['cost_per_hour']:.2f}", f"{row['cost_per_million_tokens']:.2f}"
        table.add_row(row["strategy"], row["device"], devices, f"{row['saving_percent']:.1f}", *costs, *shares)
    return table


def _load_dict(load: Load, results: Sequence[Result], bound: float) -> dict[str, Any]:
    return {
        "name": load.name,
        "requests": len(load.requests),
        "models": load.num_models,
        "rate_per_s": round(load.rate_per_s, 4),
        "bound_req": round(100 * bound, 4),
        "policies": {one.policy: one.to_dict() for one in results},
    }


def _draw(folder: Path, found: Sequence[tuple[Load, list[Result], float]], targets: Targets) -> list[Path]:
    """Distributions and lanes of the last load; attainment against what changes, where there are several."""
    paths = [folder / "latency.png", folder / "lanes.png"]
    load, results, _ = found[-1]
    plots.distributions(results, targets, paths[0])
    middle_s = load.requests[len(load.requests) // 2].arrival_us / SECOND
    plots.all_lanes(results, paths[1], began_s=middle_s, ended_s=middle_s + 10)
    if len(found) > 1:
        by_models = len({load.num_models for load, _, _ in found}) > 1
        at = [(load.num_models if by_models else load.rate_per_s) for load, _, _ in found]
        order = sorted(range(len(at)), key=at.__getitem__)
        policies = [result.policy for result in results]
        series = {p: [(at[i], 100 * found[i][1][n].attainment.req) for i in order] for n, p in enumerate(policies)}
        drawn, (axes,) = plots.figure(1)
        label = "models" if by_models else "requests/s"
        bound = [(at[i], 100 * found[i][2]) for i in order]
        plots.attainment_curves(axes, series, x_label=label, title="requests with every token on time", bound=bound)
        axes.legend(fontsize=7)
        paths.append(folder / "attainment.png")
        plots.save(drawn, paths[-1])
    return paths
