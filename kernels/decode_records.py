"""What the compiled layer is told, as C structs: addresses in bytes, 0 for none, and sizes in elements."""

from __future__ import annotations

import numpy as np

GROUP_LINES = 8  # 16-row lines of weights in the sums of one group
SLOTS = 64  # of the cache that one pass of attention looks at

MATRIX = np.dtype([(name, "i8") for name in ("weight", "bias", "rows", "pairs", "lines")])
"""A packed weight: its real rows, the pairs of columns that are stored, the lines of a block."""

LAYER = np.dtype(
    [(name, "i8") for name in ("input_norm", "head_norms", "post_norm", "k", "v", "window")]
    + [(name, MATRIX) for name in ("qkv", "output", "gate", "up", "down")]
)
"""`k` and `v` are where this layer's head 0 lies in the cache's first block; `window` is 0 for none."""

STEP = np.dtype(
    [(name, "i8") for name in ("rows", "size", "num_heads", "num_kv_heads", "head_dim", "slots", "block_bytes", "tiles", "wide_tiles")]
    + [(name, "i8") for name in ("x", "heads", "attended", "hidden", "logits", "normed", "scratch", "scratch_bytes")]
    + [(name, "i8") for name in ("tables", "table_size", "lengths", "cos", "sin")]
    + [(name, "f4") for name in ("eps", "scale")]
)
"""`size` is the model's width. `tiles` is the address of their configuration for the rows, `wide_tiles` of attention's; 0 where a CPU has
none. `normed` and `scratch` have a part for each thread."""

RUN = np.dtype([(name, "i8") for name in ("layers", "first", "end", "last")] + [("step", STEP)])
"""Layers `first` to `end` of the records at `layers`. The one numbered `last` is the head: its `qkv`, after its `input_norm`."""
