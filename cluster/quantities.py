"""Sizes and durations as people write them: 512MiB, 1.5GB, 250ms, 10m."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, Field

_BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: object) -> int:
    """An int, or text such as "512MiB" (binary) or "1.5GB" (decimal). Raises ValueError with examples."""
    return int(_parse(value, _BYTES, "a size such as 512MiB, 1.5GiB or 64000000"))


def parse_seconds(value: object) -> float:
    """A number of seconds, or text such as "250ms", "10s", "10m". Raises ValueError with examples."""
    return float(_parse(value, _SECONDS, "a duration such as 250ms, 1.5s, 10m or a number of seconds"))


def format_bytes(num_bytes: int) -> str:
    """The shortest exact form: `parse_bytes(format_bytes(n)) == n`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes and num_bytes % _BYTES[unit.lower()] == 0:
            return f"{num_bytes // _BYTES[unit.lower()]}{unit}"
    return f"{num_bytes}"


def _parse(value: object, units: Mapping[str, float], expected: str) -> Fraction:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return Fraction(value)
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in units:
        raise ValueError(f"is not {expected}")
    return Fraction(match[1]) * Fraction(str(units[match[2].lower()]))


def _auto(value: object) -> object:
    return None if value == "auto" else value


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
AutoBytes = Annotated[Bytes | None, BeforeValidator(_auto)]  # None, written "auto": chosen where it runs
AutoSize = Annotated[Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)] | None, BeforeValidator(_auto)]  # may be 0
AutoNumber = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_auto)]
AutoCount = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_auto)]
