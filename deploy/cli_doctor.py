"""How `polymux doctor` looks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from polymux.deploy.findings import Finding, Level

STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.TIGHT: "yellow", Level.MISSING: "bold red"}


def show(findings: Sequence[Finding], console: Console, *, is_json: bool) -> int:
    """1 when serving would fail, else 0."""
    num_missing = sum(finding.level is Level.MISSING for finding in findings)
    if is_json:
        console.print_json(json.dumps({"ok": not num_missing, "checks": [asdict(finding) for finding in findings]}))
        return int(num_missing > 0)
    table = Table(box=None)
    for name in ("", "check", "found", "fix"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(f"[{STYLES[finding.level]}]{finding.level}[/]", finding.name, finding.found, finding.fix)
    console.print(table)
    num_tight = sum(finding.level is Level.TIGHT for finding in findings)
    verdict = (
        f"serving would fail: {num_missing} missing" if num_missing else "ready to serve" + (f", {num_tight} tight" if num_tight else "")
    )
    console.print(verdict, style="bold red" if num_missing else "green")
    return int(num_missing > 0)
