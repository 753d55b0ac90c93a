"""Libraries of attention for tests, on the path for as long as a test wants them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from polymux.kernels import choice, libraries

STAND_IN = Path(__file__).parent / "stand_in"


@contextmanager
def on_the_path(folder: Path, *modules: str) -> Iterator[None]:
    """What is installed is what lies in this folder first; `modules` are imported anew, and forgotten afterwards."""
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.path.insert(0, str(folder))
    _forget()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        _forget()


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    """FlashInfer's."""
    with on_the_path(STAND_IN, "flashinfer"):
        yield importlib.import_module("flashinfer")


def _forget() -> None:
    importlib.invalidate_caches()
    libraries.installed.cache_clear()
    choice.implementation.cache_clear()
