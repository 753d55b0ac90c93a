"""From the flags of `polymux serve` to a configuration. Flags outrank the environment, which outranks the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymux.cluster.config import ClusterConfig
from polymux.transport.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    """What was given on the command line; None and empty were not."""

    config: Path | None = None
    models: Sequence[str] = ()  # NAME=PATH, or PATH alone
    prefill_workers: int | None = None
    decode_workers: int | None = None
    host: str | None = None
    port: int | None = None
    dtype: str | None = None  # of every model
    max_model_len: int | None = None  # of every model
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    api_keys: Sequence[str] = ()
    log_level: str | None = None
    settings: Sequence[str] = ()  # KEY=VALUE


def configuration(flags: ServeFlags, environ: Mapping[str, str]) -> ClusterConfig:
    """Raises ConfigError naming the flag or the field, and what would be right."""
    config = load(flags.config, _overrides(flags), environ)
    data = config.to_dict(show_secrets=True)
    models = {model["name"]: model for model in data["models"]}
    for text in flags.models:
        name, checkpoint = named_model(text)
        models[name] = models.get(name, {}) | {"name": name, "path": checkpoint}
    for field in ("dtype", "max_model_len"):
        value = getattr(flags, field)
        if value is not None:
            models = {name: model | {field: value} for name, model in models.items()}
    data["models"] = list(models.values())
    config = ClusterConfig.from_dict(data)
    if not config.models:
        raise ConfigError(
            "no model to serve; give --model NAME=PATH, a --config FILE that lists models, or try `polymux demo`", param="models"
        )
    return config


def load(path: Path | None, settings: Sequence[str], environ: Mapping[str, str]) -> ClusterConfig:
    """What a file, else the one that POLYMUX_CONFIG names, environment and KEY=VALUE settings say. Raises ConfigError."""
    named = environ.get("POLYMUX_CONFIG")
    return ClusterConfig.load(path or (Path(named) if named else None), overrides=settings, environ=environ)


def named_model(text: str) -> tuple[str, str]:
    """ "chat=/models/qwen" as its two parts; a path alone is named after its last folder, a hub id after itself."""
    name, equals, path = text.partition("=")
    if not equals:
        name, path = (Path(text).resolve().name if Path(text).is_dir() else text), text
    if not name or not path:
        raise ConfigError(f"--model {text!r} must be NAME=PATH, such as chat=/models/Qwen3-8B", param="model")
    return name, path


def _overrides(flags: ServeFlags) -> list[str]:
    """Flags as dotted settings; --set comes first, so that a flag of its own outranks it."""
    fields: dict[str, Any] = {
        "pools.prefill.workers": flags.prefill_workers,
        "pools.decode.workers": flags.decode_workers,
        "serve.host": flags.host,
        "serve.port": flags.port,
        "engine.max_num_seqs": flags.max_num_seqs,
        "engine.max_num_batched_tokens": flags.max_num_batched_tokens,
        "security.api_keys": list(flags.api_keys) or None,
        "log_level": flags.log_level,
    }
    return [*flags.settings, *(f"{key}={json.dumps(value)}" for key, value in fields.items() if value is not None)]
