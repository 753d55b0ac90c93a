"""Traces to simulate: files of the formats that are about, or a generator with its settings.

A file is told by its columns: our own CSV (`arrival_s,model,input_len,output_len` and, if wanted, `kind`), the request lists of the Aegaeon
artifact, Azure's (`TIMESTAMP,ContextTokens,GeneratedTokens`) and Mooncake's JSON lines. The last two name no models: their requests
are given to `models` of them by Zipf popularity, seeded.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from polymux.deploy.simulation.generators import GENERATORS, generate, zipf_weights
from polymux.disagg.sim.costs import MS, SECOND
from polymux.disagg.sim.workload import SimRequest, read_artifact
from polymux.transport.errors import ConfigError

OWN_COLUMNS = ("arrival_s", "model", "input_len", "output_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Who is asked where a trace does not say: so many models with popularity rank ** -zipf, and the kinds they are of, in turns."""

    num_models: int = 16
    zipf: float = 1.0
    seed: int = 0
    kinds: tuple[str, ...] = ("qwen2.5-7b",)


def read_trace(source: str, catalogue: Catalogue, *, speed: float = 1.0, limit: int | None = None) -> tuple[SimRequest, ...]:
    """By arrival, the first one's clock at zero or as the file has it. `speed` 2 makes it arrive in half the time.

    Raises ConfigError for an unknown source, format or value, naming the line.
    """
    name = source.partition(":")[0]
    path = Path(source)
    if path.is_file():
        requests = _read_file(path, catalogue)
    elif name in GENERATORS:
        requests = generate(source, catalogue.kinds)
    else:
        raise ConfigError(f"trace {source!r} is neither a file nor one of the generators {', '.join(GENERATORS)}", param="trace")
    ordered = sorted(requests, key=lambda request: request.arrival_us)[:limit]
    if speed != 1.0:
        ordered = [replace(request, arrival_us=round(request.arrival_us / speed)) for request in ordered]
    return tuple(ordered)


def write_trace(path: Path, requests: Iterable[SimRequest]) -> None:
    """As our own CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*OWN_COLUMNS, "kind"))
        writer.writerows((one.arrival_us / SECOND, one.model, one.input_len, one.output_len, one.kind) for one in requests)


def _read_file(path: Path, catalogue: Catalogue) -> Sequence[SimRequest]:
    if path.suffix in (".jsonl", ".json"):
        return _with_models(_mooncake(path), catalogue)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        columns = set(rows.fieldnames or ())
        if {"req_id", "arrival_ms"} <= columns:
            return read_artifact(path)
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
            return _with_models(_azure(rows, path), catalogue)
        if set(OWN_COLUMNS) <= columns:
            return _own(rows, path, catalogue)
    raise ConfigError(f"{path} has columns {', '.join(sorted(columns)) or 'none'}; ours are {', '.join(OWN_COLUMNS)}", param="trace")


def _own(rows: Iterable[dict[str, str]], path: Path, catalogue: Catalogue) -> list[SimRequest]:
    found: list[SimRequest] = []
    kinds: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        model = row["model"]
        kind = row.get("kind") or kinds.setdefault(model, catalogue.kinds[len(kinds) % len(catalogue.kinds)])
        arrival_us = round(_value(float, row["arrival_s"], "arrival_s", path, number) * SECOND)
        lengths = [_value(int, row[name], name, path, number) for name in ("input_len", "output_len")]
        found.append(_request(len(found), arrival_us, lengths[0], lengths[1], model=model, kind=kind))
    return found


def _azure(rows: Iterable[dict[str, str]], path: Path) -> Iterator[SimRequest]:
    begin: datetime | None = None
    for number, row in enumerate(rows, start=2):
        at = _value(lambda text: datetime.fromisoformat(text[:26]), row["TIMESTAMP"], "TIMESTAMP", path, number)
        begin = begin or at
        arrival_us = round((at - begin).total_seconds() * SECOND)
        lengths = [_value(int, row[name], name, path, number) for name in ("ContextTokens", "GeneratedTokens")]
        yield _request(number - 2, arrival_us, lengths[0], lengths[1])


def _mooncake(path: Path) -> Iterator[SimRequest]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = _value(json.loads, line, "a line", path, number)
        try:
            yield _request(number - 1, int(row["timestamp"]) * MS, int(row["input_length"]), int(row["output_length"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}:{number}: {type(error).__name__} {error}; a line has timestamp, input_length, output_length"
            ) from error


def _value(read: Callable[[str], Any], text: str, column: str, path: Path, number: int) -> Any:
    try:
        return read(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{path}:{number}: {column} is {text!r}, which cannot be read", param="trace") from None


def _request(number: int, arrival_us: int, input_len: int, output_len: int, *, model: str = "", kind: str = "") -> SimRequest:
    if arrival_us < 0 or input_len < 1:
        raise ConfigError(f"request {number} arrives at {arrival_us} us with {input_len} tokens; neither may be that small", param="trace")
    return SimRequest(request_id=number, arrival_us=arrival_us, model=model, kind=kind, input_len=input_len, output_len=max(1, output_len))


def _with_models(requests: Iterable[SimRequest], catalogue: Catalogue) -> list[SimRequest]:
    rng = random.Random(f"models {catalogue.seed}")
    numbers, weights = range(catalogue.num_models), zipf_weights(catalogue.num_models, catalogue.zipf)
    kinds = catalogue.kinds
    picked = [(request, rng.choices(numbers, weights)[0]) for request in requests]
    return [replace(request, model=f"model-{number:04d}", kind=kinds[number % len(kinds)]) for request, number in picked]
