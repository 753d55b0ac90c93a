"""Kinds of models that a cluster file describes itself: their sizes, their measured seconds, and how many GPUs one instance takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polymux.disagg.sim.physical import GIB, KIB, PhysicalCosts, PhysicalKind
from polymux.transport.errors import ConfigError

SETTINGS = ("gpus", "weight_gib", "kv_kib", "layers", "prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """`costs` are an instance's, all its GPUs together; None: those that the kind of device has under this name."""

    gpus: int = 1
    costs: PhysicalKind | None = None


def parse_kind(name: str, data: Any, known: PhysicalCosts) -> Kind:
    """Of a mapping with all of `SETTINGS` (`gpus` is 1 unless said), or of nothing for a kind that is known. Raises ConfigError."""
    where = f"kinds.{name}"
    if not data:
        if name not in known.kinds:
            raise ConfigError(f"kinds {name} have no physical costs; say {', '.join(SETTINGS)}", param=where)
        return Kind()
    wrong = sorted(map(str, (set(data) ^ set(SETTINGS)) - {"gpus"})) if isinstance(data, Mapping) else [data]
    if wrong:
        raise ConfigError(f"{where} needs {', '.join(SETTINGS)}, and no others; look at {wrong}", param=where)
    gpus, layers = (_whole(where, key, data.get(key, 1)) for key in ("gpus", "layers"))
    costs = PhysicalKind(
        prefill=_three(where, "prefill", data["prefill"]),
        decode=_three(where, "decode", data["decode"]),
        num_weight_bytes=round(_positive(where, "weight_gib", data["weight_gib"]) * GIB),
        num_kv_bytes=round(_positive(where, "kv_kib", data["kv_kib"]) * KIB),
        num_layers=layers,
    )
    return Kind(gpus=gpus, costs=costs)


def _whole(where: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}.{key}={value!r} must be a whole number of at least 1", param=f"{where}.{key}")
    return value


def _positive(where: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}.{key}={value!r} must be a finite number above 0", param=f"{where}.{key}")
    return float(value)


def _three(where: str, key: str, value: Any) -> tuple[float, float, float]:
    """YAML reads 1e-3 as text."""
    wrong = ConfigError(f"{where}.{key}={value!r} must be three finite numbers of seconds, the first above 0", param=f"{where}.{key}")
    try:
        one, two, three = (float(number) for number in value)
    except (TypeError, ValueError):
        raise wrong from None
    if not one > 0 or not all(0 <= number < math.inf for number in (one, two, three)):
        raise wrong
    return one, two, three
