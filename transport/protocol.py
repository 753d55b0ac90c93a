"""What the transport says to itself: the handshake, keep-alive, and the moves of KV migration. Engines never see these.

Each connection begins with the preamble, then Hello, Challenge, Answer, Welcome or Refusal (`handshake.py`). The order of a KV edge's
messages is drawn in `kv.py`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from polymux.transport.messages import ErrorReport, Peer, Prefilled, Shard
from polymux.transport.units import MIB, Epoch, PackedIds, SequenceId, TransferId, WorkerId

PROTOCOL_VERSION = 4
PREAMBLE = b"PLYMUX" + PROTOCOL_VERSION.to_bytes(2, "little")


MAX_MOVE_BYTES = 16 * MIB  # what a GPU's slab holds
MAX_MOVE_BLOCKS = 8192


class PeerKind(enum.StrEnum):
    CLIENT = "client"  # a front door: Generate and Cancel in, TokenFrames out
    DECODE = "decode"  # a decode worker's KV edge: control
    KV_DATA = "kv_data"  # the same edge's bytes, where they go by TCP
    KV_REGION = "kv_region"  # the same edge's memory, where it is shared: hands the descriptor over, then stays open as the fence
    KV_CUDA_IPC = "kv_cuda_ipc"  # the same for memory on a GPU: brings the handles, then stays open as the fence
    KV_NCCL = "kv_nccl"  # the same edge's communicator: where its two ranks meet, and whether the prefill worker got there
    IMAGE = "image"  # a worker that fetches weight images
    HOST_TIER = "host_tier"  # a worker that fetches the node's host memory for KV, from the same socket


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    kind: PeerKind
    peer_id: str
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The dialler knows the token, and says whom it expects to meet. `body` is an encoded message that the kind calls for."""

    proof: bytes
    target: str
    epoch: Epoch
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The acceptor knows the token too."""

    proof: bytes
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    error: ErrorReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTerms:
    """Where a worker's region is and what it has to reach others, for the capability exchange."""

    uuid: str = ""  # of its GPU; "" for host memory
    nccl_version: int = 0  # 0: it has none
    no_nccl: str = ""  # and why


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeOffer:
    """Decode worker's part of the capability exchange, in its Answer."""

    sink: Peer
    backends: tuple[str, ...]
    device: DeviceTerms = DeviceTerms()


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeTerms:
    """Prefill worker's part, its first frame. `unix_name` is the abstract socket that hands the region over; "" when there is none."""

    edge: int
    secret: bytes  # names this edge on its second connection
    source: Peer
    region_bytes: int  # of each rank
    backends: tuple[str, ...]
    unix_name: str
    num_ranks: int = 1  # of the source: how many regions are handed over
    device: DeviceTerms = DeviceTerms()


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinEdge:
    """The second connection of an edge, in its Answer."""

    edge: int
    secret: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcTerms:
    """Answer to a connection of kind KV_CUDA_IPC: the handles of each rank's region, and of the events that say when a move's blocks are
    final on all of them.

    Move number `seq` waits for event `seq` modulo their number; a handle has 64 bytes.
    """

    memory: bytes
    events: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinComm:
    """The connection of kind KV_NCCL, in its Answer: meet there, as rank 1."""

    edge: int
    secret: bytes
    unique_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CommJoined:
    """Answer to it, once the communicator can be used, or cannot."""

    error: ErrorReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeOpen:
    """Decode worker's choice among the common backends; the edge is open once this is sent."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Layers [layer_lo, layer_hi) of these source blocks are final, and go to the grant's blocks from number `first_block` on.

    `seq` counts the moves of the edge from 0 without a gap. `crc32` is over the first `num_checked_blocks` blocks' bytes in order; 0
    where this move is not sampled.
    """

    seq: int
    transfer_id: TransferId
    source_epoch: Epoch
    target_epoch: Epoch
    layer_lo: int
    layer_hi: int
    first_block: int
    src_block_ids: PackedIds
    num_bytes: int
    num_checked_blocks: int
    crc32: int

    @property
    def num_checked_bytes(self) -> int:
        return self.num_bytes // (len(self.src_block_ids) // 4) * self.num_checked_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Nothing more comes; travels behind the moves. Every field is compared with the sink's own books."""

    transfer_id: TransferId
    sequence_id: SequenceId
    source_id: WorkerId
    source_epoch: Epoch
    target_epoch: Epoch
    layout_hash: str
    num_layers: int
    num_blocks: int
    prefilled: Prefilled


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Prefill worker: this transfer will not be finished."""

    transfer_id: TransferId
    error: ErrorReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Decode worker: this transfer is over for me and I read nothing of it any more. `error` None: it was committed."""

    transfer_id: TransferId
    error: ErrorReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Prefill worker, after an Ended with an error: I write nothing of it any more."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    model: str
    shard: Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageReply:
    """The descriptor comes beside this message. The manifest's bytes follow it."""

    manifest_bytes: int
    image_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierTerms:
    """The store's answer to a worker of kind HOST_TIER, all zero where it has none. Otherwise the descriptor comes beside it."""

    tier_bytes: int
    slab_bytes: int
