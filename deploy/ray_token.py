"""Ray's token: who may run code on the Ray that serves. To be settled before `import ray`, which reads the environment once."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, MutableMapping
from pathlib import Path


def token_source(environ: Mapping[str, str]) -> str | None:
    """Where Ray will find its token; None when there is none yet."""
    given = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if environ.get(name)), None)
    path = Path(environ.get("HOME") or Path.home()) / ".ray" / "auth_token"
    return given or (str(path) if path.exists() else None)


def ensure_token(environ: MutableMapping[str, str]) -> None:
    """For a Ray of our own: ask for a token, and make one that dies with it where the user has none. Tokens turned off stay off."""
    if environ.setdefault("RAY_AUTH_MODE", "token") == "token" and token_source(environ) is None:
        environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
