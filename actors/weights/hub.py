"""From what a user calls a checkpoint to a directory on this machine: a path, or a model id of the Hugging Face hub.

The hub's own variables hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, and HF_HUB_DOWNLOAD_TIMEOUT, which bounds each wait for bytes.
"""

from __future__ import annotations

import re
from pathlib import Path

from polymux.transport.errors import CheckpointError, ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
WANTED = ["*.json", "*.jinja", "*.safetensors"]  # nothing that would have to be unpickled
UNWANTED = ["consolidated*", "original/*", "onnx/*"]  # the same weights again, in other layouts


def resolve(source: str | Path) -> Path:
    """The directory of a checkpoint. A hub id may name a revision: "org/name@main".

    Raises CheckpointError when there is no such path and no such model, ConfigError when the hub's client is not installed.
    """
    path = Path(source).expanduser()
    if str(source) and path.exists():
        return path.absolute()
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: there is no such directory; give a checkpoint's directory, or a hub id such as org/name")
    repo_id, _, revision = str(source).partition("@")
    return _download(repo_id, revision or None)


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{repo_id}: there is no such directory, and to fetch it from the hub needs huggingface_hub: pip install 'polymux[hub]'"
        ) from error
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # the client has no common root of what it raises: HTTP, offline, gated, missing, bad ids, full disks
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{repo_id}: there is no such directory, and the hub did not give it{at} ({type(error).__name__}: {error}); check the name, "
            "the network, HF_TOKEN for a gated model and HF_HUB_OFFLINE, or download it and give its directory"
        ) from error
