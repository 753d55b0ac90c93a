"""A worker's line to its node's weight store."""

from __future__ import annotations

from polymux.transport.messages import WHOLE, Shard
from polymux.transport.units import ModelName
from polymux.transport.weights import OpenImage, fetch_image

FETCH_S = 120.0  # a parked model's image may have to be built from its checkpoint first


class StoreClient:
    """An `ImageSource` over the store's unix socket. `shard`: which rank this is."""

    def __init__(self, address: str, token: str, shard: Shard = WHOLE) -> None:
        self._address = address
        self._token = token
        self._shard = shard

    def fetch(self, model: ModelName) -> OpenImage:
        """Raises ModelNotFound, CheckpointError, OutOfMemory as the store did; PeerLost when the store is gone."""
        return fetch_image(self._address, self._token, model, FETCH_S, self._shard)
