"""An instance's KV blocks on the host: whole ones, every head once, the ranks' shares one behind the other.

A rank's share of a block is one range there, as it is in the rank's arena, so copying it takes one call for each block and share, on any
device, and no kernel. In the model's own order, in which heads travel between instances, it would be one for every layer, K or V and
share. Nobody else reads what an instance keeps there, so no other degree has to find its heads. Ranks that hold the same heads have one
share: the first of them gives it, and all get it back.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def shares(arenas: Sequence[Tensor], host: Tensor) -> list[tuple[list[Tensor], Tensor]]:
    """Whose arenas hold each share, and where it lies on the host: memories of equal blocks.

    `arenas`: each rank's blocks, `[N, layer, 2, kv_head, slot, head_dim]`; `host`: whole blocks, with all heads of the model.
    """
    _, num_layers, _, rank_heads, slots, head_dim = arenas[0].shape
    num_shares = host.shape[3] // rank_heads
    num_holders = len(arenas) // num_shares
    assert num_shares * rank_heads == host.shape[3] and num_shares * num_holders == len(arenas), "heads that do not lie evenly on the ranks"
    parts = host.view(host.shape[0], num_shares, num_layers, 2, rank_heads, slots, head_dim)
    return [(list(arenas[i * num_holders : (i + 1) * num_holders]), parts[:, i]) for i in range(num_shares)]
