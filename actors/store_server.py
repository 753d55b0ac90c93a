"""A node's weight store and its host tier, with the socket that both are handed out over: what the store's process runs."""

from __future__ import annotations

from polymux.actors.weight_store import ModelSource, WeightStore
from polymux.transport.host_tier import TierMemory
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName
from polymux.transport.weights import ImageServer


class StoreServer:
    """The store, and the unix socket over which this node's workers fetch from it. `kv_bytes` 0: this node has no host tier."""

    def __init__(self, *, budget_bytes: int, layout: str, token: str, kv_bytes: int = 0) -> None:
        self._tier = TierMemory(kv_bytes) if kv_bytes else None
        self._store = WeightStore(budget_bytes=budget_bytes, layout=layout)
        self._server = ImageServer(token=token, open_image=self._store.open, open_tier=self._tier.open if self._tier else None)

    @property
    def address(self) -> str:
        return self._server.address

    def register(self, source: ModelSource) -> ModelSpec:
        """Raises CheckpointError, ConfigError or OutOfMemory, and then nothing is registered."""
        return self._store.register(source)

    def forget(self, model: ModelName) -> None:
        self._store.forget(model)

    def images(self) -> dict[ModelName, int]:
        """Bytes in host memory by model."""
        return self._store.images()

    def close(self) -> None:
        self._server.close()
        self._store.close()
        if self._tier is not None:
            self._tier.close()
