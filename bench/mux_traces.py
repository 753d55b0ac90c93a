"""Traces: who asks which model for how much, and when. Seeded; the k-th request is the same at every rate, only sooner or later."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_PROMPT, MAX_OUTPUT = 384, 384  # tokens; longer draws are cut
SPREAD = 0.7  # sigma of the logarithm of a length, about that of ShareGPT's answers


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a trace is like. Arrivals are Poisson at `burstiness` 1, Gamma with that coefficient of variation above."""

    name: str
    zipf: float  # popularity of the k-th model is k ** -zipf; 0: all alike
    burstiness: float = 1.0
    prompt_tokens: tuple[int, ...] = (48,)  # means of the kinds of request, equally likely
    output_tokens: tuple[int, ...] = (64,)
    text: str = ""


KINDS = (
    Kind(name="even", zipf=0.0, text="every model alike, Poisson arrivals: the published workload"),
    Kind(name="zipf", zipf=1.0, text="popularity 1/rank, Poisson arrivals"),
    Kind(name="bursty", zipf=1.0, burstiness=2.5, text="popularity 1/rank, gaps with a coefficient of variation of 2.5"),
    Kind(name="long", zipf=0.5, prompt_tokens=(16,), output_tokens=(128,), text="short prompts and long answers, popularity 1/sqrt(rank)"),
    Kind(name="mixed", zipf=1.0, prompt_tokens=(24, 192), output_tokens=(24, 128), text="four kinds of request, popularity 1/rank"),
)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a trace."""

    at_s: float
    model: str
    prompt_ids: tuple[int, ...]
    num_output_tokens: int


class Trace:
    """One kind with one seed over a catalogue. `lengths` are (prompt, output) pairs to draw from in the place of the kind's own."""

    def __init__(self, kind: Kind, models: Sequence[str], *, seed: int, vocab_size: int, lengths: Sequence[tuple[int, int]] = ()) -> None:
        self.kind = kind
        self._models = list(models)
        random.Random(f"ranks {seed}").shuffle(self._models)
        self._seed = seed
        self._vocab_size = vocab_size
        self._lengths = lengths

    @property
    def popularity(self) -> list[tuple[str, float]]:
        """Models with their share of the requests, most popular first."""
        weights = [(rank + 1) ** -self.kind.zipf for rank in range(len(self._models))]
        return [(model, weight / sum(weights)) for model, weight in zip(self._models, weights, strict=True)]

    def asks(self, rate_per_s: float, duration_s: float) -> list[Ask]:
        """All that arrive within the duration."""
        gaps, picks, lengths, tokens = (
            random.Random(f"{part} {self.kind.name} {self._seed}") for part in ("gaps", "picks", "len", "tokens")
        )
        shape = self.kind.burstiness**-2
        models, weights = zip(*self.popularity, strict=True)
        asks, at_s = [], 0.0
        while (at_s := at_s + gaps.gammavariate(shape, 1 / shape) / rate_per_s) < duration_s:
            num_prompt, num_output = self._draw(lengths)
            prompt = tuple(tokens.randrange(8, self._vocab_size) for _ in range(num_prompt))
            asks.append(Ask(at_s, picks.choices(models, weights)[0], prompt, num_output))
        return asks

    def _draw(self, rng: random.Random) -> tuple[int, int]:
        if self._lengths:
            return rng.choice(self._lengths)
        prompt, output = rng.choice(self.kind.prompt_tokens), rng.choice(self.kind.output_tokens)
        return _lognormal(rng, prompt, MAX_PROMPT), _lognormal(rng, output, MAX_OUTPUT)


def _lognormal(rng: random.Random, mean: float, most: int) -> int:
    return max(4, min(most, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD))))


PROMPT_COLUMNS, OUTPUT_COLUMNS = ("input_len", "ContextTokens", "input_length"), ("output_len", "GeneratedTokens", "output_length")


def read_lengths(path: Path, *, mean_prompt: int = 48, mean_output: int = 64) -> list[tuple[int, int]]:
    """Lengths of a CSV trace, scaled to these means, since models here are as much smaller. Raises ValueError for unknown columns."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    prompt_column = next((name for name in PROMPT_COLUMNS if rows and name in rows[0]), None)
    output_column = next((name for name in OUTPUT_COLUMNS if rows and name in rows[0]), None)
    if prompt_column is None or output_column is None:
        raise ValueError(f"{path} has no columns of lengths; it takes one of {PROMPT_COLUMNS} and one of {OUTPUT_COLUMNS}")
    pairs = [(int(row[prompt_column]), int(row[output_column])) for row in rows]
    prompt_scale = mean_prompt * len(pairs) / sum(prompt for prompt, _ in pairs)
    output_scale = mean_output * len(pairs) / sum(output for _, output in pairs)
    return [(_scaled(prompt, prompt_scale, MAX_PROMPT), _scaled(output, output_scale, MAX_OUTPUT)) for prompt, output in pairs]


def _scaled(length: int, scale: float, most: int) -> int:
    return max(4, min(most, round(length * scale)))
