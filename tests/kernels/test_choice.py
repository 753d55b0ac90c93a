"""Who serves an operation: by device, by what is installed, and by what the environment says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from polymux.kernels import choice, ops, reference

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_gpu_gets_triton_and_a_cpu_torch() -> None:
    assert {one.implementation for one in choice.choices(GPU)} == {"triton"}
    assert {(one.implementation, one.reason) for one in choice.choices(CPU)} == {("torch", "no GPU")}


def test_without_triton_torch_serves_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert {(one.implementation, one.reason) for one in choice.choices(GPU)} == {("torch", "triton is not installed")}


def test_every_implementation_is_where_it_is_said_to_be() -> None:
    for places in choice.OPERATIONS.values():
        for place in places.values():
            module, name = place.split(":")
            path = Path(ops.__file__).parent / f"{module.replace('.', '/')}.py"
            assert f"\ndef {name}(" in path.read_text()
        module, name = places["torch"].split(":")
        assert callable(getattr(import_module(f"polymux.kernels.{module}"), name))


def test_one_operation_can_be_overridden_and_then_is_no_more() -> None:
    with choice.override("all=torch, rms_norm=triton"):
        chosen = {one.operation: one.implementation for one in choice.choices(GPU)}
        assert chosen.pop("rms_norm") == "triton"
        assert set(chosen.values()) == {"torch"}
        assert choice.implementation("silu_mul", GPU) is reference.silu_mul
    assert choice.choose("silu_mul", GPU).implementation == "triton"


@pytest.mark.parametrize("text", ["rms_norms=torch", "rms_norm=cuda", "rms_norm"])
def test_what_is_not_there_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="rms_norm"):
        choice.parse(text)


def test_the_variable_is_read_once_and_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_overrides", None)
    monkeypatch.setenv(choice.VARIABLE, "pick=torch")
    assert choice.choose("pick", GPU).reason == "POLYMUX_KERNELS says so"
    monkeypatch.setenv(choice.VARIABLE, "norm=triton")
    assert choice.choose("pick", GPU).implementation == "torch"
    monkeypatch.setattr(choice, "_overrides", None)
    with pytest.raises(ValueError, match="norm"):
        choice.choices(GPU)
