"""Stop strings in a text that arrives in parts: no letter of one gets through, wherever the parts are cut."""

from __future__ import annotations

from collections.abc import Sequence

from polymux.transport.errors import InvalidRequest


class StopMatcher:
    """Ends a text at the first stop string that is complete; where two are complete at the same letter, at the longer one.

    That is where a model would have been stopped letter by letter, so the result does not depend on how the text was cut. Held back is the
    longest end of the text that could still become a stop string.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`include_stop` leaves the stop string in the text. Raises InvalidRequest for an empty one."""
        if not all(stops):
            raise InvalidRequest("stop: a stop string must not be empty", param="stop")
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text; what of it and of the text held back may be given out. Nothing once `matched` is set."""
        if self.matched is not None:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, start, self.matched = min(found)
            return text[: end if self._include_stop else start]
        cut = len(text) - self._num_to_hold(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
