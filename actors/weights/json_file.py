"""The JSON files of a checkpoint: read with a limit, and wrong ones named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymux.transport.errors import CheckpointError
from polymux.transport.units import MIB

MAX_BYTES = 64 * MIB  # the longest index names some hundred thousand tensors


def read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, more than {MAX_BYTES}; download it again")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text; download it again") from error


def read_object(path: Path) -> dict[str, Any]:
    return parse_object(path, read_text(path))


def parse_object(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not an object; download it again")
    return found
