"""The layout that makes the folders importable as one package, and keeps Hugging Face's `kernels` importable beside ours."""

from pathlib import Path

import polymux

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "transport", "disagg", "actors", "cluster", "deploy")


def test_every_folder_is_linked_into_the_namespace() -> None:
    for layer in LAYERS:
        link = ROOT / ".namespace" / "polymux" / layer
        assert link.is_symlink() and link.resolve() == (ROOT / layer).resolve()
    assert (ROOT / ".namespace" / "polymux" / "__init__.py").resolve() == (ROOT / "polymux.py").resolve()


def test_no_folder_shadows_a_package_of_another_project() -> None:
    assert not [path for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py")]


def test_the_package_is_typed_and_versioned() -> None:
    assert (ROOT / ".namespace" / "polymux" / "py.typed").exists()
    assert polymux.__version__.count(".") == 2


def test_files_stay_small_enough_to_read() -> None:
    long = {str(path): n for layer in LAYERS for path in (ROOT / layer).rglob("*.py") if (n := len(path.read_text().splitlines())) > 450}
    assert not long
