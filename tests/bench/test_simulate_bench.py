"""The simulation benchmarks on lists of the published form: their reports, their last lines, and the points that they are asked for."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import sim_links
import sim_scale
import simulate
from sim_published import HALF_SLO, PUBLISHED
from simulate import Point, trace_files


def write_list(folder: Path, name: str, *, num_models: int = 4, num_requests: int = 20) -> None:
    rng = random.Random(name)
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("req_id", "arrival_ms", "model_name", "model_type", "input_len", "output_len"))
        for i, at_ms in enumerate(sorted(rng.randrange(10_000) for _ in range(num_requests))):
            model = rng.randrange(num_models)
            writer.writerow(
                (i, at_ms, f"synth_model_{model:02d}", ("qwen2.5-7b", "yi-9b")[model % 2], rng.randint(1, 900), rng.randint(1, 60))
            )


def test_a_point_is_told_by_a_file_name_and_by_an_argument(tmp_path: Path) -> None:
    for name in ("simreq-64-0.1-1.0-1.0.csv", "simreq-48-0.05-2.0-1.0.csv", "notes.csv"):
        write_list(tmp_path, name)
    assert set(trace_files(tmp_path)) == {Point.parse("64,0.1"), Point.parse("48,0.05,2,1")}
    assert [Point.parse(text).key for text in ("64,0.10", "48,0.05,2.0,1.0", "64x0.1")] == ["64x0.1", "48x0.05x2x1", "64x0.1"]


def test_every_published_point_has_all_three_systems() -> None:
    assert len(PUBLISHED) == 10 and HALF_SLO.keys() <= PUBLISHED.keys()
    assert all(set(rows) == {"sllm", "sllm-oracle", "wrr"} for rows in PUBLISHED.values())


def test_the_last_line_has_every_policy_and_the_report_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_list(tmp_path, "simreq-64-0.1-1.0-1.0.csv")
    write_list(tmp_path, "simreq-40-0.7-1.0-1.0.csv")
    out = tmp_path / "results" / "simulation.md"
    simulate.main(["--trace-dir", str(tmp_path), "--points", "64,0.1", "--points", "40,0.7", "--devices", "2", "--out", str(out)])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["points"].keys() == {"64x0.1", "40x0.7"}
    assert {"slack", "wrr", "sllm", "sllm-idle", "sllm-oracle", "static", "mux"} <= line["points"]["64x0.1"].keys()
    assert line["points"]["64x0.1"]["slack"] == {"qos": 100.0, "tok": 100.0, "req": 100.0, "failed": 0}
    text = out.read_text()
    for name in ("attainment", "latency", "lanes"):
        assert f"simulation-{name}.png" in text and (out.parent / f"simulation-{name}.png").stat().st_size > 1000
    assert "| 64x0.1 | 100.0 |" in text


def test_a_missing_point_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    write_list(tmp_path, "simreq-64-0.1-1.0-1.0.csv")
    with pytest.raises(SystemExit, match=r"no list for 65x0\.1; there are 64x0\.1"):
        simulate.main(["--trace-dir", str(tmp_path), "--points", "65,0.1"])


def test_the_links_benchmark_has_every_policy_on_every_kind_of_hosts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_list(tmp_path, "simreq-64-0.1-1.0-1.0.csv")
    out = tmp_path / "links.md"
    sim_links.main(["--trace-dir", str(tmp_path), "--devices", "2", "--out", str(out)])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["hosts"].keys() == {"alone", "HGX", "PCIe 4.0", "one switch"}
    assert all(found.keys() == {"slack", "slack-split", "wrr", "sllm-idle"} for found in line["hosts"].values())
    shared = line["hosts"]["one switch"]["slack"]["links"]
    assert "links" not in line["hosts"]["alone"]["slack"] and shared["busiest"]["link"] == "host 0 switch 0 in"
    assert line["hosts"]["HGX"]["slack-split"]["links"]["bytes"]["handover"] > 0
    text = out.read_text()
    assert "| `slack-split`, 1 of 2 prefill |" in text and "(20 requests) on 2 simulated" in text
    assert f"--devices 2 --out {out}`" in text


def test_the_scale_benchmark_says_what_a_decision_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scale.md"
    sim_scale.main(["--models", "20", "--devices", "6", "--requests", "40", "--rate", "4", "--out", str(out)])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["requests"] == 40 and line["attainment"]["req"] == 100.0
    assert line["placement_us"]["256x4"] > line["placement_us"]["16x4"] > 0
    assert "| 16 | 4 |" in out.read_text()
