"""A worker of a simulation, and the requests on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from polymux.disagg.multiplex import Turn
from polymux.disagg.phase import Phase
from polymux.disagg.sim.kv import KvRoom
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.outcome import Progress
from polymux.disagg.sim.residency import Switcher
from polymux.disagg.views import BatchView
from polymux.transport.units import ModelName, WorkerId


@dataclass(slots=True, eq=False)
class Prompt:
    """Tokens whose KV a sequence wants: its prompt, and where it lost what it had, its own tokens too."""

    one: Progress
    num_tokens: int
    num_done: int = 0
    is_copied: bool = False  # from host memory, not computed

    @property
    def num_left(self) -> int:
        return self.num_tokens - self.num_done


@dataclass(slots=True, eq=False)
class Work:
    """One model's requests on one worker, those that have room."""

    kind: str
    prompts: list[Prompt] = field(default_factory=list)
    running: list[Progress] = field(default_factory=list)
    passed_over: Counter[Phase] = field(default_factory=Counter)  # steps that the other phase had, while this one waited
    view: BatchView | None = None  # of all this, until something of it changes

    @property
    def kv_tokens(self) -> int:
        return sum(one.context_len for one in self.running)

    @property
    def num_seqs(self) -> int:
        return len(self.running) + len(self.prompts)


@dataclass(slots=True, eq=False)
class SimWorker:
    number: int
    worker_id: WorkerId
    memory: Any  # the policy's
    weights: Switcher
    kv: KvRoom | None  # None: there is always room
    line: list[Prompt] = field(default_factory=list)  # for room, oldest first
    work: dict[ModelName, Work] = field(default_factory=dict)
    turn: Turn | None = None
    turn_began_us: int = 0
    has_news: bool = False
    is_busy: bool = False
    prefilling: list[tuple[Prompt, int]] = field(default_factory=list)  # with how many of its tokens
    decoding: list[Progress] = field(default_factory=list)
    owed_us: int = 0  # copies that the next step waits for
    owed_bytes: int = 0  # the same, and what must go first, where they go over links that are shared
    leaving_bytes: int = 0
    copies: list[Flow] = field(default_factory=list)  # of those bytes, that the next step will wait for
    held: list[Flow] = field(default_factory=list)  # what the step under way waits for: when it ends is not known before they have
    held_late_us: int = 0  # after their bytes have come
    began_us: int = 0  # the step under way, or the first of `ends_us` that is not done
    ends_us: list[int] = field(default_factory=list)  # of steps alike, of which nothing but news can be expected to change any

    def drop_idle(self) -> None:
        """Only models with something are its work."""
        for model in [model for model, work in self.work.items() if not work.num_seqs]:
            del self.work[model]
