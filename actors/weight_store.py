"""The weight store of a node: one weight image per model in shared host memory, whatever the number of workers; budgeted, evicted by value.

For instances of several ranks it holds an image for each rank, all of a degree built in one pass over the checkpoint, and evicted together.

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
from polymux.actors.weights.builder import build_images
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import ImageManifest
from polymux.transport.errors import ConfigError, ModelNotFound, OutOfMemory
from polymux.transport.image_maps import seal
from polymux.transport.messages import ITEM_BYTES, WHOLE, ModelSpec, RankShape, Shard
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
    degrees: tuple[int, ...] = (1,)  # of the instances that serve it: how many ranks share it


@dataclass(slots=True)
class _Images:
    """A model's images for one degree, one a rank."""

    model: ModelName
    manifests: tuple[ImageManifest, ...]
    fds: tuple[int, ...]  # none: evicted, to be built again
    build_s: float
    last_used_s: float

    @property
    def nbytes(self) -> int:
        """In host memory now."""
        return sum(manifest.nbytes for manifest in self.manifests) if self.fds else 0

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = ()


@dataclass(slots=True)
class _Stored:
    source: ModelSource
    spec: ModelSpec
    lock: threading.Lock = field(default_factory=threading.Lock)  # one build at a time
    images: dict[int, _Images] = field(default_factory=dict)  # by degree

    def close(self) -> None:
        for images in self.images.values():
            images.close()


class WeightStore:
    """Thread-safe. Descriptors handed out are duplicates: an image that is evicted lives on until its last reader closes it."""

    def __init__(self, *, budget_bytes: int, layout: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._budget_bytes = budget_bytes
        self._layout = "onednn" if layout == "auto" else layout  # plain by itself where the CPU cannot multiply packed weights
        self._clock = clock
        self._models: dict[ModelName, _Stored] = {}
        self._lock = threading.Lock()  # of the table and the budget

    def register(self, source: ModelSource) -> ModelSpec:
        """Check the checkpoint, build its images, and describe the model.

        Raises CheckpointError, ConfigError, or OutOfMemory when the images alone exceed the budget; then nothing is registered.
        """
        checkpoint = Checkpoint.open(source.path)
        Tokenizer.open(checkpoint.path, source.chat_template)  # what the front door will need; better refused here than there
        dtype = checkpoint.dtype if source.dtype == "auto" else source.dtype
        if dtype not in ITEM_BYTES:
            raise ConfigError(f"models.{source.model}.dtype={dtype!r} is not one of auto, {', '.join(ITEM_BYTES)}")
        stored = _Stored(source, _describe(source, checkpoint, dtype))
        try:
            for degree in source.degrees:
                self._build(stored, checkpoint, degree)
            self._make_room(sum(images.nbytes for images in stored.images.values()), source.model)
        except BaseException:
            stored.close()
            raise
        stored.spec = _described(stored)
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
            (known if is_same else new).close()
            if is_same:
                known.source, known.spec, known.images = new.source, new.spec, new.images
        if not is_same:
            raise ConfigError(f"models.{new.source.model} is registered with other weights or another dtype; choose another name")

    def forget(self, model: ModelName) -> None:
        """Undo `register`, for a model that the cluster refused. Unknown names are fine."""
        with self._lock:
            stored = self._models.pop(model, None)
            if stored is not None:
                stored.close()

    def open(self, model: ModelName, shard: Shard = WHOLE) -> tuple[bytes, int]:
        """The manifest and a descriptor of the image, which the caller closes; built again when it was evicted.

        Raises ModelNotFound, and ConfigError for a degree that the model was not registered for.
        """
        with self._lock:
            stored = self._models.get(model)
        if stored is None:
            raise ModelNotFound(f"model {model!r} is not registered with this node's weight store", param="model")
        with stored.lock:
            if shard.num_ranks not in stored.images or not 0 <= shard.rank < shard.num_ranks:
                raise ConfigError(f"models.{model} has no image for rank {shard.rank} of {shard.num_ranks}; register it again")
            for _ in range(_MAX_REBUILDS):
                if not stored.images[shard.num_ranks].fds:
                    self._build(stored, Checkpoint.open(stored.source.path), shard.num_ranks)
                with self._lock:
                    images = stored.images[shard.num_ranks]
                    if images.fds:
                        images.last_used_s = self._clock()
                        return images.manifests[shard.rank].to_bytes(), os.dup(images.fds[shard.rank])
        raise OutOfMemory(f"models.{model}: its image was evicted {_MAX_REBUILDS} times before it could be read; raise store.budget_bytes")

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._used()

    def images(self) -> dict[ModelName, int]:
        """Bytes in host memory by model; 0 for a parked one whose image was evicted."""
        with self._lock:
            return {model: sum(images.nbytes for images in stored.images.values()) for model, stored in self._models.items()}

    def close(self) -> None:
        with self._lock:
            for stored in self._models.values():
                stored.close()
            self._models.clear()

    def _used(self) -> int:
        return sum(images.nbytes for stored in self._models.values() for images in stored.images.values())

    def _build(self, stored: _Stored, checkpoint: Checkpoint, degree: int) -> None:
        """Room is made for the checkpoint's size first, since packed images are never much larger; the budget holds exactly afterwards."""
        model = stored.source.model
        self._make_room(checkpoint.nbytes, model)
        started_s = self._clock()
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        fds = [os.memfd_create(f"polymux-{model}-{rank}"[:200], flags) for rank in range(degree)]
        try:
            manifests = build_images(checkpoint, fds, dtype=stored.spec.dtype, layout=self._layout)
            for fd in fds:
                seal(fd)  # workers map it, and check its bytes once
            self._make_room(sum(manifest.nbytes for manifest in manifests), model)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        now_s = self._clock()
        stored.images[degree] = _Images(model, manifests, tuple(fds), now_s - started_s, now_s)

    def _make_room(self, nbytes: int, model: ModelName) -> None:
        """Evict what costs least to bring back for its bytes, the longest unused first among equals."""
        if nbytes > self._budget_bytes:
            raise OutOfMemory(
                f"models.{model}: its weights take {nbytes} bytes, the store has {self._budget_bytes}; raise store.budget_bytes"
            )
        with self._lock:
            while self._used() + nbytes > self._budget_bytes:
                kept = (images for stored in self._models.values() for images in stored.images.values())
                min((images for images in kept if images.fds), key=self._value).close()

    def _value(self, images: _Images) -> float:
        idle_s = max(self._clock() - images.last_used_s, 1e-3)
        return images.build_s / idle_s / images.nbytes


def _described(stored: _Stored) -> ModelSpec:
    """With what its images tell. Where no instance holds all of the model, its weights are those of the smallest degree together."""
    by_degree = {degree: images.manifests for degree, images in sorted(stored.images.items())}
    smallest = next(iter(by_degree.values()))
    return replace(
        stored.spec,
        weight_bytes=sum(manifest.nbytes for manifest in smallest),
        digest=smallest[0].digest,
        shapes=tuple(RankShape(num_ranks=n, weight_bytes=manifests[0].nbytes) for n, manifests in by_degree.items() if n > 1),
    )


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
