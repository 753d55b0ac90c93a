"""How often each token is in a sequence's output: two parallel arrays that grow with the number of distinct tokens, not with its length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


class TokenCounts:
    """Ids in the order in which they were first met. `seen` ids are in the arrays with a count of 0: in the prompt, not in the output."""

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self, seen: Iterable[int] = ()) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(seen))}
        self._ids = np.fromiter(self._places, np.int64, len(self._places))
        self._counts = np.zeros(len(self._places), np.float32)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(64, place), np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(max(64, place), np.float32)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def view(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids, each once, and their counts. Valid until the next `add`."""
        return self._ids[: len(self._places)], self._counts[: len(self._places)]
