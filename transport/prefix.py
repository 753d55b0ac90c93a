"""Names of prefixes: a chain of keyed digests over a prompt's full blocks, equal wherever model, layout, salt and tokens are.

Each block's digest keys the next one's, so it names the whole prefix. Workers find cached KV by the tokens themselves, never by a digest;
what travels is the first 32 bits, a *mark*, by which the router guesses who has a prefix. Two prefixes of one mark cost it a bad guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from polymux.transport.messages import ModelSpec
from polymux.transport.units import PackedIds, pack_ids

DIGEST_BYTES = 16
TOKEN_BYTES = 4  # of a packed id
MAX_PROMPT_MARKS = 512  # of one prompt: 8192 tokens
MAX_CACHED_MARKS = 4096  # of one worker: 16 KiB a report


def salt_of(tenant: str, cache_salt: str) -> str:
    """What a tenant's requests share cached KV by: the tenant's own, and the salt that the request names."""
    if not tenant and not cache_salt:
        return ""
    key = hashlib.blake2b(tenant.encode(), digest_size=DIGEST_BYTES).digest()
    return hashlib.blake2b(cache_salt.encode(), digest_size=DIGEST_BYTES, key=key).hexdigest()


def root(spec: ModelSpec, salt: str) -> bytes:
    """The digest of the empty prefix."""
    text = f"{len(spec.digest)} {spec.digest} {spec.kv.layout_hash} {salt}"
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def extend(parent: bytes, block: bytes) -> bytes:
    """The digest of a prefix with one block more, its tokens packed."""
    return hashlib.blake2b(block, digest_size=DIGEST_BYTES, key=parent).digest()


def mark(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "little")


def marks_of(spec: ModelSpec, salt: str, prompts: Iterable[bytes]) -> PackedIds:
    """The marks of the full blocks that all of these packed prompts begin with, in order, as many as an `Admit` carries."""
    first, *others = dict.fromkeys(prompts)
    size = spec.kv.block_size * TOKEN_BYTES
    digest, found = root(spec, salt), []
    for start in range(0, min(len(first) // size, MAX_PROMPT_MARKS) * size, size):
        block = first[start : start + size]
        if any(other[start : start + size] != block for other in others):
            break
        digest = extend(digest, block)
        found.append(mark(digest))
    return pack_ids(found)
