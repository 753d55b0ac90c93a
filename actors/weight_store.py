"""The weight store of a node: one weight image per model in shared host memory, whatever the number of workers; budgeted, evicted by value.

Registered models are never forgotten, only parked: an image that was evicted is built again from its checkpoint when a worker asks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from polymux.actors.models.config import ArchConfig
from polymux.actors.tokenizer import Tokenizer
from polymux.actors.weights.builder import build_image
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import ImageManifest
from polymux.transport.errors import ConfigError, ModelNotFound, OutOfMemory
from polymux.transport.image_maps import seal
from polymux.transport.messages import ITEM_BYTES, ModelSpec
from polymux.transport.units import ModelName

_MAX_REBUILDS = 4  # a store so small that other models' wakes evict an image between build and read


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """What a user says of a model: where it lies, and how it is to be served."""

    model: ModelName
    path: str  # a Hugging Face directory or a hub id
    dtype: str = "auto"  # auto: the checkpoint's
    max_model_len: int | None = None  # None: the checkpoint's
    ttft_slo_s: float = 10.0
    tpot_slo_s: float = 0.1
    is_pinned: bool = False
    chat_template: str | None = None


@dataclass(slots=True)
class _Stored:
    source: ModelSource
    spec: ModelSpec
    lock: threading.Lock = field(default_factory=threading.Lock)  # one build at a time
    manifest: ImageManifest | None = None
    fd: int | None = None
    build_s: float = 0.0
    last_used_s: float = 0.0


class WeightStore:
    """Thread-safe. Descriptors handed out are duplicates: an image that is evicted lives on until its last reader closes it."""

    def __init__(self, *, budget_bytes: int, layout: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_bytes = budget_bytes
        self._layout = "onednn" if layout == "auto" else layout  # plain by itself where the CPU cannot multiply packed weights
        self._clock = clock
        self._models: dict[ModelName, _Stored] = {}
        self._lock = threading.Lock()  # of the table and the budget

    def register(self, source: ModelSource) -> ModelSpec:
        """Check the checkpoint, build its image, and describe the model.

        Raises CheckpointError, ConfigError, or OutOfMemory when the image alone exceeds the budget; then nothing is registered.
        """
        checkpoint = Checkpoint.open(source.path)
        Tokenizer.open(checkpoint.path, source.chat_template)  # what the front door will need; better refused here than there
        dtype = checkpoint.dtype if source.dtype == "auto" else source.dtype
        if dtype not in ITEM_BYTES:
            raise ConfigError(f"models.{source.model}.dtype={dtype!r} is not one of auto, {', '.join(ITEM_BYTES)}")
        stored = _Stored(source, _describe(source, checkpoint, dtype))
        self._build(stored, checkpoint)
        assert stored.manifest is not None
        stored.spec = replace(stored.spec, weight_bytes=stored.manifest.nbytes, digest=stored.manifest.digest)
        self._keep(stored)
        return stored.spec

    def _keep(self, new: _Stored) -> None:
        """Into the table. A name that is there already takes the new image, limits and SLOs; other weights are refused, and let go."""
        with self._lock:
            known = self._models.setdefault(new.source.model, new)
        if known is new:
            return
        with known.lock, self._lock:
            is_same = (known.spec.digest, known.spec.dtype) == (new.spec.digest, new.spec.dtype)
            surplus = known.fd if is_same else new.fd
            if surplus is not None:
                os.close(surplus)
            if is_same:
                known.source, known.spec, known.manifest, known.fd = new.source, new.spec, new.manifest, new.fd
        if not is_same:
            raise ConfigError(f"models.{new.source.model} is registered with other weights or another dtype; choose another name")

    def forget(self, model: ModelName) -> None:
        """Undo `register`, for a model that the cluster refused. Unknown names are fine."""
        with self._lock:
            stored = self._models.pop(model, None)
            if stored is not None and stored.fd is not None:
                os.close(stored.fd)

    def open(self, model: ModelName) -> tuple[bytes, int]:
        """The manifest and a descriptor of the image, which the caller closes; built again when it was evicted. Raises ModelNotFound."""
        with self._lock:
            stored = self._models.get(model)
        if stored is None:
            raise ModelNotFound(f"model {model!r} is not registered with this node's weight store", param="model")
        with stored.lock:
            for _ in range(_MAX_REBUILDS):
                if stored.fd is None:
                    self._build(stored, Checkpoint.open(stored.source.path))
                with self._lock:
                    if stored.fd is not None and stored.manifest is not None:
                        stored.last_used_s = self._clock()
                        return stored.manifest.to_bytes(), os.dup(stored.fd)
        raise OutOfMemory(f"models.{model}: its image was evicted {_MAX_REBUILDS} times before it could be read; raise store.budget_bytes")

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._used()

    def images(self) -> dict[ModelName, int]:
        """Bytes in host memory by model; 0 for a parked one whose image was evicted."""
        with self._lock:
            return {model: s.manifest.nbytes if s.manifest and s.fd is not None else 0 for model, s in self._models.items()}

    def close(self) -> None:
        with self._lock:
            for stored in self._models.values():
                if stored.fd is not None:
                    os.close(stored.fd)
            self._models.clear()

    def _used(self) -> int:
        return sum(s.manifest.nbytes for s in self._models.values() if s.fd is not None and s.manifest)

    def _build(self, stored: _Stored, checkpoint: Checkpoint) -> None:
        """Room is made for the checkpoint's size first, since a packed image is never much larger; the budget holds exactly afterwards."""
        self._make_room(checkpoint.nbytes, stored)
        started_s = self._clock()
        fd = os.memfd_create(f"polymux-{stored.source.model}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            stored.manifest = build_image(checkpoint, fd, dtype=stored.spec.dtype, layout=self._layout)
            seal(fd)  # workers map it, and check its bytes once
            self._make_room(stored.manifest.nbytes, stored)
        except BaseException:
            os.close(fd)
            raise
        stored.fd, stored.build_s, stored.last_used_s = fd, self._clock() - started_s, self._clock()

    def _make_room(self, nbytes: int, keep: _Stored) -> None:
        """Evict what costs least to bring back for its bytes, the longest unused first among equals."""
        if nbytes > self._budget_bytes:
            raise OutOfMemory(
                f"models.{keep.source.model}: its image takes {nbytes} bytes, the store has {self._budget_bytes}; raise store.budget_bytes"
            )
        with self._lock:
            while self._used() + nbytes > self._budget_bytes:
                victims = [s for s in self._models.values() if s.fd is not None and s is not keep]
                victim = min(victims, key=self._value)
                assert victim.fd is not None
                os.close(victim.fd)
                victim.fd = None

    def _value(self, stored: _Stored) -> float:
        assert stored.manifest is not None
        idle_s = max(self._clock() - stored.last_used_s, 1e-3)
        return float(stored.build_s / idle_s / stored.manifest.nbytes)


def _describe(source: ModelSource, checkpoint: Checkpoint, dtype: str) -> ModelSpec:
    """All but what only the image tells: its digest and size."""
    config: ArchConfig = checkpoint.config
    limit = config.max_position_embeddings
    max_model_len = source.max_model_len or limit
    if not 1 < max_model_len <= limit:
        raise ConfigError(f"models.{source.model}.max_model_len={max_model_len} is outside 2..{limit}, the checkpoint's limit; lower it")
    return ModelSpec(
        model=source.model,
        path=str(checkpoint.path),
        digest="",
        config_json=json.dumps(json.loads(checkpoint.config_json), sort_keys=True),
        dtype=dtype,
        kv=config.kv_layout(dtype),
        weight_bytes=0,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=tuple(checkpoint.eos_token_ids),
        ttft_slo_s=source.ttft_slo_s,
        tpot_slo_s=source.tpot_slo_s,
        created=int(time.time()),
        is_pinned=source.is_pinned,
        chat_template=source.chat_template,
    )
