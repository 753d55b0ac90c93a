"""KV migration: the decode side grants blocks, the prefill side fills them layer by layer, a commit makes them readable.

Both ends import from here. `KVSink` is the decode worker's end, `KVSource` the prefill worker's; one `KVEdge` joins a pair.

Life of a transfer (sink -> source are Prefill and Ended, source -> sink the others):

    sink                                        source
    edge.order(prefill, layout)  -- Prefill -->  on_order(ref, prefill)
                                                 accept(ref, layout)
           land   <----------------- Move ----   push(ref, layers, blocks)      once per layer of each chunk
    verify, KVCommitted  <--------- Commit ----  commit(ref, prefilled)         travels behind the data
                                 -- Ended --->   on_released(ref)               source blocks may be freed

The other endings: `edge.cancel`, the deadline or a violation make the sink say Ended early (source: on_cancel, on_released); `source.fail`
says Failed (sink: KVFailed, KVQuiesced, and Ended back); a dead or silent peer closes the edge on either side.

What is promised:
 1. A transfer ends in exactly one of KVCommitted and KVFailed, before its deadline. After KVFailed comes exactly one KVQuiesced.
 2. KVCommitted means: every (layer, block) of the grant landed exactly once, under the right transfer, sequence, epochs and layout.
 3. Between KVFailed and KVQuiesced the blocks are in quarantine. Free them at KVQuiesced, never before.
 4. on_released fires exactly once for every on_order, whatever the ending. Until then the pushed source blocks must stay as they are.
 5. A source that stops hearing from a sink fences the edge *before* on_released; a sink commits only if the edge was still
    open after its last copy. So blocks that were re-used can be copied but never committed.
 6. Callbacks come from a transport thread, one at a time per end, in order; they must be quick and must not call `connect` or `close`.
"""

from __future__ import annotations

from polymux.transport.kv_choice import BACKENDS
from polymux.transport.kv_edge import KVEdge
from polymux.transport.kv_sink import KVSink
from polymux.transport.kv_source import KVSource
from polymux.transport.kv_types import EdgeStats, KVCommitted, KVEvent, KVFailed, KVQuiesced, KVSettings, OrderRef

__all__ = [
    "BACKENDS",
    "EdgeStats",
    "KVCommitted",
    "KVEdge",
    "KVEvent",
    "KVFailed",
    "KVQuiesced",
    "KVSettings",
    "KVSink",
    "KVSource",
    "OrderRef",
]
