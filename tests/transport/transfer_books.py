"""Books of a small region, and the messages that fill them, with whatever of them a test would have otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

from polymux.transport.messages import Grant, KVLayout, Prefill, Prefilled, SamplingParams
from polymux.transport.protocol import Commit, Move
from polymux.transport.transfer import SinkLedger, SinkTransfer
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, TransferId, WorkerId, pack_ids

SMALL = KVLayout(num_layers=2, num_kv_heads=1, head_dim=1, dtype="bfloat16", block_size=4)  # 32 bytes a block
LARGE = KVLayout(num_layers=3, num_kv_heads=1, head_dim=1, dtype="float32", block_size=4)  # 96 bytes a block
SOURCE, SINK_EPOCH, SOURCE_EPOCH = WorkerId("p"), Epoch(5), Epoch(3)
REGION_BYTES = 960
EDGE = 1


def prefill(transfer_id: int, block_ids: list[int], layout: KVLayout = SMALL, **grant: Any) -> Prefill:
    granted = Grant(
        transfer_id=TransferId(transfer_id),
        layout_hash=layout.layout_hash,
        block_ids=pack_ids(block_ids),
        target_epoch=SINK_EPOCH,
        source_epoch=SOURCE_EPOCH,
    )
    return Prefill(
        sequence_id=SequenceId(f"s{transfer_id}"),
        client_id=ClientId("c"),
        model=ModelName("m"),
        prompt_ids=pack_ids([1]),
        output_ids=pack_ids([]),
        sampling=SamplingParams(max_tokens=1),
        grant=dataclasses.replace(granted, **grant),
        deadline_s=1.0,
        tpot_slo_s=0.1,
        due_in_s=1.0,
    )


def move(
    seq: int, transfer_id: int, layers: tuple[int, int], first_block: int, count: int, layout: KVLayout = SMALL, **change: Any
) -> Move:
    one = Move(
        seq=seq,
        transfer_id=TransferId(transfer_id),
        source_epoch=SOURCE_EPOCH,
        target_epoch=SINK_EPOCH,
        layer_lo=layers[0],
        layer_hi=layers[1],
        first_block=first_block,
        src_block_ids=pack_ids(range(count)),
        num_bytes=count * (layers[1] - layers[0]) * layout.layer_bytes,
        num_checked_blocks=0,
        crc32=0,
    )
    return dataclasses.replace(one, **change)


def commit(transfer_id: int, blocks: int, layout: KVLayout = SMALL, **change: Any) -> Commit:
    sequence_id = SequenceId(f"s{transfer_id}")
    one = Commit(
        transfer_id=TransferId(transfer_id),
        sequence_id=sequence_id,
        source_id=SOURCE,
        source_epoch=SOURCE_EPOCH,
        target_epoch=SINK_EPOCH,
        layout_hash=layout.layout_hash,
        num_layers=layout.num_layers,
        num_blocks=blocks,
        prefilled=Prefilled(sequence_id=sequence_id, token_id=1, finish_reason=None),
    )
    return dataclasses.replace(one, **change)


def ledger(**limits: int) -> SinkLedger:
    books = SinkLedger(REGION_BYTES, SINK_EPOCH, **{"max_transfers": 4, "max_bytes": REGION_BYTES} | limits)
    books.open_edge(EDGE, SOURCE, SOURCE_EPOCH)
    return books


def filled(books: SinkLedger, num_blocks: int = 2) -> SinkTransfer:
    transfer = books.grant(EDGE, prefill(1, list(range(num_blocks))), SMALL)
    one = move(0, 1, (0, 2), 0, num_blocks)
    assert books.admit(EDGE, one) is transfer
    books.land(transfer, one)
    return transfer
