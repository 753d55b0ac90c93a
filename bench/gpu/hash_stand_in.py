"""A hash in the place of BLAKE3 where that is not installed: a machine with a GPU for tests may have torch, triton and little else.

Images and their readers are made in one process here, so any hash will do.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Hash:
    def __init__(self, data: Any = b"", **_: object) -> None:
        self._inner = hashlib.blake2b(data)

    def update(self, data: Any) -> _Hash:
        self._inner.update(data)
        return self

    def digest(self, length: int = 32) -> bytes:
        return self._inner.digest()[:length]

    def hexdigest(self, length: int = 32) -> str:
        return self.digest(length).hex()


def install() -> None:
    """Before anything imports blake3."""
    if find_spec("blake3") is None:
        module: Any = ModuleType("blake3")
        module.blake3 = _Hash
        sys.modules["blake3"] = module
