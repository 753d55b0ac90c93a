"""What generation_config.json says of how to generate: where a text ends, and the sampling that the model's authors advise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polymux.transport.errors import CheckpointError

LIMITS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
    "top_k": (0, 1 << 31),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 100),
}


def eos_token_ids(path: Path, generation: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Every id that ends a text: generation_config.json's, then those that only config.json has."""
    found: dict[int, None] = {}
    for name, values in (("generation_config.json", generation), ("config.json", config)):
        ids = values.get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise CheckpointError(f"{path / name}: `eos_token_id` has {token_id!r}, outside the vocabulary of {vocab_size}; correct it")
            found[token_id] = None
    return tuple(found)


def generation_defaults(path: Path, generation: Mapping[str, Any]) -> dict[str, float | int]:
    """By the names of `SamplingParams`, those that the file sets."""
    found: dict[str, float | int] = {}
    for name, (low, high) in LIMITS.items():
        value = generation.get(name)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or (name == "top_k" and value != int(value))
        ):
            raise CheckpointError(
                f"{path / 'generation_config.json'}: `{name}` is {value!r}, not a number from {low} to {high}; correct or remove it"
            )
        found[name] = int(value) if name == "top_k" else float(value)
    return found
