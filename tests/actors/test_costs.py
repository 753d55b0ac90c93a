"""Learned costs outlive a worker, and how wrong they are is counted."""

from __future__ import annotations

import json
import logging
import re
import resource
from pathlib import Path

import pytest

from polymux.actors.costs import CostFile, device_kind
from polymux.actors.meter import Meter
from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.units import MIB, ModelName

A, B = ModelName("a"), ModelName("b")


def spec_of(model: ModelName, digest: str = "d1") -> ModelSpec:
    return ModelSpec(
        model=model,
        path="",
        digest=digest,
        config_json="{}",
        dtype="float32",
        kv=KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32"),
        weight_bytes=MIB,
        vocab_size=100,
        max_model_len=128,
        eos_token_ids=(),
    )


def taught(file: CostFile | None = None, model: ModelName = A, digest: str = "d1", step_s: float = 0.05) -> Meter:
    meter = Meter(saved_costs=file.load() if file is not None else None)
    meter.add_model(spec_of(model, digest))
    for i in range(50):
        meter.decoded(model, 1 + i % 4, 100 * (i % 5), step_s + 0.01 * (i % 4))
    return meter


def test_costs_come_back_for_the_same_weights_under_any_name(tmp_path: Path) -> None:
    file, meter = CostFile(str(tmp_path / "costs"), "cpu"), taught()
    file.save(meter.learned.observed())
    later = Meter(saved_costs=file.load())
    later.add_model(spec_of(B))
    later.add_model(spec_of(A, digest="other"))
    assert later.predict_decode_s(B, 2, 200) == meter.predict_decode_s(A, 2, 200)
    assert later.predict_decode_s(A, 2, 200) == pytest.approx(guess_of_a(), rel=1e-9)


def guess_of_a() -> float:
    meter = Meter()
    meter.add_model(spec_of(A))
    return meter.predict_decode_s(A, 2, 200)


def test_workers_of_one_device_add_to_one_file(tmp_path: Path) -> None:
    file = CostFile(str(tmp_path), "cpu")
    file.save(taught(digest="d1").learned.observed())
    file.save(taught(digest="d2").learned.observed())
    assert set(file.load()) == {"decode/d1", "decode/d2"}
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


def test_what_was_only_loaded_is_not_written_over_what_another_learned_since(tmp_path: Path) -> None:
    file = CostFile(str(tmp_path), "cpu")
    file.save(taught().learned.observed())
    idle = Meter(saved_costs=file.load())
    idle.add_model(spec_of(A))
    assert idle.learned.observed() == {}


def test_of_two_names_of_the_same_weights_the_one_observed_most_is_saved() -> None:
    meter = taught()
    meter.add_model(spec_of(B))
    meter.decoded(B, 1, 10, 0.001)
    assert meter.learned.observed()["decode/d1"].num_observed == 50


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 9, "fits": {}}', '{"version": 1, "fits": {"switch": {"guess": [1]}}}', "\xff"])
def test_a_damaged_file_is_said_in_the_log_and_learned_again(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file = CostFile(str(tmp_path), "cpu")
    file.path.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING, logger="polymux.costs"):
        assert file.load() == {}
    assert "costs.not_loaded" in caplog.text
    file.save(taught().learned.observed())
    assert set(file.load()) == {"decode/d1"}


def test_a_folder_that_cannot_be_written_costs_no_more_than_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING, logger="polymux.costs"):
        CostFile(str(blocked), "cpu").save(taught().learned.observed())
    assert "costs.not_saved" in caplog.text


def test_predicted_and_actual_seconds_and_their_distance_are_counted_by_kind() -> None:
    counters = dict(taught().counters(()))
    assert counters["cost_actual_seconds{step=decode}"] == pytest.approx(50 * 0.05 + 0.01 * sum(i % 4 for i in range(50)))
    assert counters["cost_predicted_seconds{step=decode}"] > 0
    assert counters["cost_error_ratio_bucket{step=decode,le=+Inf}"] == 50
    small = counters["cost_error_ratio_bucket{step=decode,le=0.2}"]
    assert small >= 25  # once it is learned


def test_a_kind_of_device_is_a_plain_file_name() -> None:
    assert re.fullmatch(r"cpu-[a-z0-9-]+-3-threads", device_kind(3))


def test_instances_of_other_degrees_are_of_another_kind_on_gpus_too() -> None:
    assert [device_kind(3, degree, gpu="NVIDIA H200") for degree in (1, 2, 4)] == [
        "gpu-nvidia-h200",
        "gpu-nvidia-h200-2-ranks",
        "gpu-nvidia-h200-4-ranks",
    ]
    assert device_kind(3, 2) == f"{device_kind(3)}-2-ranks"


def test_a_file_is_plain_json(tmp_path: Path) -> None:
    file = CostFile(str(tmp_path), "cpu")
    file.save(taught().learned.observed())
    assert json.loads(file.path.read_text())["version"] == 1


def test_a_model_that_is_added_again_keeps_what_was_learned() -> None:
    meter = taught()
    before = meter.learned.decode[A].fit
    meter.add_model(spec_of(A))
    assert meter.learned.decode[A].fit is before and meter.learned.observed()["decode/d1"] is before


def test_a_file_that_cannot_be_written_whole_leaves_nothing_beside_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = CostFile(str(tmp_path), "cpu")
    file.save(taught().learned.observed())
    old, limits = file.path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with caplog.at_level(logging.CRITICAL, logger="polymux.costs"):
            file.save(taught(digest="d2").learned.observed())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.path.read_text() == old and [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
