"""Who serves an operation: by device, by what is installed, and by what the environment says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from polymux.kernels import choice, libraries, ops, reference
from polymux.kernels.libraries import Unavailable

from .gpu.libraries import on_the_path

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
    for place in choice.PREPARATIONS.values():
        module, name = place.split(":")
        assert f"\nclass {name}:" in (Path(ops.__file__).parent / f"{module.replace('.', '/')}.py").read_text()
    assert choice.PREPARATIONS.keys() == choice.OPERATIONS["attend"].keys()


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


def package(folder: Path, module: str, distribution: str, version: str) -> Path:
    """One that can be found, and says its version. Whoever imports it fails."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text("raise AssertionError('imported')")
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return folder


@pytest.mark.skipif(not libraries.why_not("flashinfer"), reason="flashinfer is installed")
def test_a_library_that_is_not_installed_is_asked_for_in_vain() -> None:
    with (
        choice.override("attend=flashinfer"),
        pytest.raises(Unavailable, match=r"attend=flashinfer, but flashinfer is not installed: pip install .polymux\[flashinfer\]"),
    ):
        choice.choices(GPU)


def test_a_library_of_an_old_release_is_refused_with_both_versions(tmp_path: Path) -> None:
    with (
        on_the_path(package(tmp_path, "flashinfer", "flashinfer-python", "0.5.3"), "flashinfer"),
        choice.override("attend=flashinfer"),
        pytest.raises(Unavailable, match=r"flashinfer 0\.5\.3 is older than 0\.6: pip install"),
    ):
        choice.implementation("attend", GPU)
    with on_the_path(tmp_path, "flashinfer"):
        assert choice.choose("attend", GPU).reason == "ours; flashinfer 0.5.3 is older than 0.6: pip install 'polymux[flashinfer]'"


@pytest.mark.parametrize("version", ["0.6.0", "0.6.14.post1", "0.10.2", "1.0rc1"])
def test_an_installed_library_serves_where_it_is_named_and_nowhere_else(version: str, tmp_path: Path) -> None:
    with on_the_path(package(tmp_path, "flashinfer", "flashinfer-python", version), "flashinfer"):
        default = choice.choose("attend", GPU)
        assert default.implementation == "triton"
        assert default.reason == f"ours; flashinfer {version} serves if POLYMUX_KERNELS has attend=flashinfer"
        assert choice.choose("pick", GPU).reason == "ours"
        with choice.override("attend=flashinfer"):
            assert choice.choose("attend", GPU).implementation == "flashinfer"
            assert choice.choose("rms_norm", GPU).implementation == "triton"


def test_an_installed_library_that_cannot_serve_says_why(tmp_path: Path) -> None:
    with on_the_path(package(tmp_path, "flash_attn", "flash-attn", "2.8.3"), "flash_attn"):
        assert "flash-attn 2.8.3 cannot: its paged kernels read blocks of a multiple of 256 slots" in choice.choose("attend", GPU).reason
        with pytest.raises(ValueError, match="flash-attn"):
            choice.parse("attend=flash-attn")
