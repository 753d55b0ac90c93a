"""What the doctor finds: one line of `polymux doctor`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Level(enum.StrEnum):
    OK = "ok"
    NOTE = "note"  # worth knowing; nothing to do
    TIGHT = "tight"  # serves, but slowly or not for long
    MISSING = "missing"  # serving would fail


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    name: str
    level: Level
    found: str
    fix: str = ""
