"""Imports go down the table of docs/design.md, never up; policies need neither Ray nor torch; only named files import Ray."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "transport", "disagg", "actors", "cluster", "deploy")
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
RAY_FILES = (
    "actors/remote.py",
    "cluster/remote.py",
    "cluster/bootstrap.py",
    "cluster/gangs.py",
    "cluster/probes.py",
    "deploy/app.py",
    "deploy/cli.py",
    "deploy/cli_serve.py",
)


def imported_modules(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_layers(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("polymux.") and name.split(".")[1] in LAYERS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = LAYERS.index(path.relative_to(ROOT).parts[0])
    assert imported_layers(path) <= set(LAYERS[: here + 1])


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] == "disagg"], ids=lambda path: path.name)
def test_a_policy_reads_no_clock_and_does_no_io(path: Path) -> None:
    banned = {"time", "random", "socket", "asyncio", "threading", "os", "logging", "torch", "ray", "datetime"}
    assert not {name.split(".")[0] for name in imported_modules(path)} & banned
    allowed = {"messages", "units", "errors"}
    from_transport = {name.split(".")[2] for name in imported_modules(path) if name.startswith("polymux.transport.")}
    assert from_transport <= allowed


def test_only_the_shells_import_ray() -> None:
    importers = {str(path.relative_to(ROOT)) for path in FILES if any(name.split(".")[0] == "ray" for name in imported_modules(path))}
    assert importers <= set(RAY_FILES)


def blocked_import(modules: Iterable[str], *blocked: str) -> None:
    """All in one process: what is blocked is so for each."""
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({blocked!r})); [*map(importlib.import_module, {list(modules)!r})]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


def modules_of(layer: str) -> list[str]:
    paths = [path.relative_to(ROOT).with_suffix("") for path in FILES]
    return ["polymux." + ".".join(path.parts) for path in paths if path.parts[0] == layer]


def test_policies_need_neither_ray_nor_torch() -> None:
    blocked_import(modules_of("disagg"), "ray", "torch")


def test_transport_needs_no_ray() -> None:
    blocked_import(modules_of("transport"), "ray")


def test_the_client_needs_neither_torch_nor_ray() -> None:
    blocked_import(["polymux.deploy.client"], "ray", "torch", "starlette", "msgpack")
