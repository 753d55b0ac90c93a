"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polymux.deploy import cli, reference
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.frontdoor import FrontDoor

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])


@pytest.mark.parametrize("file", sorted(reference.sections()))
def test_the_tables_are_those_of_the_code(file: str) -> None:
    text = (ROOT / "docs" / file).read_text()
    assert text == reference.filled(text, reference.sections()[file]), "run python -m polymux.deploy.reference"


def test_a_document_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="settings"):
        reference.filled("# nothing", {"settings": "x"})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_flag_of_serve_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    command = next(one for one in cli.app.registered_commands if one.callback is cli.serve)
    assert command.callback is not None
    names = {name for name in command.callback.__annotations__ if name not in ("return", "settings")} | {"set"}
    assert {name for name in names if f"`--{name.replace('_', '-')}" not in text} == set()


def test_every_path_of_the_api_is_documented() -> None:
    class Silent:
        metrics = None

    front_door: FrontDoor = Silent()  # type: ignore[assignment]
    text = (ROOT / "docs" / "api.md").read_text()
    paths = [route.path.replace(":path", "").replace("{model}", "{id}") for route in build_asgi(front_door).routes]  # type: ignore[attr-defined]
    assert len(paths) >= 12 and [path for path in paths if f" {path}`" not in text and f" {path}," not in text] == []
