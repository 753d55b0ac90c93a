"""`polymux simulate` and `polymux plan`: traces of every format, generators, clusters, tables, JSON and pictures."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polymux.deploy.cli import main
from polymux.deploy.cli_simulate import PlanOptions, SimulateOptions, parse_slo, plan_cluster, simulate
from polymux.deploy.simulation.cluster import ClusterSpec
from polymux.deploy.simulation.planner import _fewest, parse_prices, production_trace
from polymux.deploy.simulation.traces import Catalogue, read_trace, write_trace
from polymux.disagg.cost import DECODE_ANCHORS, PREFILL_ANCHORS, SWITCH_ANCHORS, Fit
from polymux.disagg.sim.costs import H100_ARTIFACT, MS, SECOND
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.physical import physical_costs
from polymux.disagg.sim.topology import Hosts
from polymux.transport.errors import ConfigError

SMALL = "poisson:models=4,rate=0.2,seconds=20,output=40"


def quiet() -> Console:
    return Console(width=120, record=True, quiet=True)


# ---------------------------------------------------------------- traces


def test_our_own_csv_comes_back_as_it_was_written(tmp_path: Path) -> None:
    requests = read_trace(SMALL, Catalogue(kinds=("a", "b")))
    write_trace(tmp_path / "own.csv", requests)
    assert read_trace(str(tmp_path / "own.csv"), Catalogue()) == requests


def test_azures_trace_begins_at_zero_and_is_spread_over_the_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")
    first, second = read_trace(str(path), Catalogue(num_models=3))
    assert (first.arrival_us, first.input_len, first.output_len) == (0, 374, 44)
    assert second.arrival_us == 4_314_579
    assert first.model.startswith("model-000")


def test_mooncakes_trace_is_read_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text('{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n')
    (one,) = read_trace(str(path), Catalogue(), speed=2)
    assert (one.arrival_us, one.input_len, one.output_len) == (1500 * MS, 6758, 500)
    path.write_text('{"timestamp": 3000}\n')
    with pytest.raises(ConfigError, match=r"mooncake\.jsonl:1: KeyError 'input_length'"):
        read_trace(str(path), Catalogue())


def test_popular_models_get_more_of_a_trace_that_names_none(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.0,1,1\n" * 400)
    asked = Counter(one.model for one in read_trace(str(path), Catalogue(num_models=4, zipf=1.5)))
    assert max(asked, key=asked.__getitem__) == "model-0000" and asked["model-0000"] > 2 * asked["model-0001"]


@pytest.mark.parametrize("kind", ["poisson", "gamma", "diurnal", "sessions"])
def test_a_generator_is_seeded_and_has_the_rate_that_was_asked_for(kind: str) -> None:
    text = f"{kind}:models=20,rate=0.2,seconds=600,period=200,think=1"
    requests = read_trace(text, Catalogue())
    assert requests == read_trace(text, Catalogue()) != read_trace(text + ",seed=1", Catalogue())
    assert len(requests) / 600 == pytest.approx(4.0, rel=0.3)
    assert [one.arrival_us for one in requests] == sorted(one.arrival_us for one in requests)


def test_bursts_are_bursty_and_days_have_nights() -> None:
    def spread(kind: str) -> float:
        requests = read_trace(f"{kind}:models=20,rate=0.2,seconds=600,cv=3,period=600,depth=1", Catalogue())
        counts = Counter(one.arrival_us // (5 * SECOND) for one in requests)
        return statistics.pvariance([counts[i] for i in range(120)]) / (len(requests) / 120)

    assert spread("poisson") < 2 < min(spread("gamma"), spread("diurnal"))


def test_a_sessions_prompts_grow() -> None:
    requests = read_trace("sessions:models=1,rate=0.05,seconds=2000,turns=10,think=1,input=100,output=50", Catalogue())
    assert max(one.input_len for one in requests) > 5 * min(one.input_len for one in requests)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.csv", "is neither a file nor one of the generators"),
        ("poisson:model=3", "'model' is unknown"),
        ("poisson:models=many", "is no number"),
        ("gamma:cv=0", "cv=0.0 must be above 0"),
    ],
)
def test_a_wrong_trace_is_refused_by_name(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(source, Catalogue())


# ---------------------------------------------------------------- clusters


def test_a_cluster_is_read_from_yaml_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("devices: 4\ncosts: artifact\nkinds: [qwen2.5-7b]\n")
    spec = ClusterSpec.read(path)
    assert (spec.devices, spec.cost_model(), spec.pool().weight_budget_bytes) == (4, H100_ARTIFACT, None)
    for text, message in (
        ("gpus: 4", "unknown settings"),
        ("costs: free", "no cost model"),
        ("devices: 1.5", "whole number"),
        ("weight_gib: 80", "no KV room"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ClusterSpec.read(path)


def test_physical_devices_are_in_hosts_and_their_links_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("device: h800\nhosts: {gpus: 4, pcie_gb_per_s: 20}\n")
    spec = ClusterSpec.read(path)
    hosts = spec.pool().hosts
    assert hosts is not None and (hosts.gpus, hosts.pcie_gb_per_s, hosts.nvlink_gb_per_s) == (4, 20, 167.0)
    assert spec.cost_model().load_us("qwen2.5-7b") == physical_costs("h800", link_bytes_per_s=20e9).load_us("qwen2.5-7b")
    assert spec.to_dict()["hosts"]["nvlink"] == "switch"
    assert ClusterSpec().pool().hosts == Hosts()
    without = ClusterSpec(hosts=False, link_gb_per_s=40.0)
    assert (without.pool().hosts, without.to_dict()["hosts"]) == (None, None)
    assert without.cost_model().load_us("qwen2.5-7b") == physical_costs("h100", link_bytes_per_s=40e9).load_us("qwen2.5-7b")
    for text, message in (
        ("hosts: {gpu: 4}", r"hosts has unknown settings \['gpu'\]"),
        ("hosts: 8", "hosts has unknown settings 8"),
        ("hosts: {nvlink: ring}", "hosts.nvlink='ring' is unknown"),
        ("costs: artifact\nhosts: {gpus: 4}", "costs='artifact' know no links"),
        ("link_gb_per_s: 40", "link_gb_per_s is for `hosts: false`"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            ClusterSpec.read(path)


def test_learned_costs_are_what_the_fits_of_a_real_worker_say(tmp_path: Path) -> None:
    fits = {
        "prefill/d1": Fit.guessed((0.01, 1e-5, 0.0), PREFILL_ANCHORS),
        "decode/d1": Fit.guessed((0.005, 1e-4, 0.0), DECODE_ANCHORS),
        "switch": Fit.guessed((0.001, 1e-9), SWITCH_ANCHORS),
    }
    saved = tmp_path / "cpu.json"
    saved.write_text(json.dumps({"version": 1, "fits": {key: fit.to_dict() for key, fit in fits.items()}}))
    kinds = {"tiny": {"digest": "d1", "weight_bytes": 10**6, "kv_bytes": 1000}}
    costs = ClusterSpec(costs="learned", saved=str(saved), kinds=kinds).cost_model()
    assert (costs.prefill_us("tiny", [1000]), costs.decode_us("tiny", 10, 500), costs.load_us("tiny")) == (20_000, 6_000, 2_000)
    kinds["tiny"] = kinds["tiny"] | {"digest": "d2"}
    with pytest.raises(ConfigError, match=r"no decode/d2, prefill/d2; serve these models once"):
        ClusterSpec(costs="learned", saved=str(saved), kinds=kinds).cost_model()


def test_targets_are_read_from_text() -> None:
    assert parse_slo("ttft=10, tpot=0.1") == Targets(ttft_us=10 * SECOND, tpot_us=100 * MS)
    for text in ("ttft=10", "ttft=10,tpot=0", "soon"):
        with pytest.raises(ConfigError, match="--slo"):
            parse_slo(text)


# ---------------------------------------------------------------- commands


def test_simulate_writes_json_and_pictures_and_the_same_twice(tmp_path: Path) -> None:
    found: list[bytes] = []
    for name in ("one", "two"):
        options = SimulateOptions(
            traces=(SMALL,), speeds=(1.0, 4.0), policies=("slack", "sllm"), json_path=tmp_path / name, plots_path=tmp_path / "plots"
        )
        assert simulate(options, quiet()) == 0
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]
    loads = json.loads(found[0])["loads"]
    assert [set(load["policies"]) for load in loads] == [{"slack", "sllm"}] * 2
    assert loads[0]["policies"]["slack"]["req"] == 100.0
    links = loads[0]["policies"]["slack"]["links"]
    assert links["bytes"]["weights"] > 10**10 and 0 < links["busiest"]["used_percent"] < 100
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"latency.png", "lanes.png", "attainment.png"}


def test_the_command_line_serves_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--trace", SMALL, "--policy", "slack,static", "--slo", "ttft=5,tpot=0.05"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "slack" in text and "static" in text


def test_an_unknown_policy_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--trace", SMALL, "--policy", "fifo"]) == 2
    assert "policy 'fifo' is unknown" in capsys.readouterr().err


def test_a_plan_needs_fewer_devices_than_models(tmp_path: Path) -> None:
    options = PlanOptions(
        trace="poisson:models=12,rate=0.05,seconds=60,output=60", gpu="h100:2.5/h,h200:3.5/h", json_path=tmp_path / "plan.json"
    )
    assert plan_cluster(options, quiet()) == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "plan.json").read_text())["plans"]
    devices = {(row["device"], row["strategy"]): row["devices"] for row in rows}
    assert devices["h100", "dedicated"] >= 11
    assert devices["h100", "polymux"] <= devices["h100", "request level"] < devices["h100", "dedicated"]
    polymux = next(row for row in rows if (row["device"], row["strategy"]) == ("h100", "polymux"))
    assert polymux["saving_percent"] == pytest.approx(100 * (1 - polymux["devices"] / devices["h100", "dedicated"]), abs=0.1)
    assert polymux["req"] >= 90


TWO_SIZES = """
kinds:
  qwen2.5-7b:
  big: {gpus: 4, weight_gib: 134, kv_kib: 320, layers: 80, prefill: [1.0e-2, 4.0e-5, 0], decode: [2.0e-2, 1.0e-4, 1.0e-8]}
"""


def test_models_that_need_several_gpus_are_planned_in_groups_beside_the_others(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(TWO_SIZES)
    trace = "poisson:models=8,rate=0.05,seconds=60,output=60"
    options = PlanOptions(trace=trace, cluster=cluster, json_path=tmp_path / "plan.json")
    assert plan_cluster(options, quiet()) == 0
    rows = {row["strategy"]: row for row in json.loads((tmp_path / "plan.json").read_text())["plans"]}
    assert rows["dedicated"]["devices_by_size"] == {"1": 4, "4": 16} and rows["dedicated"]["devices"] == 20
    assert rows["dedicated"]["cost_per_hour"] == 50.0
    polymux = rows["polymux"]
    assert polymux["devices_by_size"]["4"] % 4 == 0 and polymux["devices"] == sum(polymux["devices_by_size"].values()) < 20
    assert polymux["saving_percent"] == pytest.approx(100 * (1 - polymux["devices"] / 20), abs=0.1)


def test_an_instance_of_several_gpus_has_their_memory_and_links(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(TWO_SIZES.replace("  qwen2.5-7b:\n", "") + "hosts: {gpus_per_switch: 2}\n")
    spec = ClusterSpec.read(cluster)
    assert spec.one_size() == 4
    hosts, pool, costs = spec.links(4), spec.pool(gpus=4), spec.cost_model(4)
    assert hosts is not None and (hosts.gpus, hosts.pcie_gb_per_s, hosts.gpus_per_switch) == (2, 104, 1)
    assert (pool.num_devices, pool.weight_budget_bytes, costs.arena_bytes()) == (4, 4 * 48 << 30, 4 * 72 << 30)
    assert costs.load_us("big") == 2000 + round((134 << 30) / 104e9 * SECOND)
    assert simulate(SimulateOptions(traces=(SMALL,), cluster=cluster, policies=("slack", "slack-split")), quiet()) == 0
    for text, message in (
        (TWO_SIZES, "kinds take 1 or 4 GPUs each; simulate one size at a time, or plan"),
        (TWO_SIZES.replace("  qwen2.5-7b:\n", "") + "devices: 6", "devices=6 and prefill=None must be multiples of 4, an instance's GPUs"),
        (TWO_SIZES.replace("  qwen2.5-7b:\n", "") + "hosts: {gpus: 6}", "hosts.gpus=6 is no multiple of 4"),
        (TWO_SIZES.replace("layers: 80, ", ""), r"kinds.big needs gpus, weight_gib.*look at \['layers'\]"),
        (TWO_SIZES.replace("layers: 80", "layers: 0"), "kinds.big.layers=0 must be a whole number"),
        (TWO_SIZES.replace("[1.0e-2, 4.0e-5, 0]", "[0, 0]"), "kinds.big.prefill=.* must be three finite numbers of seconds"),
        (TWO_SIZES.replace("[1.0e-2, 4.0e-5, 0]", "[1.0e-2, .nan, 0]"), "kinds.big.prefill=.* must be three finite numbers of seconds"),
        (TWO_SIZES.replace("weight_gib: 134", "weight_gib: .inf"), "kinds.big.weight_gib=inf must be a finite number above 0"),
        ("kinds: {small: }", "kinds small have no physical costs"),
    ):
        cluster.write_text(text)
        with pytest.raises(ConfigError, match=message):
            simulate(SimulateOptions(traces=(SMALL,), cluster=cluster), quiet())


@pytest.mark.parametrize("least", range(1, 40))
def test_the_search_finds_the_least_size(least: int) -> None:
    for start in (1, 7, 12, 64):
        assert _fewest(lambda size: size >= least, start, 64) == (least, True)


def test_the_search_says_when_nothing_is_enough() -> None:
    assert _fewest(lambda size: False, 12, 40) == (40, False)


def test_prices_are_read_and_wrong_ones_refused() -> None:
    assert parse_prices("h100:2.5/h,h200:3.5/h") == {"h100": 2.5, "h200": 3.5}
    with pytest.raises(ConfigError, match="is not NAME:PRICE/h"):
        parse_prices("h100")


def test_the_production_trace_has_the_published_statistics() -> None:
    costs = ClusterSpec().cost_model()
    requests = production_trace(costs, ("qwen2.5-7b",), seconds=2000)
    assert len(requests) / 2000 == pytest.approx(3.7, rel=0.05)
    service_s = statistics.mean(
        (costs.prefill_us(one.kind, [one.input_len]) + one.output_len * costs.decode_us(one.kind, 1, one.input_len)) / SECOND
        for one in requests
    )
    assert service_s == pytest.approx(16.79, rel=0.05)
