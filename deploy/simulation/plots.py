"""Pictures of simulations: attainment against load, distributions of TTFT and TPOT, and what each device did when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymux.deploy.simulation.runs import Result
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.loop import DECODE, PREFILL, SWITCH, Journal
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.policies import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "slack": "#0072B2",
    "wrr": "#56B4E9",
    "wrr-shared": "#009E73",
    "sllm": "#D55E00",
    "sllm-idle": "#E69F00",
    "sllm-oracle": "#CC79A7",
    "static": "#999999",
    "mux": "#444444",
}
SHADES = {SWITCH: "#d0d0d0", PREFILL: "#E69F00"}
MAX_LANES = 16
HUES = tuple(i for i in range(20) if i not in (2, 3, 14, 15))  # of the map tab20, without what looks like a shade above

Point = tuple[float, float]


def figure(num_columns: int, num_rows: int = 1, *, width: float = 5.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Panels in rows. Raises ModuleNotFoundError where matplotlib is not installed."""
    from matplotlib.figure import Figure as Canvas

    drawn = Canvas(figsize=(width * num_columns, height * num_rows), layout="constrained")
    return drawn, list(drawn.subplots(num_rows, num_columns, squeeze=False).flat)


def save(drawn: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110, metadata={"Software": None})


def attainment_curves(
    axes: Axes, series: Mapping[str, Sequence[Point]], *, x_label: str, title: str, bound: Sequence[Point] = (), others: Sequence[Any] = ()
) -> None:
    """Shares in percent by policy; `others` are (label, points) of figures that were not computed here, drawn as crosses."""
    if bound:
        axes.plot(*zip(*bound, strict=True), color="black", linestyle=":", linewidth=1.2, label="no scheduler exceeds")
    for policy, points in series.items():
        (drawn,) = axes.plot(
            *zip(*points, strict=True), marker="o", markersize=3, color=COLORS.get(policy), label=LABELS.get(policy, policy)
        )
        drawn.set_linewidth(2.4 if policy == "slack" else 1.2)
    for label, points in others:
        axes.plot(*zip(*points, strict=True), linestyle="", marker="x", color="black", label=label)
    axes.set(xlabel=x_label, ylabel="attainment, %", title=title, ylim=(0, 104))
    axes.grid(alpha=0.3)


def distribution(axes: Axes, results: Sequence[Result], which: str, *, slo_s: float) -> None:
    """The share of all requests whose `ttft_s` or `tpot_s` is at most x; those without one never get there."""
    for result in results:
        values = getattr(result, which)
        shares = [100 * (i + 1) / result.attainment.num_requests for i in range(len(values))]
        axes.plot(values, shares, color=COLORS.get(result.policy), label=LABELS.get(result.policy, result.policy), linewidth=1.4)
    axes.axvline(slo_s, color="black", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel=which.removesuffix("_s").upper() + ", s", ylabel="requests, %", ylim=(0, 104))
    axes.grid(alpha=0.3)


def distributions(results: Sequence[Result], targets: Targets, path: Path) -> None:
    drawn, (left, right) = figure(2)
    distribution(left, results, "ttft_s", slo_s=targets.ttft_us / SECOND)
    distribution(right, results, "tpot_s", slo_s=targets.tpot_us / SECOND)
    left.legend(fontsize=7)
    save(drawn, path)


def lanes(axes: Axes, journal: Journal, *, title: str, began_s: float, ended_s: float) -> None:
    """What each of the first devices did: a colour for each model, orange prefill, grey switches."""
    from matplotlib import colormaps

    shown = sorted(journal.spans)[:MAX_LANES]
    models = sorted({span.model for device in shown for span in journal.spans[device]})
    shades = {model: colormaps["tab20"](HUES[i % len(HUES)]) for i, model in enumerate(models)}
    for row, device in enumerate(shown):
        spans = [s for s in journal.spans[device] if s.ended_us > began_s * SECOND and s.began_us < ended_s * SECOND]
        bars = [(s.began_us / SECOND, (s.ended_us - s.began_us) / SECOND) for s in spans]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=[shades[s.model] if s.kind == DECODE else SHADES[s.kind] for s in spans])
    axes.set(
        xlim=(began_s, ended_s), ylim=(len(shown) - 0.4, -0.6), yticks=range(len(shown)), xlabel="time, s", ylabel="device", title=title
    )


def all_lanes(results: Sequence[Result], path: Path, *, began_s: float, ended_s: float) -> None:
    """A panel for each result that has a journal."""
    drawn_results = [result for result in results if result.journal is not None]
    drawn, panels = figure(1, len(drawn_results), width=10.0, height=3.0)
    for axes, result in zip(panels, drawn_results, strict=True):
        assert result.journal is not None
        lanes(axes, result.journal, title=LABELS.get(result.policy, result.policy), began_s=began_s, ended_s=ended_s)
    save(drawn, path)
