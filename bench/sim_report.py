"""The report of bench/simulate.py: tables beside the published figures, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim_published import HALF_SLO, PUBLISHED, Row

from polymux.deploy.simulation import plots
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.policies import LABELS

if TYPE_CHECKING:
    from simulate import Point, Section

TOLD = "64x0.1"  # the point whose distributions and lanes are drawn

INTRO = """\
Every policy serves the same request lists of the Aegaeon artifact (SOSP '25) on 16 devices, in simulation. `qos` is the artifact's metric,
`tok` the share of tokens that came by arrival + TTFT + i * TPOT, `req` the share of requests with every token on time; a request that was
given up or refused counts 0 everywhere. All in percent; in parentheses what the artifact's own simulator gives, where it was reported.
`slack` and `wrr-shared` run the very policy objects of the live system, for placement, turns, phases, eviction and preemption, and see no
output length; `sllm-oracle` does. One run of one list: at heavy load a change of a microsecond anywhere moves `req` by a few points.

- **Published costs**: the artifact's own cost model, integers and all, so that figures compare like for like: a load takes size over
  16 GB/s and hides behind whatever computed before it, a decode step costs the same for any batch.
- **Physical costs**: clean coefficients with the batch term, KV at its true size, loads over a link of 25 GB/s from the moment in which
  somebody asked for them. 48 of 72 GiB are for weights that stay, which may borrow what KV leaves of the rest; KV can run out.
- **Half SLO**: TTFT 5 s and TPOT 50 ms instead of 10 s and 100 ms.
- **Bound**: no scheduler has more requests on time: switches, placement and the order of steps are free there, batches as large as they
  could be, and only the devices' time is not (`disagg/sim/bound.py`).

`wrr` keeps prefill and decode devices apart (6 + 10), as published; `wrr-shared` is its turn rule on workers that do both. `sllm` meets the
published figures at eight of the ten points exactly, and fails 313 requests for 309 and 554 for 553 at 80x0.1 and 40x0.5. `sllm-oracle` is
written from a description only, and stays up to 4 points above them. Under physical costs only `slack`, `wrr-shared` and the static
ones let weights stay on a device; the others load at every switch, as their authors have it.
"""


def report(path: Path, points: Sequence[Point], sections: Sequence[Section], machine: str) -> str:
    stem = path.stem
    lines = ["# Simulation: every policy on the published request lists", "", machine + ".", "", INTRO]
    lines += [f"![Requests with every token on time]({stem}-attainment.png)", ""]
    if any(TOLD in section.results for section in sections):
        lines += [f"![TTFT and TPOT at {TOLD}]({stem}-latency.png)", "", f"![Ten seconds of the devices at {TOLD}]({stem}-lanes.png)", ""]
    for section in sections:
        lines += _tables(section, [point.key for point in points])
    lines += ["Made by `python bench/simulate.py --out docs/results/simulation.md`.", ""]
    return "\n".join(lines)


def _tables(section: Section, keys: Sequence[str]) -> list[str]:
    figures = {"published costs": PUBLISHED, "published costs, half SLO": HALF_SLO}.get(section.title, {})
    policies = list(next(iter(section.results.values())))
    lines = [f"## {section.title.capitalize()}", ""]
    for index, measure in enumerate(("req", "tok", "qos")):
        lines += [f"| {measure}: models x rate | {' | '.join(policies)} | bound |", "|---|" + "---|" * (len(policies) + 1)]
        for key in keys:
            cells = [_cell(section, key, policy, measure, index, figures) for policy in policies]
            lines.append(f"| {key} | {' | '.join(cells)} | {f'{section.bounds[key]:.1f}' if measure == 'req' else ''} |")
        lines.append("")
    lines += [f"| given up or refused | {' | '.join(policies)} |", "|---|" + "---|" * len(policies)]
    for key in keys:
        cells = []
        for policy, result in section.results[key].items():
            row = figures.get(key, {}).get(policy)
            cells.append(str(result.attainment.num_failed) + (f" ({row[3]})" if row is not None and row[3] is not None else ""))
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(section: Section, key: str, policy: str, measure: str, index: int, figures: dict[str, dict[str, Row]]) -> str:
    own = f"{100 * getattr(section.results[key][policy].attainment, measure):.1f}"
    row = figures.get(key, {}).get(policy)
    told = row[{"qos": 0, "tok": 1, "req": 2}[measure]] if row is not None else None
    return own if told is None else f"{own} ({told:.1f})"


def draw(path: Path, points: Sequence[Point], sections: Sequence[Section], targets: Targets) -> None:
    """Writes the pictures that the report names."""
    plain = [point for point in points if (point.in_scale, point.out_scale) == (1, 1)]
    by_models = [point for point in plain if point.rate == 0.1]
    by_rate = [point for point in plain if point.num_models == 40]
    drawn, panels = plots.figure(2, len(sections), height=3.2)
    for i, section in enumerate(sections):
        _curves(panels[2 * i], section, by_models, "models, 0.1 requests/s each", lambda point: point.num_models)
        _curves(panels[2 * i + 1], section, by_rate, "requests/s of each of 40 models", lambda point: point.rate)
    panels[0].legend(fontsize=6, loc="lower left")
    plots.save(drawn, path.with_name(f"{path.stem}-attainment.png"))
    told = list(sections[0].results.get(TOLD, {}).values())
    if told:
        plots.distributions(told, targets, path.with_name(f"{path.stem}-latency.png"))
        plots.all_lanes(told, path.with_name(f"{path.stem}-lanes.png"), began_s=60.0, ended_s=70.0)


def _curves(axes: Any, section: Section, points: Sequence[Point], x_label: str, x_of: Any) -> None:
    if not points:
        axes.set_axis_off()
        return
    policies = list(next(iter(section.results.values())))
    series = {p: [(x_of(point), 100 * section.results[point.key][p].attainment.req) for point in points] for p in policies}
    bound = [(x_of(point), section.bounds[point.key]) for point in points]
    others = []
    if section.title == "published costs":
        told = [(x_of(point), PUBLISHED[point.key]["wrr"][2]) for point in points if point.key in PUBLISHED]
        others = [(f"{LABELS['wrr']}, its own simulator", told)] if told else []
    plots.attainment_curves(axes, series, x_label=x_label, title=f"req, {section.title}", bound=bound, others=others)
