"""One order of a prefill worker: what is to be computed, by when, in which blocks, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from polymux.transport.kv import OrderRef
from polymux.transport.messages import ModelSpec, Prefill


@dataclass(slots=True, eq=False)
class Job:
    """One order under way. `num_done` counts the tokens whose KV is computed and pushed."""

    order: OrderRef
    command: Prefill
    spec: ModelSpec
    place: int  # in the worker's line
    deadline_s: float
    due_at_s: float  # its token, on the engine's clock
    prompt_ids: list[int]
    output_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    num_done: int = 0
    short_since_s: float | None = None  # when it was first in line, and only this worker's own sequences had blocks
    pushed_s: float | None = None  # when its first layer was offered to the transport
    num_cached: int = 0  # of the done, found in the prefix cache
    packed_ids: bytes = b""  # prompt and outputs, as the cache takes them
    digests: list[bytes] = field(default_factory=list)  # of what of it may be cached

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def next_digest(self) -> bytes | None:
        """Of the prefix that ends with the block that it computes next; None for the last, which is always computed."""
        block = self.num_done // self.spec.kv.block_size
        return self.digests[block] if block < len(self.digests) else None

    def tokens(self, start: int, count: int) -> list[int]:
        cut = len(self.prompt_ids)
        return self.prompt_ids[start : start + count] + self.output_ids[max(start - cut, 0) : max(start + count - cut, 0)]
