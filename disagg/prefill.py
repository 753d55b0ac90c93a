"""Which model a prefill worker computes next, and which chunks of which prompts go into one step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import exp, fsum
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


@dataclass(frozen=True, slots=True)
class DeadlineMemory:
    """How many steps the oldest prompt's model has been passed over."""

    oldest: SequenceId | None = None
    num_passed_over: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """First tokens on time per second of the worker's time: `slack.py`'s rule for prompts, which end, instead of batches, which go on.

    A prompt is worth its first token, faded by the time left until that is due, and by how late it is: what it is worth over what its
    rest takes orders the prompts of a model, and the sum over a model's prompts over the time of them all, its switch included, the models.
    So prompts of one model stay together, the resident model is preferred by what a switch costs, and a short prompt passes a long one that
    has time. The oldest prompt's model is passed over for at most `max_group_size` times `max_groups_skipped` steps.
    """

    max_group_size: int = 8
    max_groups_skipped: int = 4
    horizon_rounds: float = 0.5  # slack is measured in the time that all that waits would take

    def __post_init__(self) -> None:
        for name in ("max_group_size", "max_groups_skipped", "horizon_rounds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0", param=name)

    def start(self) -> DeadlineMemory:
        return DeadlineMemory()

    def next_step(self, view: PrefillView, memory: DeadlineMemory) -> tuple[PrefillStep | None, DeadlineMemory]:
        prompts = [prompt for prompt in view.prompts if prompt.num_done < prompt.num_tokens]
        if not prompts:
            return None, DeadlineMemory()
        oldest = min(prompts, key=lambda prompt: prompt.order)
        num_passed_over = memory.num_passed_over if memory.oldest == oldest.sequence_id else 0
        is_overdue = num_passed_over >= self.max_group_size * self.max_groups_skipped
        worth = self._worth(prompts, view.now_s)
        rank = self._rank(prompts, worth)
        model = oldest.model if is_overdue else min(rank, key=lambda model: (-rank[model], model))
        line = sorted(
            (prompt for prompt in prompts if prompt.model == model),
            key=lambda p: (is_overdue and p is not oldest, -worth[p.sequence_id] / _rest_s(p), p.order),
        )
        chunks = fill_step(line, view.max_num_batched_tokens)
        others = [other for other in rank if other != model]
        prefetch = min(others, key=lambda other: (-rank[other], other)) if others else None
        is_served = any(chunk.sequence_id == oldest.sequence_id for chunk in chunks)
        passed_over = DeadlineMemory(oldest.sequence_id, 0 if is_served else num_passed_over + 1)
        return PrefillStep(model=model, chunks=chunks, prefetch=prefetch), passed_over

    def _worth(self, prompts: list[PromptView], now_s: float) -> dict[SequenceId, float]:
        switches_s = {prompt.model: prompt.switch_s for prompt in prompts}
        horizon_s = self.horizon_rounds * (fsum(_rest_s(prompt) for prompt in prompts) + fsum(switches_s.values()))
        found = {}
        for prompt in prompts:
            slack_s = prompt.due_at_s - now_s - prompt.switch_s - _rest_s(prompt)
            found[prompt.sequence_id] = exp(-slack_s / horizon_s) if slack_s >= 0 else 1 / (1 - slack_s / horizon_s)
        return found

    def _rank(self, prompts: list[PromptView], worth: dict[SequenceId, float]) -> dict[ModelName, float]:
        """By model, over its best `max_group_size` prompts."""
        by_model: dict[ModelName, list[PromptView]] = {}
        for prompt in prompts:
            by_model.setdefault(prompt.model, []).append(prompt)
        found = {}
        for model, members in by_model.items():
            best = sorted(members, key=lambda p: (-worth[p.sequence_id] / _rest_s(p), p.order))[: self.max_group_size]
            found[model] = fsum(worth[p.sequence_id] for p in best) / (best[0].switch_s + fsum(_rest_s(p) for p in best))
        return found


def _rest_s(prompt: PromptView) -> float:
    return max(prompt.prefill_s, 1e-6)


POLICIES: dict[str, Callable[..., PrefillPolicy[Any]]] = {"deadline": Deadline, "grouped_fcfs": GroupedFcfs}


def prefill_policy(name: str, **settings: int) -> PrefillPolicy[Any]:
    """The policy of that name. Raises ConfigError, naming the ones there are."""
    if name not in POLICIES:
        raise ConfigError(
            f"policies.prefill={name!r} is no prefill policy; there are: {', '.join(sorted(POLICIES))}", param="policies.prefill"
        )
    return POLICIES[name](**settings)
