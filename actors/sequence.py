"""A sequence on a decode worker: its tokens, its blocks, and where it stands.

WAITING ──grant──▶ PREFILLING ──commit──▶ RUNNING ──last token──▶ gone
   ▲                                      │     ▲
   ├── preempted, to be computed again ───┤     └────────────────────────┐
   │                                      └▶ SWAPPING_OUT ─▶ SWAPPED ─▶ SWAPPING_IN
   └── a copy failed ─────────────────────────────┴───────────────────────┘

Cancel, deadline and errors lead to gone from every state.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from polymux.actors.sampler import SamplerState
from polymux.transport.messages import Generate, ModelSpec, Peer
from polymux.transport.units import ClientId, SequenceId, TransferId, pack_ids, unpack_ids


class Phase(enum.Enum):
    WAITING = "waiting"  # for blocks
    PREFILLING = "prefilling"  # blocks granted, KV on its way
    RUNNING = "running"
    SWAPPING_OUT = "swapping_out"  # its last blocks are on their way to the host tier
    SWAPPED = "swapped"  # there, and waits for room to come back
    SWAPPING_IN = "swapping_in"


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, and owned by one worker's engine thread. Times are that worker's monotonic clock."""

    command: Generate
    client_id: ClientId
    spec: ModelSpec
    order: int  # its place in the worker's line
    deadline_s: float
    first_due_s: float  # when token 0 was due; token i is due i * TPOT later
    prompt_ids: list[int]
    output_ids: list[int]
    sampler: SamplerState
    phase: Phase = Phase.WAITING
    block_ids: list[int] = field(default_factory=list)  # on the device; while it is swapped out, the first of its blocks
    host_ids: list[int] = field(default_factory=list)  # in the host tier: the rest of them
    transfer_id: TransferId | None = None
    num_preemptions: int = 0
    prefill: Peer | None = None  # who computes or hands over its KV; None: this worker itself
    handover: SequenceId | None = None  # under which it is kept at `prefill`
    num_ahead: int = 0  # steps handed to the device whose token is not read yet: each has its slot, and will have its K and V there
    is_kept: bool = True  # every token that was made here was on time

    @classmethod
    def from_command(cls, command: Generate, client_id: ClientId, spec: ModelSpec, order: int, now_s: float) -> Sequence:
        prompt_ids, output_ids = unpack_ids(command.prompt_ids), unpack_ids(command.output_ids)
        return cls(
            command=command,
            client_id=client_id,
            spec=spec,
            order=order,
            deadline_s=now_s + command.deadline_s,
            first_due_s=now_s + command.due_in_s,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            sampler=SamplerState(command.sampling, prompt_ids, output_ids, spec.eos_token_ids, spec.vocab_size),
            prefill=command.prefill,
            handover=command.handover,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def packed_ids(self) -> bytes:
        """All tokens, as a prefix cache takes them."""
        return self.command.prompt_ids + pack_ids(self.output_ids)

    @property
    def num_cached(self) -> int:
        """Tokens whose KV is in the blocks while RUNNING: all but the newest, which the next step computes."""
        return self.num_tokens - 1

    @property
    def num_launched(self) -> int:
        """Tokens whose KV is in the blocks once the device has done what it was handed."""
        return self.num_cached + self.num_ahead

    @property
    def can_step(self) -> bool:
        """It runs, and goes on after what was handed to the device, unless a token there ends it."""
        if self.phase is not Phase.RUNNING:
            return False
        is_full = self.num_tokens + self.num_ahead >= self.spec.max_model_len
        return not self.num_ahead or not (is_full or self.sampler.ends_within(self.num_ahead))

    @property
    def num_tokens_to_come(self) -> int:
        """Tokens whose KV a transfer brings: all, or all but the newest where they are handed over as they are."""
        return self.num_tokens if self.handover is None else self.num_cached

    @property
    def last_token_id(self) -> int:
        return self.output_ids[-1] if self.output_ids else self.prompt_ids[-1]

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks to add so that the next step's token has its slot."""
        return self.spec.kv.num_blocks(self.num_launched + 1) - len(self.block_ids)

    @property
    def due_s(self) -> float:
        """When the next token is due."""
        return self.first_due_s + len(self.output_ids) * self.command.tpot_slo_s

    def append(self, token_id: int, now_s: float) -> None:
        self.is_kept = self.is_kept and now_s <= self.due_s
        self.output_ids.append(token_id)
        self.sampler.append(token_id)
