"""API keys: kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from polymux.transport.errors import AuthenticationFailed

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version"})  # for probes and scrapers, which hold no key


def hash_key(key: str) -> str:
    """As settings keep it: "sha256:" and 64 hex digits. Keys are long and random, so a fast hash is enough."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """None at all leaves the server open."""

    def __init__(self, hashed: Sequence[str]) -> None:
        self._hashed = tuple(hashed)

    def check(self, authorization: str | None) -> str:
        """The tenant of an Authorization header's key: a name made from its hash, "" where the server is open.

        Raises AuthenticationFailed. Takes as long for every wrong key: all are compared, each in constant time.
        """
        if not self._hashed:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = hash_key(key.strip())
        known = [one for one in self._hashed if hmac.compare_digest(one, given)]
        if scheme.lower() != "bearer" or not known:
            raise AuthenticationFailed("a valid API key is needed: send the header Authorization: Bearer KEY")
        return "key-" + known[0].removeprefix("sha256:")[:12]
