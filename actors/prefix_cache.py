"""The prefix cache: full KV blocks kept by the tokens they hold, so that a prompt that begins like an earlier one is not computed again.

A tree for each model and salt: an edge is the tokens of one block, so a hit is by equality and no two prefixes can be taken for each other.
Models are told apart by the digest of their weights and the layout of their KV; salts are kept apart altogether. A cached block that
nobody holds is idle in its pool (`kv_blocks.py`) and goes as soon as its room is wanted: the one that loses least (`Shelf.value`) first.
Where there is a host tier it goes there (`host_prefixes.py`), and comes back when it is found.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from polymux.actors.host_prefixes import HostPrefixes
from polymux.actors.kv_blocks import BlockManager, BlockPool
from polymux.disagg.cost import Roofline, guess_prefill
from polymux.disagg.reuse import Worth
from polymux.transport.head_slices import sharded
from polymux.transport.messages import KVLayout, ModelSpec
from polymux.transport.prefix import MAX_CACHED_MARKS, TOKEN_BYTES, blocks_of, extend, mark, num_matchable, root
from polymux.transport.units import NO_IDS, PackedIds, pack_ids


@dataclass(slots=True, eq=False, kw_only=True)
class Prefix:
    """A point of a tree. `digest` names all tokens up to here, for the router."""

    digest: bytes
    children: dict[bytes, Block] = field(default_factory=dict)  # by the next block's packed tokens


@dataclass(slots=True, eq=False, kw_only=True)
class Root(Prefix):
    """The empty prefix under one salt."""

    salt: str


@dataclass(slots=True, eq=False, kw_only=True)
class Block(Prefix):
    """One cached block, after its parent's tokens."""

    parent: Prefix
    tokens: bytes
    block_id: int
    used_s: float


@dataclass(slots=True, eq=False)
class Shelf:
    """The cached blocks of one model, which any number of names may share."""

    spec: ModelSpec
    pool: BlockPool
    worth: Worth
    roots: dict[str, Root] = field(default_factory=dict)  # by salt; none is empty
    by_id: dict[int, Block] = field(default_factory=dict)
    line: OrderedDict[Block, None] = field(default_factory=OrderedDict)  # used longest ago first, and every block before its parent

    def touch(self, end: Prefix, now_s: float) -> None:
        """This prefix is used: its blocks go to the end of the line, the last one first."""
        while isinstance(end, Block):
            end.used_s = now_s
            self.line.move_to_end(end)
            end = end.parent

    def oldest_idle(self, now_s: float) -> Block | None:
        """The next to go. Held blocks on the way are in use, and told so."""
        for _ in range(len(self.line)):
            block = next(iter(self.line))
            if self.pool.is_idle(block.block_id):
                return block
            self.touch(block, now_s)
        return None

    def value(self, used_s: float, now_s: float) -> float:
        """Seconds that a block used then is expected to save, a byte."""
        return self.worth.per_byte(used_s, now_s)


class PrefixCache:
    """Of one engine, whose thread calls everything here. Blocks that `match` returns are the caller's to free."""

    def __init__(self, blocks: BlockManager, clock: Callable[[], float], *, is_enabled: bool = True) -> None:
        self._blocks = blocks
        self._clock = clock
        self._is_enabled = is_enabled
        self._shelves: dict[tuple[str, KVLayout], Shelf] = {}
        self._slab_used_s: dict[tuple[KVLayout, int], float] = {}  # when a block of it was last used
        self._digests: set[bytes] = set()
        self.num_inserted = 0  # blocks, ever
        self.num_evicted = 0
        self._marks = NO_IDS
        self._marks_at, self._marks_s = 0, -math.inf  # after which change, and when
        self.host: HostPrefixes | None = None  # the second level, where there is one
        if is_enabled:
            blocks.reclaim_from(self)

    def match(self, spec: ModelSpec, salt: str, tokens: bytes, *, first_block: int = 0) -> list[int]:
        """The blocks from number `first_block` on of the longest cached prefix of packed tokens, the caller one holder more of each.

        At least one token is left over, since somebody has to compute the last one's logits.
        """
        shelf = self._shelves.get((spec.digest, spec.kv))
        if shelf is None:
            return []
        if not first_block:
            shelf.worth = shelf.worth.touched(self._clock())
        edges = list(blocks_of(tokens, spec.kv.block_size, num_matchable(tokens, spec.kv.block_size)))
        end: Prefix | None = shelf.roots.get(salt)
        found: list[int] = []
        while len(found) < len(edges) and end is not None and (child := end.children.get(edges[len(found)])) is not None:
            end = child
            found.append(child.block_id)
        if found and end is not None:
            self._touch(shelf, end)
        if len(found) < first_block:
            return []
        shelf.pool.share(found)
        num_wanted = spec.kv.num_blocks(len(tokens) // TOKEN_BYTES) - len(found)
        if num_wanted <= shelf.pool.num_free:  # else the caller will wait, and copies would be in vain
            found += self._from_host(shelf, salt, edges, found)
        shelf.pool.free(found[:first_block])
        return found[first_block:]

    def _from_host(self, shelf: Shelf, salt: str, edges: Sequence[bytes], found: Sequence[int]) -> list[int]:
        """The blocks that go on from those found, brought back from the host tier and cached again; the caller holds them."""
        if self.host is None or not self.host.num_blocks:
            return []
        digests: list[bytes] = []
        digest = shelf.by_id[found[-1]].digest if found else root(shelf.spec, salt)
        for edge in edges[len(found) :]:
            digest = extend(digest, edge)
            if not self.host.has(shelf.spec.kv, digest):
                break
            digests.append(digest)
        loaded = self.host.load(shelf.pool, digests) if digests else []
        if loaded:
            whole = [*found, *loaded]
            self.insert(shelf.spec, salt, b"".join(edges[: len(whole)]), whole)
        return loaded

    def has(self, digest: bytes) -> bool:
        """Is it worth a `match`, for blocks on the device? The digest is of a prefix's chain; only `match` compares tokens."""
        return digest in self._digests

    def insert(self, spec: ModelSpec, salt: str, tokens: bytes, block_ids: Sequence[int]) -> None:
        """Keep the full blocks of packed tokens, which the caller holds and whose KV is final. What is cached already stays."""
        num_blocks = min(len(tokens) // (spec.kv.block_size * TOKEN_BYTES), len(block_ids))
        if not self._is_enabled or not num_blocks:
            return
        shelf = self._shelf(spec)
        now_s = self._clock()
        end: Prefix = shelf.roots.get(salt) or shelf.roots.setdefault(salt, Root(digest=root(spec, salt), salt=salt))
        for block_id, edge in zip(block_ids, blocks_of(tokens, spec.kv.block_size, num_blocks), strict=False):
            child = end.children.get(edge)
            if child is None:
                shelf.pool.cache(block_id)
                child = Block(digest=extend(end.digest, edge), parent=end, tokens=edge, block_id=block_id, used_s=now_s)
                end.children[edge] = shelf.by_id[block_id] = child
                shelf.line[child] = None
                self._digests.add(child.digest)
                self.num_inserted += 1
            end = child
        self._touch(shelf, end)

    def _shelf(self, spec: ModelSpec) -> Shelf:
        key = (spec.digest, spec.kv)
        shelf = self._shelves.get(key)
        if shelf is None:
            _, token_s, _ = guess_prefill(spec, Roofline()).coefficients
            kv = spec.kv
            copied_bytes = sharded(kv, 1).block_bytes + kv.num_ranks * kv.block_bytes
            worth = Worth(seconds=token_s * kv.block_size, nbytes=kv.block_bytes, copied_bytes=copied_bytes)
            shelf = self._shelves[key] = Shelf(spec, self._blocks.pool(kv), worth.touched(self._clock()))
        return shelf

    def _touch(self, shelf: Shelf, end: Prefix) -> None:
        now_s = self._clock()
        shelf.touch(end, now_s)
        while isinstance(end, Block):
            self._slab_used_s[shelf.spec.kv, shelf.pool.slab_of(end.block_id)] = now_s
            end = end.parent

    # -- giving room back ---------------------------------------------------------------------------------------------

    def reclaim(self, pool: BlockPool, num_blocks: int) -> None:
        """Uncache what is worth least: idle blocks of this layout one by one, slabs of others whole, until so many can be allocated."""
        now_s = self._clock()
        shelves = [shelf for shelf in self._shelves.values() if shelf.pool is pool]
        heads = [(shelf.value(block.used_s, now_s), i) for i, shelf in enumerate(shelves) if (block := shelf.oldest_idle(now_s))]
        heapq.heapify(heads)
        slabs = self._idle_slabs(now_s, beside=pool)
        while pool.num_ready < num_blocks and (heads or slabs):
            if not heads or (slabs and slabs[-1][0] < heads[0][0]):
                _, other, slab = slabs.pop()
                self._evict_slab(other, slab)
                continue
            _, i = heapq.heappop(heads)
            block = shelves[i].oldest_idle(now_s)
            if block is not None:
                self._evict(shelves[i], block)
            if (block := shelves[i].oldest_idle(now_s)) is not None:
                heapq.heappush(heads, (shelves[i].value(block.used_s, now_s), i))

    @property
    def num_bytes(self) -> int:
        """In slabs that hold nothing else, which `release` could give back now."""
        return self._blocks.num_idle_slab_bytes

    def value(self) -> float:
        """Expected seconds that the least valuable of those slabs saves, a byte; 0 without one."""
        slabs = self._idle_slabs(self._clock())
        return slabs[-1][0] if slabs else 0.0

    def release(self, nbytes: int) -> int:
        """Give slabs of so many bytes back, the least valuable first. How many bytes they were."""
        before, slabs = self.num_bytes, self._idle_slabs(self._clock())
        while slabs and before - self.num_bytes < nbytes:
            _, pool, slab = slabs.pop()
            self._evict_slab(pool, slab)
        return before - self.num_bytes

    def _idle_slabs(self, now_s: float, beside: BlockPool | None = None) -> list[tuple[float, BlockPool, int]]:
        """Slabs that hold nothing but idle blocks, with what their best block is worth at most: the least valuable last."""
        found: list[tuple[float, BlockPool, int]] = []
        for layout, pool in self._blocks.pools.items():
            if pool is not beside:
                shelves = [shelf for shelf in self._shelves.values() if shelf.pool is pool]
                for slab in pool.idle_slabs:
                    used_s = self._slab_used_s.get((layout, slab), 0.0)
                    found.append((max((shelf.value(used_s, now_s) for shelf in shelves), default=0.0), pool, slab))
        return sorted(found, key=lambda one: one[0], reverse=True)

    def _evict_slab(self, pool: BlockPool, slab: int) -> None:
        for shelf in self._shelves.values():
            if shelf.pool is pool:
                for block_id in pool.ids_of(slab):
                    if (block := shelf.by_id.get(block_id)) is not None:
                        self._evict(shelf, block)

    def _evict(self, shelf: Shelf, block: Block) -> None:
        """Forget a block and all that follow it, which could not be found any more."""
        gone, i = [block], 0
        while i < len(gone):
            gone += gone[i].children.values()
            i += 1
        for one in gone:
            del shelf.line[one], shelf.by_id[one.block_id]
            self._digests.discard(one.digest)
        parent = block.parent
        del parent.children[block.tokens]
        if isinstance(parent, Root) and not parent.children:
            del shelf.roots[parent.salt]
        if self.host is not None and shelf.worth.pays_a_copy:
            for one in gone:
                self.host.put(shelf.pool, one.block_id, one.digest)
        self.num_evicted += len(gone)
        shelf.pool.uncache([one.block_id for one in gone])

    # -- what others are told -----------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        return sum(len(shelf.line) for shelf in self._shelves.values())

    def marks(self, max_age_s: float = 0.0) -> PackedIds:
        """Marks of the blocks used last, newest first, of all models: for the router. At most so old, if there are newer ones."""
        change, now_s = self.num_inserted + self.num_evicted, self._clock()
        if self._marks_at != change and now_s - self._marks_s >= max_age_s:
            lines = [((-block.used_s, block.digest) for block in reversed(shelf.line)) for shelf in self._shelves.values()]
            newest = (digest for _, digest in heapq.merge(*lines, key=lambda one: one[0]))
            below = self.host.newest() if self.host is not None else ()
            self._marks = pack_ids(mark(digest) for digest in islice(chain(newest, below), MAX_CACHED_MARKS))
            self._marks_at, self._marks_s = change, now_s
        return self._marks

    def check(self) -> None:
        """Assert that trees, lines and pools say the same."""
        if self.host is not None:
            self.host.check()
        for shelf in self._shelves.values():
            seen: set[Block] = set()
            below: list[Prefix] = list(shelf.roots.values())
            assert all(one.children for one in below), "an empty tree is kept"
            while below:
                one = below.pop()
                assert all(child.parent is one and child.tokens == tokens for tokens, child in one.children.items())
                below += one.children.values()
                seen.update(one.children.values())
            assert seen == set(shelf.line), "the line and the trees differ"
            assert shelf.by_id == {block.block_id: block for block in seen}, "a block is cached twice"
            place = {block: i for i, block in enumerate(shelf.line)}
            assert all(place[block] < place[block.parent] for block in seen if isinstance(block.parent, Block)), "a parent would go first"
        for pool in self._blocks.pools.values():
            assert pool.cached_ids == {block_id for shelf in self._shelves.values() if shelf.pool is pool for block_id in shelf.by_id}
