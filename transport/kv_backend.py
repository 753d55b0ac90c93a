"""What a KV backend is: how the bytes of a move get from source blocks to granted ones. The rest of the protocol is common to all.

The prefill side has a `Sender` for each edge, the decode side a `Receiver`. Both live in their reactor's thread. The backends here
write to the granted blocks from the decode side's own thread; one whose peer writes them (over NCCL, or into mapped device memory)
says so by answering False to `abandon`, and the blocks stay in quarantine until that peer confirms or the edge is down.
"""

from __future__ import annotations

from typing import Protocol

from polymux.transport.protocol import Commit, Move
from polymux.transport.region import BlockGrid
from polymux.transport.transfer import SinkTransfer
from polymux.transport.units import TransferId


class Sender(Protocol):
    """Prefill side. What is sent first arrives first, moves and commits alike. The sender numbers the moves (`Move.seq`)."""

    def send_move(self, move: Move, source: BlockGrid) -> None:
        """The source blocks stay as they are until `forget`."""

    def send_commit(self, commit: Commit) -> None: ...

    def forget(self, transfer_id: TransferId) -> None:
        """The sink has ended this transfer: on return its source blocks are read no more."""

    def close(self) -> None:
        """Fence: on return the sink can no longer find this edge open, whatever it has still to read."""


class Receiver(Protocol):
    """Decode side."""

    name: str

    def take(self, item: Move | Commit) -> None:
        """One that came over the control connection, in order."""

    def abandon(self, transfer_id: TransferId) -> bool:
        """Write nothing of this transfer any more. False: the peer writes, and only it can say when it has stopped."""

    def is_fenced(self) -> bool:
        """Whether the source has closed this edge: then what was copied may be anything."""

    def close(self) -> None: ...


class Landing(Protocol):
    """The decode side of an edge, as its receiver sees it."""

    def admit(self, move: Move) -> SinkTransfer | None:
        """Where this move goes; None: drop its bytes. Raises PolymuxError when the edge cannot be trusted any more."""

    def target(self, transfer: SinkTransfer) -> BlockGrid: ...

    def landed(self, transfer: SinkTransfer, move: Move) -> None: ...

    def commit(self, commit: Commit) -> None: ...

    def broken(self, why: Exception) -> None:
        """Close the edge."""
