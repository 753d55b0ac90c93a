"""What a live system spends beside the costs that its workers learn; measured on one, and nothing where nobody says otherwise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Microseconds, unless a name says otherwise. Policies do not see them: they predict by the costs, as live ones do."""

    door_us: int = 0  # from a request's arrival to its prompt among a worker's: front door, controller, sockets
    step_us: int = 0  # of a worker around each step: taking in what came, deciding, sending
    seq_us: float = 0.0  # more of it for each sequence of the step
    switch_us: int = 0  # to weights that are there
    prefill_stretch: float = 1.0  # how much longer a step takes than was predicted, where others use the same cores and memory
    decode_stretch: float = 1.0
    load_drag: float = 0.0  # by how much more a step takes while weights are loaded beside it
    report_us: int = 0  # between two reports of a worker: how old what a placement knows of its weights may be
    pace: tuple[float, ...] = ()  # of the machine, window by window: by how much what it did then took longer than on average
    window_us: int = 1_000_000

    def around_us(self, num_seqs: int) -> int:
        return self.step_us + round(self.seq_us * num_seqs)

    def dragged_us(self, step_us: int, loading_us: int) -> int:
        """How long a step takes that loading goes on beside for so long."""
        alone_us = max(0.0, step_us - loading_us / (1.0 + self.load_drag))
        return step_us if not loading_us else round(min(step_us * (1.0 + self.load_drag), loading_us + alone_us))

    def pace_at(self, now_us: int) -> float:
        """The last window's goes on after it."""
        return self.pace[min(now_us // self.window_us, len(self.pace) - 1)] if self.pace else 1.0
