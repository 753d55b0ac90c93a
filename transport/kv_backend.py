"""What a KV backend is: how the bytes of a move get from source blocks to granted ones. The rest of the protocol is common to all.

The prefill side has a `Sender` for each edge, the decode side a `Receiver`. Both are called in their reactor's thread. All backends here
write to the granted blocks from the decode side; a device does so later than it was told to, so "no more" may come with a delay, which
`is_writing` and `then` are for. One whose peer writes them says so by answering False to `abandon`, and the blocks stay in quarantine
until that peer confirms or the edge is down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from polymux.transport.protocol import Commit, Move
from polymux.transport.region import Grid
from polymux.transport.transfer import SinkTransfer
from polymux.transport.units import TransferId


class DeviceEvent(Protocol):
    """A recorded event of the CUDA runtime, such as a torch.cuda.Event: the work before it is what makes pushed blocks final."""

    @property
    def cuda_event(self) -> int: ...


class Sender(Protocol):
    """Prefill side. What is sent first arrives first, moves and commits alike. The sender numbers the moves (`Move.seq`)."""

    def send_move(self, move: Move, source: Grid, ready: DeviceEvent | None) -> None:
        """The source blocks are final once `ready` is, and stay as they are until `forget` has called back.

        `move.num_checked_blocks` says how many to compute a checksum over; where the bytes are not final yet that is the sender's to do.
        """

    def send_commit(self, commit: Commit) -> None: ...

    def forget(self, transfer_id: TransferId, then: Callable[[], None]) -> None:
        """The sink has ended this transfer. `then` is called, now or soon, once its source blocks are read no more."""

    def close(self, then: Callable[[], None]) -> None:
        """Fence: on return the sink can no longer find this edge open, whatever it has still to read. `then` as in `forget`, for all."""


class Receiver(Protocol):
    """Decode side."""

    name: str

    def take(self, item: Move | Commit) -> None:
        """One that came over the control connection, in order."""

    def abandon(self, transfer_id: TransferId) -> bool:
        """Begin no more writes for this transfer. False: some are still going on, so wait for `Landing.quiet`, or for the peer's word."""

    def is_writing(self, transfer_id: TransferId) -> bool:
        """Whether this process's own device still writes to its blocks, after `abandon` or `close`; `Landing.quiet` says when no more."""

    def is_fenced(self) -> bool:
        """Whether the source has closed this edge: then what was copied may be anything."""

    def close(self) -> None: ...


class Landing(Protocol):
    """The decode side of an edge, as its receiver sees it. All is called in the reactor's thread."""

    def admit(self, move: Move) -> SinkTransfer | None:
        """Where this move goes; None: drop its bytes. Raises PolymuxError when the edge cannot be trusted any more."""

    def target(self, transfer: SinkTransfer) -> Grid: ...

    def landed(self, transfer: SinkTransfer, move: Move, crc32: int | None = None) -> None:
        """All of it is in place. `crc32` is that of the checked blocks as they lie here now; None: they can be read from the grid."""

    def quiet(self, transfer_id: TransferId) -> None:
        """After an `abandon` that said False: nothing is being written any more."""

    def commit(self, commit: Commit) -> None: ...

    def broken(self, why: Exception) -> None:
        """Close the edge."""
