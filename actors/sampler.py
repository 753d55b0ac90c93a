"""From a batch's logits to its sequences' next tokens: what each sequence's parameters mean, and when a sequence is over.

Logits are edited in this order before a token is chosen, as in vLLM: min_tokens (end tokens cannot be chosen before), logit_bias,
repetition penalty (over prompt and output), frequency and presence penalties (over the output). Then `kernels.sample` applies temperature,
min_p, top_k, top_p. Reported logprobs are of the model's own distribution: the log-softmax of the logits before any of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymux.actors.token_counts import TokenCounts
from polymux.kernels.philox import draw_words
from polymux.kernels.sample import MIN_TEMPERATURE, Draw, draw, greedy, log_normalizers, penalize_, top
from polymux.transport.errors import InvalidRequest, NonFiniteLogits
from polymux.transport.messages import FinishReason, SamplingParams

NOT_FINITE = "the model computed NaN or infinite logits; are its weights whole, and in range of its dtype?"
NONE_LEFT = "penalties, logit_bias and min_tokens left no token that can be chosen"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The chosen token. `logprob` and `top` (falling, at most `SamplingParams.logprobs` long) are set where these were asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What sampling remembers of one sequence, kept up token by token: nothing here costs time by the sequence's length."""

    __slots__ = ("_bias", "_counts", "_ends", "_last", "eos_token_ids", "num_output", "params", "vocab_size")

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], eos_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        """`output_ids` are those already made, on a replay. Raises InvalidRequest for an id outside the vocabulary."""
        self.params = params
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.num_output = len(output_ids)
        self._last = output_ids[-1] if output_ids else None
        self._bias = dict(params.logit_bias)
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
        self._check("prompt", prompt_ids)
        self._check("logit_bias", list(self._bias))
        self._counts: TokenCounts | None = None
        if self.is_penalized:
            self._counts = TokenCounts(prompt_ids if params.repetition_penalty != 1 else ())
            for token_id in output_ids:
                self._counts.add(token_id)

    def _check(self, name: str, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise InvalidRequest(f"{name}: token id {wrong} is outside the model's vocabulary, 0..{self.vocab_size - 1}", param=name)

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < MIN_TEMPERATURE

    @property
    def is_penalized(self) -> bool:
        return self.params.repetition_penalty != 1 or self.params.frequency_penalty != 0 or self.params.presence_penalty != 0

    def banned_ids(self, num_ahead: int = 0) -> list[int]:
        """What cannot be chosen yet: nothing may end it. `num_ahead` tokens of it, here and below, are made and not known here."""
        if self.num_output + num_ahead >= self.params.min_tokens:
            return []
        return [token_id for token_id in self._ends if token_id < self.vocab_size]

    @property
    def biases(self) -> Mapping[int, float]:
        return self._bias

    @property
    def counts(self) -> TokenCounts | None:
        """How often each token came, where it is penalized for it."""
        return self._counts

    def edits_logits_at(self, num_ahead: int) -> bool:
        """Whether that token is chosen from other logits than the model's."""
        return self._counts is not None or bool(self._bias) or bool(self.banned_ids(num_ahead))

    @property
    def edits_logits(self) -> bool:
        return self.edits_logits_at(0)

    def ends_within(self, num_ahead: int) -> bool:
        """Whether those tokens end it, whatever they are."""
        return self.num_output + num_ahead >= self.params.max_tokens

    def append(self, token_id: int) -> None:
        """The sequence's next token was chosen, here or on another worker."""
        self.num_output += 1
        self._last = token_id
        if self._counts is not None:
            self._counts.add(token_id)

    def finish_reason(self, max_model_len_reached: bool) -> FinishReason | None:
        """Why the sequence ends with its newest token; None while it goes on."""
        if self._last in self._ends:
            return FinishReason.STOP
        if self.num_output >= self.params.max_tokens or max_model_len_reached:
            return FinishReason.LENGTH
        return None

    def draw(self, word: int) -> Draw:
        params = self.params
        return Draw(word=word, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)

    def edit_(self, logits: Tensor) -> None:
        """Apply to this sequence's logits, [V], in place, whatever is neither temperature nor truncation."""
        if banned := self.banned_ids():
            logits[banned] = -torch.inf
        if self._bias:
            logits[list(self._bias)] += torch.tensor(list(self._bias.values()), dtype=logits.dtype, device=logits.device)
        if self._counts is not None:
            ids, counts = (torch.from_numpy(part).to(logits.device) for part in self._counts.view())
            params = self.params
            penalize_(logits, ids, counts, params.repetition_penalty, params.frequency_penalty, params.presence_penalty)


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken]:
    """The next token of each row: logits [R, V] fp32, one state a row, neither changed.

    A row's result is a function of its logits and its state alone, to the bit. Raises NonFiniteLogits, which names the rows.
    """
    best, maxima = _best(logits, range(len(states)), NOT_FINITE)
    if all(state.is_greedy and not state.edits_logits and state.params.logprobs is None for state in states):
        return [SampledToken(token_id=token_id) for token_id in best.tolist()]
    plain = {row: state for row, state in enumerate(states) if not state.edits_logits}
    token_ids = _choose(logits, best, maxima, plain)
    edited = [row for row, state in enumerate(states) if state.edits_logits]
    if edited:
        token_ids |= _choose_edited(logits, edited, [states[row] for row in edited])
    return _with_logprobs(logits, maxima, states, [token_ids[row] for row in range(len(states))])


def sample_each(logits: Tensor, states: Sequence[SamplerState]) -> list[SampledToken | NonFiniteLogits]:
    """As `sample`, but a row without finite logits gets its error in the place of a token, and costs the others nothing."""
    try:
        return list(sample(logits, states))
    except NonFiniteLogits as error:
        bad = frozenset(error.rows)
        good = [row for row in range(len(states)) if row not in bad]
        tokens = sample_each(logits[good], [states[row] for row in good]) if good else []
        results: list[SampledToken | NonFiniteLogits] = [error] * len(states)
        for row, token in zip(good, tokens, strict=True):
            results[row] = token
        return results


def _best(logits: Tensor, rows: Sequence[int], complaint: str) -> tuple[Tensor, Tensor]:
    """Greedy choices and their logits, which must be finite; `rows` are what to call the logits' rows in an error."""
    best = greedy(logits)
    maxima = logits.gather(1, best[:, None])[:, 0]
    finite = maxima.isfinite().tolist()
    if not all(finite):
        error = NonFiniteLogits(complaint)
        error.rows = tuple(row for row, is_finite in zip(rows, finite, strict=True) if not is_finite)
        raise error
    return best, maxima


def _choose_edited(logits: Tensor, rows: Sequence[int], states: Sequence[SamplerState]) -> dict[int, int]:
    edited = logits[torch.tensor(rows, device=logits.device)]  # a copy
    for row, state in zip(edited, states, strict=True):
        state.edit_(row)
    best, maxima = _best(edited, rows, NONE_LEFT)
    chosen = _choose(edited, best, maxima, dict(enumerate(states)))
    return {rows[place]: token_id for place, token_id in chosen.items()}


def _choose(logits: Tensor, best: Tensor, maxima: Tensor, states: Mapping[int, SamplerState]) -> dict[int, int]:
    """The token of each row in `states`: drawn, or the best one."""
    random = {row: state for row, state in states.items() if not state.is_greedy}
    firsts = best.tolist()
    token_ids = {row: firsts[row] for row in states}
    if random:
        words = draw_words([state.params.seed for state in random.values()], [state.num_output for state in random.values()])
        token_ids |= draw(logits, maxima, {row: state.draw(word) for (row, state), word in zip(random.items(), words, strict=True)})
    return token_ids


def _with_logprobs(logits: Tensor, maxima: Tensor, states: Sequence[SamplerState], token_ids: Sequence[int]) -> list[SampledToken]:
    wanted = {row: state.params.logprobs for row, state in enumerate(states) if state.params.logprobs is not None}
    tokens = [SampledToken(token_id=token_id) for token_id in token_ids]
    if not wanted:
        return tokens
    if len(wanted) < len(states):
        index = torch.tensor(list(wanted), device=logits.device)
        logits, maxima = logits[index], maxima[index]
    normalizers = log_normalizers(logits, maxima)
    values, ids = (part.tolist() for part in top(logits, max(1, *wanted.values())))
    for place, (row, k) in enumerate(wanted.items()):
        tops = tuple((i, value - normalizers[place]) for i, value in zip(ids[place][:k], values[place][:k], strict=True))
        logprob = float(logits[place, token_ids[row]]) - normalizers[place]
        tokens[row] = SampledToken(token_id=token_ids[row], logprob=logprob, top=tops)
    return tokens
