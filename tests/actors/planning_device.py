"""A CPU whose steps are planned and whose decode steps go through graphs, as a GPU's do."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from late_device import LateDevice


class Replaying:
    """Runs the work that it was given second for all later calls with its key: the addresses of a captured graph, without a GPU.

    Not where it `captures` nothing: attention in plain torch reads its block tables from the host.
    """

    def __init__(self, *, captures: bool) -> None:
        self._captures = captures
        self.captured: dict[Hashable, Callable[[], None] | None] = {}
        self.num_replayed = 0

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self.captured:
            self.captured[key] = None
        elif self.captured[key] is None:
            self.captured[key] = work
        else:
            self.num_replayed += 1
        ((self.captured[key] if self._captures else None) or work)()

    def clear(self) -> None:
        self.captured.clear()


class PlanningDevice(LateDevice):
    def __init__(self, *, captures: bool = False) -> None:
        super().__init__()
        self.graphs = Replaying(captures=captures)
