"""Requests to simulate: read from traces, or generated from a seed. Output lengths are in here, and policies never see them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from polymux.disagg.sim.costs import MS
from polymux.transport.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SimRequest:
    request_id: int
    arrival_us: int
    model: str
    kind: str
    input_len: int
    output_len: int
    max_tokens: int | None = None  # that the user allows, which policies do see; None: any number
    session: int | None = None  # requests of one begin with all that was said in it before


def read_artifact(path: Path) -> tuple[SimRequest, ...]:
    """A request list of the Aegaeon artifact's simulator, by arrival. Raises ConfigError naming the line and the column."""
    with path.open(newline="", encoding="utf-8") as file:
        return _in_order(_artifact_row(row, f"{path}:{number}") for number, row in enumerate(csv.DictReader(file), start=2))


def _artifact_row(row: dict[str, str], where: str) -> SimRequest:
    def number(column: str) -> int:
        try:
            return int(row[column])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{where}: column {column!r} is {row.get(column)!r}, not a whole number") from None

    return SimRequest(
        request_id=number("req_id"),
        arrival_us=number("arrival_ms") * MS,
        model=row["model_name"],
        kind=row["model_type"],
        input_len=number("input_len"),
        output_len=max(1, number("output_len")),
    )


def _in_order(requests: Iterable[SimRequest]) -> tuple[SimRequest, ...]:
    """By arrival; those of one instant as they stand in the file."""
    return tuple(sorted(requests, key=lambda request: request.arrival_us))
