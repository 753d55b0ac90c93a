"""KV of one simulated worker: what sequences hold, what stays cached after them, and the room that both leave to weights.

A live worker's blocks at their full size, but no slabs: what is free is free for every model. Cached KV is never in the way of sequences;
weights keep their reserve, and beyond it make way for KV.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from polymux.transport.units import BLOCK_SIZE, ModelName

Key = tuple[ModelName, int, bool]  # model, then a session, or a request that belongs to none


@dataclass(frozen=True, slots=True)
class _Cached:
    num_tokens: int
    nbytes: int


@dataclass(slots=True)
class KvRoom:
    arena_bytes: int
    reserve_bytes: int  # of it, for weights
    held_bytes: int = 0
    cached_bytes: int = 0
    _held: dict[int, int] = field(default_factory=dict)  # bytes by request
    _cached: OrderedDict[Key, _Cached] = field(default_factory=OrderedDict)  # used longest ago first

    @property
    def free_bytes(self) -> int:
        """For sequences; cached KV goes where it is wanted."""
        return self.arena_bytes - self.reserve_bytes - self.held_bytes

    @property
    def weights_end(self) -> int:
        """Where KV begins: weights may lie below."""
        return max(self.reserve_bytes, self.arena_bytes - self.held_bytes - self.cached_bytes)

    def held(self, request_id: int) -> int:
        return self._held.get(request_id, 0)

    def cached_tokens(self, key: Key, num_tokens: int) -> int:
        """Of a prompt of so many tokens, how many need no computing: whole blocks, and never its last token."""
        found = self._cached.get(key)
        return 0 if found is None else min(found.num_tokens, num_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE

    def take(self, key: Key) -> None:
        """A sequence goes on from what is cached under this key: it is held from now on, and counted there."""
        found = self._cached.pop(key, None)
        if found is not None:
            self.cached_bytes -= found.nbytes

    def hold(self, request_id: int, num_tokens: int, token_bytes: int) -> None:
        """A sequence has so many tokens from now on. It may run into what `free_bytes` says: whoever steps must ask before."""
        nbytes = blocks(num_tokens) * token_bytes
        self.held_bytes += nbytes - self._held.get(request_id, 0)
        self._held[request_id] = nbytes
        self._trim()

    def release(self, request_id: int, key: Key | None = None, num_tokens: int = 0, token_bytes: int = 0) -> None:
        """It holds nothing any more. Its full blocks stay, under a key, until their room is wanted."""
        self.held_bytes -= self._held.pop(request_id, 0)
        whole = num_tokens // BLOCK_SIZE * BLOCK_SIZE
        if key is not None and whole:
            self.take(key)
            self._cached[key] = _Cached(whole, whole * token_bytes)
            self.cached_bytes += whole * token_bytes
            self._trim()

    def _trim(self) -> None:
        while self._cached and self.cached_bytes > max(0, self.free_bytes):
            _, gone = self._cached.popitem(last=False)
            self.cached_bytes -= gone.nbytes


def blocks(num_tokens: int) -> int:
    """Tokens that the blocks of so many hold."""
    return -(-num_tokens // BLOCK_SIZE) * BLOCK_SIZE
