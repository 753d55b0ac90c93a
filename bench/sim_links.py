"""What links that copies share do to the policies: one published list on hosts of four kinds.

python bench/sim_links.py --out docs/results/simulation-links.md

The last line is JSON: by hosts and by policy, what `polymux simulate --json` says of it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulate import DEFAULT_SLO, Point, default_folder, trace_files

from machine import describe
from polymux.deploy.simulation.cluster import ClusterSpec
from polymux.deploy.simulation.runs import Result, quantile, run_policy
from polymux.disagg.sim.traffic import COPIES, HANDOVER, WEIGHTS
from polymux.disagg.sim.workload import read_artifact

OLDER = {"gpus": 4, "pcie_gb_per_s": 25, "nvlink": "none", "network_gbit_per_s": 25}
CLUSTERS: dict[str, Mapping[str, Any]] = {  # as settings of a cluster file
    "alone": {"hosts": False, "link_gb_per_s": 52},
    "HGX": {},
    "PCIe 4.0": {"hosts": OLDER},
    "one switch": {"hosts": OLDER | {"gpus_per_switch": 4, "switch_gb_per_s": 25}},
}
POLICIES = ("slack", "slack-split", "wrr", "sllm-idle")
APART = ("slack-split", "wrr")  # have prefill and decode on devices of their own

INTRO = """\
The published list of {models} models at {rate} requests/s each ({requests} requests) on {devices} simulated H100s, physical costs,
TTFT 10 s and TPOT 0.1 s; only the links differ. Each column is what a cluster file says to `polymux simulate --cluster`:

- **alone**: `hosts: false`, `link_gb_per_s: 52`. Each GPU loads over a link of its own, whole models before the first step; KV is moved
  for nothing.
- **HGX**: the defaults of an H100. 52 GB/s each, NVLink among the eight of a host.
- **PCIe 4.0**: `hosts: {{gpus: 4, pcie_gb_per_s: 25, nvlink: none, network_gbit_per_s: 25}}`.
- **one switch**: the same with `gpus_per_switch: 4, switch_gb_per_s: 25`: four GPUs share what one had.

Requests with every token on time, in percent; the 99th percentile of TTFT in seconds; how much of the most used link was used; weights
loaded, under `wrr` with the KV that its switches bring.
"""

OUTRO = """\
Where links are plenty they change little, and layers that are computed while later ones load shorten `slack`'s slowest first tokens.
Where they are scarce what counts is how much a policy loads: with both phases on each worker a model is loaded once, with the phases
apart on two workers and in ever shorter turns. The KV that `slack-split` hands over ({handover} TB at most) is nothing beside that.
No GPU was measured here.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace-dir", type=Path, help="with simreq-MODELS-RATE-INSCALE-OUTSCALE.csv files; default: shared/data/aegaeon")
    parser.add_argument("--point", type=Point.parse, default=Point.parse("64,0.1"), metavar="N,R[,IN,OUT]")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the report there")
    options = parser.parse_args(arguments)
    files = trace_files(options.trace_dir or default_folder())
    if options.point not in files:
        raise SystemExit(f"no list for {options.point.key}; there are {', '.join(point.key for point in sorted(files)) or 'none'}")
    requests = read_artifact(files[options.point])
    found: dict[str, dict[str, Result]] = {}
    for name, settings in CLUSTERS.items():
        spec = ClusterSpec(devices=options.devices, **settings)
        for policy in POLICIES:
            one = run_policy(policy, requests, spec.cost_model(), DEFAULT_SLO, spec.pool())
            found.setdefault(policy, {})[name] = one
            print(f"{name:12} {policy:12} {cell(one)}  ({one.wall_s:.1f} s)", flush=True)
    if options.out is not None:
        text = report(found, options.point, len(requests), options.devices)
        made_by = shlex.join(sys.argv[1:] if arguments is None else arguments)
        options.out.write_text(f"{text}\nMade by `python bench/sim_links.py {made_by}`.\n", encoding="utf-8")
    told = {name: {policy: results[name].to_dict() for policy, results in found.items()} for name in CLUSTERS}
    print(json.dumps({"point": options.point.key, "devices": options.devices, "hosts": told}))


def cell(one: Result) -> str:
    parts = [f"{100 * one.attainment.req:.1f}".removesuffix(".0"), f"{quantile(one.ttft_s, 0.99):.1f} s"]
    if one.links is not None and one.links.busiest is not None:
        loaded = one.links.nbytes.get(WEIGHTS, 0) + one.links.nbytes.get(COPIES, 0)
        parts += [f"{100 * one.links.busiest.used:.0f}%", f"{loaded / 1e12:.2g} TB"]
    return ", ".join(parts)


def report(found: Mapping[str, Mapping[str, Result]], point: Point, num_requests: int, num_devices: int) -> str:
    apart = f", {ClusterSpec(devices=num_devices).pool().split[0]} of {num_devices} prefill"
    handover = max(one.links.nbytes.get(HANDOVER, 0) for one in found["slack-split"].values() if one.links is not None)
    lines = ["# What links that copies share do to the policies", "", describe() + ".", ""]
    lines += [INTRO.format(models=point.num_models, rate=point.rate, requests=num_requests, devices=num_devices)]
    lines += [f"| policy | {' | '.join(CLUSTERS)} |", "|---|" + "---|" * len(CLUSTERS)]
    for policy, results in found.items():
        cells = " | ".join(cell(results[name]) for name in CLUSTERS)
        lines.append(f"| `{policy}`{apart if policy in APART else ''} | {cells} |")
    return "\n".join([*lines, "", OUTRO.format(handover=f"{handover / 1e12:.1f}")])


if __name__ == "__main__":
    main()
