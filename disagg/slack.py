"""Turns by slack: the model that saves the most tokens per second of the worker's time goes next, and loading hides behind stepping.

Token i of a request is due at its first deadline plus i TPOTs, so tokens that came early are credit, and a batch with credit can wait. Each
sequence loses a token every TPOT that it waits past its due time; that loss, faded by the time that is left until then, over the time
that a turn takes, is the batch's urgency (the apparent tardiness cost rule of Vepsalainen and Morton, 1987):

    urgency = sum over its sequences of  worth / TPOT * exp(-slack / horizon) / (turn_s + catch_up_s)

- `turn_s` is one step of a resident model, and at least its switch for one that is not: so the resident one is preferred by what a switch
  costs, a large batch costs what it is measured to cost, and with free switches the rule decides nearly step by step.
- A prompt's first token takes the prefill of all its batch's prompts besides, so its slack is less by that and its turn longer.
- `catch_up_s` is what a late sequence needs until its tokens are on time again. One that is hopelessly late does not drag the others down,
  one that needs a few steps is saved. A request that has been on time so far is worth more: its whole answer is at stake.
- Loading beside steps that it drags out is no gift: a turn of a model that is not there is charged `load_drag` times its switch for it.
  From `MAX_DRAG` on nobody is loaded on the chance that its turn comes, and a load that is over before the tightest TPOT is, is not
  hidden either: all at once it takes less of the worker's time.
- `horizon` is in proportion to a round of such turns: slack far beyond a round is worth little now.
- While a model with work is not resident, a turn lasts `STAY` TPOTs at least. Turns of a step or two would keep loads following each other
  where they take their time from the steps (a CPU), and batches small everywhere: measured by `bench/multiplex.py`.

Where weights can be loaded while another model computes, a model that is not resident is loaded first and the turn before lasts until it
is there. A decision depends on the view and on what is remembered here, never on the order of the view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import exp, fsum, isfinite

from polymux.disagg.multiplex import Turn
from polymux.disagg.views import BatchView, DecodeView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName

PATIENCE = 1.5  # a load may take so many times its prediction before its model is switched to all the same
STAY = 3.0  # shortest turn while a model with work is not resident, in the tightest TPOTs
MAX_DRAG = 0.5  # a load that takes more of the steps beside it is begun only for a model whose turn it is
LOOK = 0.125  # shortest turn, as a share of the tightest TPOT and of the cheapest switch: too short for another look to change anything


@dataclass(frozen=True, slots=True)
class Load:
    """Weights that were named for prefetch, and when they should be there."""

    model: ModelName
    began_at_s: float
    takes_s: float

    def left_s(self, now_s: float) -> float:
        return self.began_at_s + self.takes_s - now_s


@dataclass(frozen=True, slots=True)
class SlackMemory:
    last: ModelName | None = None
    since_s: float = 0.0  # its run of turns began
    passed_over: tuple[tuple[ModelName, int], ...] = ()  # runs of others that each model with work has seen since its last one, by name
    load: Load | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slack:
    """A model with work is passed over for at most `max_rounds_skipped + 2` rounds, a round being one run of turns for each model."""

    max_quota_s: float = 4.0  # of a run of turns of one model while others wait, loading not counted
    horizon_rounds: float = 0.5
    kept_worth: float = 3.0  # of a request that has been on time so far; of another, 1
    max_rounds_skipped: float = 2.0

    def __post_init__(self) -> None:
        for setting in fields(self):
            if not getattr(self, setting.name) > 0:
                raise ConfigError(
                    f"{setting.name}={getattr(self, setting.name)} must be above 0; {setting.default} suits most", param=setting.name
                )

    def start(self) -> SlackMemory:
        return SlackMemory()

    def next_turn(self, view: DecodeView, memory: SlackMemory) -> tuple[Turn | None, SlackMemory]:
        batches = {batch.model: batch for batch in view.batches}
        if len(batches) <= 1:
            if not batches:
                return None, memory
            return Turn(model=view.batches[0].model, quota_s=None), SlackMemory(view.batches[0].model, view.now_s)
        urgency = self._urgencies(view)
        passed_over = {model: count for model, count in memory.passed_over if model in batches}
        is_spent = memory.last in batches and view.now_s - memory.since_s >= self.max_quota_s
        target, is_overdue = self._target(batches, urgency, passed_over, memory.last if is_spent else None)
        cold = [model for model, batch in batches.items() if batch.switch_s > 0]
        warm = [model for model, batch in batches.items() if batch.switch_s <= 0]
        load = memory.load if memory.load is not None and memory.load.model in cold else None
        is_loading = load is not None and view.now_s < load.began_at_s + PATIENCE * load.takes_s
        is_cheap = view.load_drag <= MAX_DRAG
        hides = view.can_prefetch and (is_cheap or batches[target].switch_s > min(batch.tpot_slo_s for batch in view.batches))
        if hides and warm and target in cold and not is_overdue:
            if load is not None and is_loading:
                target = load.model  # sooner there than any other
            if is_loading or not (is_spent or (load is not None and load.model == target)):  # else it was waited for long enough
                return self._waiting(target, warm, batches, urgency, view, memory, load if is_loading else None)
        rest = [model for model in cold if model != target and is_cheap]
        prefetch = load.model if load is not None and is_loading and load.model in rest else _first(rest, urgency) if rest else None
        turn = Turn(model=target, quota_s=self._quota_s(target, batches), prefetch=prefetch, ends_on_news=True)
        return turn, _remembered(turn, view, batches, memory, load if is_loading else None)

    def _waiting(
        self,
        target: ModelName,
        warm: list[ModelName],
        batches: Mapping[ModelName, BatchView],
        urgency: Mapping[ModelName, float],
        view: DecodeView,
        memory: SlackMemory,
        load: Load | None,
    ) -> tuple[Turn, SlackMemory]:
        """A turn of a resident model, until the target's weights should be there."""
        model = memory.last if memory.last in warm else _first(warm, urgency)
        left_s = batches[target].switch_s if load is None else min(batches[target].switch_s, load.left_s(view.now_s))
        turn = Turn(model=model, quota_s=max(left_s, self._quota_s(model, batches)), prefetch=target, ends_on_news=True)
        return turn, _remembered(turn, view, batches, memory, load)

    def _urgencies(self, view: DecodeView) -> dict[ModelName, float]:
        """On-time tokens that each batch loses by waiting, per second of the worker's time."""
        exposed = view.load_drag if view.can_prefetch else 1.0
        look_s = LOOK * min((b.switch_s for b in view.batches if b.switch_s > 0), default=0.0)
        turns_s = {b.model: max(b.step_s, b.switch_s, look_s) + exposed * b.switch_s for b in view.batches}
        horizon_s = self.horizon_rounds * fsum(turns_s[b.model] + b.prefill_s for b in view.batches)
        slacks = {b.model: _slacks_s(b, view.now_s) for b in view.batches}
        least_s = min((slack_s for one in slacks.values() for slack_s in one), default=0.0)
        spare_s = max(least_s, 0.0) if isfinite(least_s) else 0.0
        return {b.model: self._urgency(b, slacks[b.model], turns_s[b.model], horizon_s, spare_s) for b in view.batches}

    def _urgency(self, batch: BatchView, slacks_s: Sequence[float], turn_s: float, horizon_s: float, spare_s: float) -> float:
        """Where everybody has slack, `spare_s` of it counts for nobody: all urgencies grow alike, and none fades to nothing."""
        losses = []
        for (_, every_s, is_kept, is_prompt), slack_s in zip(batch.dues, slacks_s, strict=True):
            prefill_s = batch.prefill_s if is_prompt else 0.0
            if slack_s >= 0:
                faded = exp((spare_s - slack_s) / horizon_s)
                losses.append((self.kept_worth if is_kept else 1.0) / every_s * faded / (turn_s + prefill_s))
            else:
                gain_s = max(every_s - batch.step_s, 0.1 * every_s)  # on its deadlines, with each step
                losses.append(1.0 / every_s / (turn_s + prefill_s - slack_s * batch.step_s / gain_s))
        return fsum(losses)

    def _target(
        self,
        batches: Mapping[ModelName, BatchView],
        urgency: Mapping[ModelName, float],
        passed_over: Mapping[ModelName, int],
        spent: ModelName | None,
    ) -> tuple[ModelName, bool]:
        """Which model should have the worker next, and whether it has waited too long to be loaded beside another's work."""
        bound = self.max_rounds_skipped * len(batches)
        waited = {model: count for model, count in passed_over.items() if count >= bound}
        if waited:
            target = _first(waited, waited)
            return target, waited[target] >= bound + len(batches)
        return _first((model for model in batches if model != spent), urgency), False

    def _quota_s(self, model: ModelName, batches: Mapping[ModelName, BatchView]) -> float:
        others = [batch for batch in batches.values() if batch.model != model]
        is_cold = any(batch.switch_s > 0 for batch in batches.values())
        look_s = (STAY if is_cold else LOOK) * min(batch.tpot_slo_s for batch in batches.values())
        if all(batch.switch_s > 0 for batch in others):
            look_s = max(look_s, LOOK * min(batch.switch_s for batch in others))
        batch = batches[model]
        return min(max(batch.step_s, batch.switch_s, look_s), self.max_quota_s)


def _slacks_s(batch: BatchView, now_s: float) -> list[float]:
    """The time left until each due, were the batch's turn to begin now."""
    ready_s = now_s + batch.switch_s + batch.step_s
    return [due.at_s - ready_s - (batch.prefill_s if due.is_prompt else 0.0) for due in batch.dues]


def _first(models: Iterable[ModelName], rank: Mapping[ModelName, float]) -> ModelName:
    return min(models, key=lambda model: (-rank[model], model))


def _remembered(
    turn: Turn, view: DecodeView, batches: Mapping[ModelName, BatchView], memory: SlackMemory, load: Load | None
) -> SlackMemory:
    goes_on = turn.model == memory.last
    counts = dict(memory.passed_over)
    passed_over = tuple(sorted((model, counts.get(model, 0) + (not goes_on)) for model in batches if model != turn.model))
    if turn.prefetch is None:
        load = None
    elif load is None or load.model != turn.prefetch:
        load = Load(turn.prefetch, view.now_s + batches[turn.model].switch_s, batches[turn.prefetch].switch_s)
    return SlackMemory(turn.model, memory.since_s if goes_on else view.now_s + batches[turn.model].switch_s, passed_over, load)
