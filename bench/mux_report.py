"""The comparison as a table, as a picture and as one line of JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mux_search import TARGET, Figures, Search, geometric_mean
from mux_traces import Kind

from machine import describe
from polymux.disagg.slo import SLO

LABELS = {
    "slack": "slack (ours), token level",
    "wrr": "wrr, token level",
    "request_level": "request level, as published",
    "request_level_idle": "request level, idle worker first",
    "static": "static placement",
}
COLORS = {"slack": "#0072B2", "wrr": "#56B4E9", "request_level": "#D55E00", "request_level_idle": "#E69F00", "static": "#999999"}
MARKERS = {"slack": "o", "wrr": "s", "request_level": "v", "request_level_idle": "^", "static": "x"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What was measured, in numbers."""

    num_models: int
    weight_mib: tuple[float, float, float]  # smallest, largest, all
    arena_mib: int
    num_fitting: float  # models of mean size in one arena's room for weights
    step_ms: tuple[float, float, float]  # of a model alone: least, median, most over the models
    slo: SLO
    seconds: float
    warm_up_s: float
    probes: int
    repeats: int
    lengths: str | None
    command: str  # its arguments


@dataclass(frozen=True)
class Result:
    """One trace with one seed: a search for each policy."""

    kind: Kind
    seed: int
    searches: dict[str, Search]


def rates(results: Sequence[Result]) -> dict[str, dict[str, list[float]]]:
    """Policy, trace, then one rate at the target for each seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for policy, search in result.searches.items():
            found.setdefault(policy, {}).setdefault(result.kind.name, []).append(search.estimate)
    return found


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """`rate_at_90` by policy and trace, means over the seeds; ratios are geometric means over the traces, `worst_*` the least of them."""
    means = {policy: {trace: sum(r) / len(r) for trace, r in traces.items()} for policy, traces in rates(results).items()}
    baselines = [policy for policy in means if policy.startswith("request_level")]
    best = {trace: max(means[policy][trace] for policy in baselines) for trace in _traces(results)} if baselines else {}
    line: dict[str, Any] = {"rate_at_90": {p: {t: round(rate, 3) for t, rate in traces.items()} for p, traces in means.items()}}
    for name, others in (("request_level", best), ("wrr", means.get("wrr", {}))):
        ratios = [means["slack"][trace] / rate for trace, rate in others.items() if rate > 0] if "slack" in means else []
        line[f"slack_vs_{name}"] = round(geometric_mean(ratios), 3) if ratios else None
        line[f"worst_slack_vs_{name}"] = round(min(ratios), 3) if ratios else None
    return line


def _traces(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.kind.name for result in results))


def table(setup: Setup, results: Sequence[Result]) -> str:
    """The report in Markdown."""
    found, line = rates(results), summary(results)
    lines = [
        "# Token-level multiplexing against switching between requests",
        "",
        f"{describe()}; load average {os.getloadavg()[0]:.1f} at the end.",
        "",
        _setting(setup),
        "",
        "## Requests a second with 90% of the tokens on time",
        "",
        "| trace | " + " | ".join(LABELS[policy] for policy in found) + " | slack / best request level | slack / wrr |",
        "|---|" + "---|" * (len(found) + 2),
    ]
    for trace in _traces(results):
        cells = [_spread(found[policy][trace]) for policy in found]
        own = summary([result for result in results if result.kind.name == trace])
        lines.append(f"| {trace} | {' | '.join(cells)} | {_ratio(own['slack_vs_request_level'])} | {_ratio(own['slack_vs_wrr'])} |")
    lines += [
        "",
        f"Over all traces (geometric mean): slack / request level {_ratio(line['slack_vs_request_level'])}, slack / wrr "
        f"{_ratio(line['slack_vs_wrr'])}. A rate is a mean over the seeds, with the least and the most in parentheses; 0 says that no rate "
        "tried had 90% on time, and one that every try attained is the highest of them.",
        "",
        *(f"- `{kind.name}`: {kind.text}" for kind in dict.fromkeys(result.kind for result in results)),
        "",
        *_runs(results),
        "",
        f"Made by `python bench/multiplex.py {setup.command}`.",
        "",
    ]
    return "\n".join(lines)


def _setting(setup: Setup) -> str:
    least, most, total = setup.weight_mib
    return (
        f"{setup.num_models} models of {least:.0f} to {most:.0f} MiB ({total:.0f} MiB in all) on two workers, a process and a thread each, "
        f"whose arenas of {setup.arena_mib} MiB hold {setup.num_fitting:.1f} models of mean size. A step of a model alone takes "
        f"{setup.step_ms[0]:.1f} to {setup.step_ms[2]:.1f} ms, median {setup.step_ms[1]:.1f}. SLO: TTFT {setup.slo.ttft_s:.2f} s, TPOT "
        f"{1e3 * setup.slo.tpot_s:.1f} ms; token i is due TTFT + i * TPOT after its request's arrival, and one that never comes is late. "
        f"Arrivals are open-loop and seeded; {setup.warm_up_s:g} s of them warm up and are not counted, {setup.seconds:g} s are, and more "
        f"follow for one TTFT. {setup.probes} runs find each rate, the policies in turns; {setup.repeats} seed(s)."
        + (f" Lengths are drawn from {setup.lengths}." if setup.lengths else "")
    )


def _runs(results: Sequence[Result]) -> list[str]:
    heads = (
        *("trace, seed", "policy", "requests/s", "tokens on time", "requests on time", "goodput, 1/s", "tokens/s", "incomplete"),
        *("TTFT p50, p90, p99 s", "TPOT p50, p90, p99 ms", "switches", "of them loads"),
    )
    lines = ["## Every run", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for result in results:
        for policy, search in result.searches.items():
            ordered = sorted(search.probes, key=lambda probe: probe.rate_per_s)
            lines += [f"| {result.kind.name}, {result.seed} | {policy} | {_row(one)} |" for one in ordered]
    return lines


def _spread(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _row(one: Figures) -> str:
    ttft = ", ".join(_number(seconds, 2) for seconds in one.ttft_s)
    tpot = ", ".join(_number(1e3 * seconds, 1) for seconds in one.tpot_s)
    switches, loads = one.counters.get("model_switches", 0), one.counters.get("model_loads", 0)
    return (
        f"{one.rate_per_s:.2f} | {one.token_attainment:.1%} | {one.request_attainment:.1%} | {one.goodput_per_s:.2f} | "
        f"{one.tokens_per_s:.0f} | {one.num_failed} of {one.num_requests} | {ttft} | {tpot} | {switches:.0f} | {loads:.0f}"
    )


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "never"


def draw(setup: Setup, results: Sequence[Result], path: Path) -> None:
    """Above, attainment by rate on every trace; below, the rates at the target side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    traces, policies = _traces(results), list(rates(results))
    figure = plt.figure(figsize=(3.4 * max(len(traces), 3), 7.4), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for axes, trace in zip(rows[0].subplots(1, len(traces), sharey=True, squeeze=False)[0], traces, strict=True):
        for policy in policies:
            probes = [probe for result in results if result.kind.name == trace for probe in result.searches[policy].probes]
            probes.sort(key=lambda probe: probe.rate_per_s)
            axes.plot(
                [probe.rate_per_s for probe in probes],
                [100 * probe.token_attainment for probe in probes],
                color=COLORS[policy],
                marker=MARKERS[policy],
                markersize=5,
                linewidth=1.6,
                label=LABELS[policy],
            )
        axes.axhline(100 * TARGET, color="#444444", linewidth=0.8, linestyle="--")
        axes.set(title=trace, xlabel="requests per second", xscale="log", ylim=(0, 103))
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rows[0].axes[0].set_ylabel("tokens on time, %")
    handles, labels = rows[0].axes[0].get_legend_handles_labels()
    rows[0].legend(handles, labels, loc="outside upper center", ncols=min(len(policies), 3 if len(traces) < 4 else 5), frameon=False)
    _bars(rows[1].subplots(), rates(results), traces, policies)
    figure.suptitle(
        f"{setup.num_models} models on two CPU workers that hold {setup.num_fitting:.0f} each; "
        f"TTFT {1e3 * setup.slo.ttft_s:.0f} ms, TPOT {1e3 * setup.slo.tpot_s:.0f} ms",
        fontsize=13,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axes: Any, found: dict[str, dict[str, list[float]]], traces: Sequence[str], policies: Sequence[str]) -> None:
    width = 0.8 / len(policies)
    for number, policy in enumerate(policies):
        at = [place - 0.4 + width * (number + 0.5) for place in range(len(traces))]
        means = [sum(found[policy][trace]) / len(found[policy][trace]) for trace in traces]
        spread = [
            [m - min(found[policy][t]) for m, t in zip(means, traces, strict=True)],
            [max(found[policy][t]) - m for m, t in zip(means, traces, strict=True)],
        ]
        bars = axes.bar(at, means, width * 0.92, color=COLORS[policy], yerr=spread, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        axes.bar_label(bars, [f"{mean:.1f}" for mean in means], padding=2, fontsize=8)
    axes.set_xticks(range(len(traces)), traces)
    axes.set_ylabel("requests per second\nwith 90% of tokens on time")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
