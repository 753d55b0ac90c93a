"""Names for the ids and quantities that cross the project, and the packed form of a list of ids."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import NewType

RequestId = NewType("RequestId", str)  # one call of a user
SequenceId = NewType("SequenceId", str)  # one token stream made for it: "<request id>/<choice>"
WorkerId = NewType("WorkerId", str)
ClientId = NewType("ClientId", str)  # one front-door replica
ModelName = NewType("ModelName", str)
Epoch = NewType("Epoch", int)  # one incarnation of a worker, issued by the controller, never reused
TransferId = NewType("TransferId", int)  # unique within one edge
PackedIds = NewType("PackedIds", bytes)  # little-endian u32s, the wire form of token ids and block ids
NO_IDS = PackedIds(b"")

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
BLOCK_SIZE = 16  # token slots in a KV block


def pack_ids(ids: Iterable[int]) -> PackedIds:
    """Pack ids as little-endian u32s; a hundred times cheaper on the wire than a list of ints.

    Raises OverflowError for an id outside [0, 2**32).
    """
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return PackedIds(packed.tobytes())


def unpack_ids(packed: bytes) -> list[int]:
    """Undo `pack_ids`. Raises ValueError when the length is not a multiple of four."""
    ids = array("I")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
