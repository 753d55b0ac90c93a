"""Which model a prefill worker computes next, and which chunks of which prompts go into one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from polymux.disagg.batching import Chunk, fill_step
from polymux.disagg.views import PrefillView, PromptView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName, SequenceId

Memory = TypeVar("Memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStep:
    """One forward pass of one model. `prefetch` is the next other model in the line."""

    model: ModelName
    chunks: tuple[Chunk, ...]  # never empty
    prefetch: ModelName | None = None


class PrefillPolicy(Protocol[Memory]):
    """Names the next step. None when no prompt waits."""

    def start(self) -> Memory: ...

    def next_step(self, view: PrefillView, memory: Memory) -> tuple[PrefillStep | None, Memory]: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of one model that are computed one after another."""

    model: ModelName
    members: tuple[SequenceId, ...]  # those left, in line
    num_joined: int  # ever


@dataclass(frozen=True, slots=True)
class GroupedMemory:
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedFcfs:
    """Grouped first come, first served (Aegaeon, SOSP '25): a prompt joins the first group of its model that has room, else opens a new
    one at the tail; groups are served in line.

    Where it differs from the public artifact, on purpose: the size of a group is all that ever joined it, not those left in it. There, a
    group that is refilled while it drains never ends, and every other model starves. And several prompts of the leading groups
    share a step, in chunks under a token budget (there, whole prompts, one at a time).
    """

    max_group_size: int = 8

    def __post_init__(self) -> None:
        if self.max_group_size < 1:
            raise ConfigError(f"max_group_size={self.max_group_size} must be at least 1; 8 is the published value", param="max_group_size")

    def start(self) -> GroupedMemory:
        return GroupedMemory()

    def next_step(self, view: PrefillView, memory: GroupedMemory) -> tuple[PrefillStep | None, GroupedMemory]:
        prompts = {prompt.sequence_id: prompt for prompt in view.prompts if prompt.num_done < prompt.num_tokens}
        groups = self._joined(memory.groups, prompts)
        if not groups:
            return None, GroupedMemory()
        model = groups[0].model
        chunks = fill_step((prompts[member] for member in _leading(groups)), view.max_num_batched_tokens)
        prefetch = next((group.model for group in groups if group.model != model), None)
        return PrefillStep(model=model, chunks=chunks, prefetch=prefetch), GroupedMemory(groups)

    def _joined(self, groups: tuple[Group, ...], prompts: dict[SequenceId, PromptView]) -> tuple[Group, ...]:
        """The groups without those gone and with those new, in the order in which they came."""
        kept = [replace(group, members=tuple(m for m in group.members if m in prompts)) for group in groups]
        kept = [group for group in kept if group.members]
        known = {member for group in kept for member in group.members}
        open_at = {group.model: i for i, group in reversed(list(enumerate(kept))) if group.num_joined < self.max_group_size}
        for prompt in sorted((p for p in prompts.values() if p.sequence_id not in known), key=lambda p: p.order):
            at = open_at.get(prompt.model)
            if at is None:
                at = open_at[prompt.model] = len(kept)
                kept.append(Group(prompt.model, (), 0))
            group = kept[at]
            kept[at] = Group(group.model, (*group.members, prompt.sequence_id), group.num_joined + 1)
            if kept[at].num_joined >= self.max_group_size:
                del open_at[prompt.model]
        return tuple(kept)


def _leading(groups: tuple[Group, ...]) -> Iterable[SequenceId]:
    """Members of the first group and of those right behind it that have its model."""
    for group in groups:
        if group.model != groups[0].model:
            return
        yield from group.members


POLICIES: dict[str, Callable[..., PrefillPolicy[Any]]] = {"grouped_fcfs": GroupedFcfs}


def prefill_policy(name: str, **settings: int) -> PrefillPolicy[Any]:
    """The policy of that name. Raises ConfigError, naming the ones there are."""
    if name not in POLICIES:
        raise ConfigError(
            f"policies.prefill={name!r} is no prefill policy; there are: {', '.join(sorted(POLICIES))}", param="policies.prefill"
        )
    return POLICIES[name](**settings)
