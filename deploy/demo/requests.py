"""What the demo asks: a mixed stream of chats and completions, streamed and whole, to every model. The same each time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

QUESTIONS = (  # that even the small models know
    "Explain str.split",
    "What is the json module?",
    "How do I use itertools.chain?",
    "Explain sorted",
    "What does str.join do?",
    "Describe the while statement.",
    "What is collections.deque?",
    "Explain lambdas.",
    "Explain re.match",
    "Who are you?",
    "What does max do?",
    "Describe copy.deepcopy.",
)
BEGINNINGS = (
    "os.path.join(a, *p)\n\n",
    "The `with` statement is used to",
    "Return the number of",
    "class Counter(dict)\n\n",
    "def split(self, sep=None, maxsplit=-1):\n",
    "Return True if",
)
CHAT_TOKENS = 128  # room for most answers to end by themselves
CHAT_SHARE = 0.7
STREAM_SHARE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One greedy request. A chat sends `text` as the user's message, a completion as its prompt."""

    number: int
    at_s: float  # after the first
    model: str
    is_chat: bool
    is_streamed: bool
    text: str
    max_tokens: int

    @property
    def kind(self) -> str:
        return ("chat" if self.is_chat else "completion") + (", streamed" if self.is_streamed else "")


def plan(models: Sequence[str], *, num_requests: int, seconds: float, seed: int = 0) -> list[Ask]:
    """Random arrivals within `seconds`, the first at once. Each round of requests asks every model once, in another order."""
    rng = random.Random(seed)
    times = [0.0, *sorted(rng.uniform(0.0, seconds) for _ in range(num_requests - 1))]
    order: list[str] = []
    while len(order) < num_requests:
        order += rng.sample(models, len(models))
    return [_ask(rng, number, at_s, order[number]) for number, at_s in enumerate(times)]


def _ask(rng: random.Random, number: int, at_s: float, model: str) -> Ask:
    is_chat = rng.random() < CHAT_SHARE
    return Ask(
        number=number,
        at_s=at_s,
        model=model,
        is_chat=is_chat,
        is_streamed=rng.random() < STREAM_SHARE,
        text=rng.choice(QUESTIONS if is_chat else BEGINNINGS),
        max_tokens=CHAT_TOKENS if is_chat else rng.choice((24, 48, 64)),
    )
