"""Names of prefixes: a chain of keyed digests over a prompt's full blocks, equal wherever model, layout, salt and tokens are.

Each block's digest keys the next one's, so it names the whole prefix. Workers find cached KV by the tokens themselves, never by a digest;
what travels is the first 32 bits, a *mark*, by which the router guesses who has a prefix. Two prefixes of one mark cost it a bad guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

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


def num_matchable(tokens: bytes, block_size: int) -> int:
    """The full blocks of packed tokens that may come from a cache: one token at least is computed, for its logits."""
    return max(len(tokens) // TOKEN_BYTES - 1, 0) // block_size


def blocks_of(tokens: bytes, block_size: int, num_blocks: int) -> Iterator[bytes]:
    """The first full blocks of packed tokens."""
    width = block_size * TOKEN_BYTES
    return (tokens[start : start + width] for start in range(0, num_blocks * width, width))


def chain(spec: ModelSpec, salt: str, tokens: bytes) -> list[bytes]:
    """The digests of the prefixes that end with each matchable block of packed tokens."""
    digest, found = root(spec, salt), []
    for block in blocks_of(tokens, spec.kv.block_size, num_matchable(tokens, spec.kv.block_size)):
        digest = extend(digest, block)
        found.append(digest)
    return found


def marks_of(spec: ModelSpec, salt: str, prompts: Iterable[bytes]) -> PackedIds:
    """The marks of the matchable blocks that all of these packed prompts begin with, in order, as many as an `Admit` carries."""
    first, *others = dict.fromkeys(prompts)
    size = spec.kv.block_size
    num_blocks = min(MAX_PROMPT_MARKS, *(num_matchable(prompt, size) for prompt in (first, *others)))
    digest, found = root(spec, salt), []
    for i, block in enumerate(blocks_of(first, size, num_blocks)):
        start = i * len(block)
        if any(other[start : start + len(block)] != block for other in others):
            break
        digest = extend(digest, block)
        found.append(mark(digest))
    return pack_ids(found)
