"""What the doctor says of machines that it is shown, and of this one."""

from __future__ import annotations

import json
import os
import resource
import socket
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from polymux.deploy import doctor
from polymux.deploy.cli_doctor import show
from polymux.deploy.doctor import GIB, MIB, Finding, Level
from polymux.deploy.ray_token import ensure_token, token_source
from polymux.transport.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
TORCH = next(one for one in doctor.PACKAGES if one.name == "torch")


@pytest.mark.parametrize(
    ("finding", "level", "fix"),
    [
        (doctor.python((3, 11, 7)), Level.OK, ""),
        (doctor.python((3, 10, 12)), Level.MISSING, "3.11"),
        (doctor.system("Darwin", "arm64"), Level.MISSING, "Linux"),
        (doctor.package(TORCH, None), Level.MISSING, "polymux[serve]"),
        (doctor.package(TORCH, "2.10.3+cpu"), Level.MISSING, "torch>=2.11,<2.14"),
        (doctor.package(TORCH, "2.11.0"), Level.OK, ""),
        (doctor.package(TORCH, "2.13.9+cu130"), Level.OK, ""),
        (doctor.package(TORCH, "2.14.0"), Level.MISSING, "torch>=2.11,<2.14"),
        (doctor.cpu(frozenset({"avx2", "avx512f", "amx_bf16"}), 2), Level.OK, ""),
        (doctor.cpu(frozenset({"avx2"}), 8), Level.NOTE, "--dtype float32"),
        (doctor.cpu(frozenset({"avx2", "avx512_bf16"}), 1), Level.TIGHT, "two cores"),
        (doctor.shared_memory(64 * MIB), Level.TIGHT, "--shm-size"),
        (doctor.shared_memory(GIB), Level.OK, ""),
        (doctor.memory(GIB), Level.TIGHT, "2 GiB"),
        (doctor.memory(4 * GIB), Level.OK, ""),
        (doctor.open_files(1024), Level.TIGHT, "ulimit -n"),
        (doctor.open_files(resource.RLIM_INFINITY), Level.OK, ""),
        (doctor.locked_memory(8 * MIB, has_gpu=False), Level.OK, ""),
        (doctor.locked_memory(8 * MIB, has_gpu=True), Level.NOTE, "ulimit -l"),
        (doctor.ray_token({"RAY_AUTH_MODE": "disabled"}), Level.NOTE, "RAY_AUTH_MODE"),
        (doctor.ray_token({"RAY_AUTH_TOKEN": "x"}), Level.OK, ""),
        (doctor.ray_token({"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "h:1", "HOME": "/nowhere"}), Level.MISSING, "RAY_AUTH_TOKEN"),
    ],
    ids=lambda value: f"{value.name}: {value.found}" if isinstance(value, Finding) else "",
)
def test_what_is_missing_or_tight_comes_with_its_fix(finding: Finding, level: Level, fix: str) -> None:
    assert finding.level is level
    assert fix in finding.fix and bool(finding.fix) == (level is not Level.OK)


def test_the_packages_that_are_checked_are_those_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"": project["dependencies"], "serve": project["optional-dependencies"]["serve"]}
    expected = {(f"{line.replace('[serve]', '')}", extra) for extra, lines in declared.items() for line in lines}
    assert {(f"{one.name}>={one.low}" + (f",<{one.high}" if one.high else ""), one.extra) for one in doctor.PACKAGES} == expected


def test_a_port_in_use_is_found() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert doctor.listening("127.0.0.1", port).level is Level.MISSING  # bound and silent: no polymux answers
    assert doctor.listening("127.0.0.1", port).level is Level.OK
    assert doctor.listening("203.0.113.1", port).level is Level.MISSING


def test_a_temporary_folder_too_deep_for_sockets_is_found(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    assert doctor.temporary(str(deep), can_use_tmp=False).level is Level.MISSING
    assert doctor.temporary(str(deep), can_use_tmp=True).level is not Level.MISSING
    assert doctor.temporary(str(tmp_path / "none"), can_use_tmp=True).level is Level.MISSING


def test_versions_are_compared_as_numbers() -> None:
    assert doctor.release("2.13.0+cpu") == (2, 13) and doctor.release("1.0rc1") == (1,) and doctor.release("0.9") < doctor.release("0.10.1")


def test_this_machine_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    findings = doctor.examine({"HOME": os.environ.get("HOME", "/")}, port=port)
    assert show(findings, Console(), is_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and {"python", "torch", "ray", "cpu", "gpu", "memfd", "/dev/shm", "memory", f"port {port}"} <= {
        one["name"] for one in report["checks"]
    }


def test_it_judges_the_configuration_that_would_be_served(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
        port = probe.getsockname()[1]
        file = tmp_path / "cluster.yaml"
        file.write_text(f"serve: {{port: {port}}}\npools: {{prefill: {{device: cpu}}}}\n")
        found = {one.name: one for one in doctor.examine({"HOME": str(tmp_path)}, config=file, settings=["pools.decode.device=cuda"])}
    assert found[f"port {port}"].level is Level.MISSING
    assert found["device"].level is Level.MISSING and "pools.decode" in found["device"].fix
    with pytest.raises(ConfigError, match=r"pools\.decode\.devise"):
        doctor.examine({}, settings=["pools.decode.devise=cuda"])


def test_only_what_is_missing_makes_the_doctor_fail(capsys: pytest.CaptureFixture[str]) -> None:
    tight = Finding(name="memory", level=Level.TIGHT, found="little", fix="more")
    missing = Finding(name="torch", level=Level.MISSING, found="not installed", fix="install it")
    assert show([tight], Console(), is_json=False) == 0
    assert show([tight, missing], Console(), is_json=False) == 1
    assert "install it" in capsys.readouterr().out


def test_a_ray_of_our_own_gets_a_token_where_the_user_has_none(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    ensure_token(environ)
    assert environ["RAY_AUTH_MODE"] == "token" and len(environ["RAY_AUTH_TOKEN"]) == 64
    off = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    ensure_token(off)
    assert "RAY_AUTH_TOKEN" not in off
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("kept")
    own = {"HOME": str(tmp_path)}
    ensure_token(own)
    assert "RAY_AUTH_TOKEN" not in own and token_source(own) == str(tmp_path / ".ray" / "auth_token")
