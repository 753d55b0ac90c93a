"""Hub ids, against the hub client's own cache on disk: no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from polymux.actors.weights.hub import resolve
from polymux.transport.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
from polymux.actors.weights.hub import resolve
from polymux.transport.errors import PolymuxError
if sys.argv[1] == "without-client":
    sys.modules["huggingface_hub"] = None
found = {}
for source in sys.argv[2:]:
    try:
        found[source] = ["found", str(resolve(source))]
    except PolymuxError as error:
        found[source] = [type(error).__name__, error.message]
print(json.dumps(found))
"""


def _resolve_in_process(home: Path, mode: str, *sources: str) -> dict[str, list[str]]:
    """The client reads its variables when it is imported, hence a process of its own."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode, *sources], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _cache_snapshot(home: Path) -> Path:
    model = home / "hub" / "models--org--name"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_a_cached_model_is_found_offline_by_id_and_revision_and_others_are_refused_with_the_fix(tmp_path: Path) -> None:
    snapshot = _cache_snapshot(tmp_path)
    found = _resolve_in_process(tmp_path, "with-client", "org/name", f"org/name@{COMMIT}", "org/other", "org/name@v2")
    assert found["org/name"] == ["found", str(snapshot)]
    assert found[f"org/name@{COMMIT}"] == ["found", str(snapshot)]
    for source in ("org/other", "org/name@v2"):
        name, message = found[source]
        assert name == "CheckpointError"
        assert "HF_HUB_OFFLINE" in message
    assert "at revision v2" in found["org/name@v2"][1]


def test_without_the_client_the_error_names_the_package(tmp_path: Path) -> None:
    name, message = _resolve_in_process(tmp_path, "without-client", "org/name")["org/name"]
    assert name == "ConfigError"
    assert "pip install 'polymux[hub]'" in message


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == tmp_path / "org" / "name"


@pytest.mark.parametrize("source", ["name", "/org/name", "../name", "a/b/c", "org/name@", ""])
def test_what_is_neither_a_path_nor_an_id_is_refused(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such directory"):
        resolve(source)
