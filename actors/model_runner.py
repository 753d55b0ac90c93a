"""The model runner: binds weight images in the arena to decoder skeletons, and turns batches of sequences into tensors and logits.

A skeleton is built once for each architecture shape; a model of that shape costs a bind, which makes views and copies nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.models.decoder import INVARIANT_ROWS, Decoder, ModelWeights, OnLayer, Step
from polymux.actors.parallel.collectives import Collectives
from polymux.actors.parallel.rank_decoder import RankDecoder
from polymux.actors.parallel.shards import rank_config
from polymux.actors.weights.bind import bind_weights
from polymux.actors.weights.image import DTYPES, ImageManifest
from polymux.kernels import ops
from polymux.kernels.attend_plan import Planner
from polymux.kernels.ops import PagedCache
from polymux.kernels.paged import plan_writes
from polymux.transport.errors import ConfigError
from polymux.transport.messages import WHOLE, Shard

if TYPE_CHECKING:
    from polymux.actors.device import Device
    from polymux.actors.drawn import Ask, Drawn
    from polymux.actors.gpu.model import PlannedModels

# Rows are padded to one of these: each count of rows costs oneDNN a set of kernels of its own, half a megabyte for each shape of weight.
ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
ROW_STEP = 64  # beyond the last of them
MAX_BOUND = 32  # models and places that are kept bound


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSlice:
    """One sequence's part of a step."""

    start: int  # first row in the flat token batch
    num_tokens: int  # rows: 1 in decode, a chunk in prefill
    context_len: int  # tokens already in the cache before these
    block_ids: Sequence[int]  # covers context_len + num_tokens slots, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """Tokens that the step before is still choosing."""

    ids: Tensor  # [R] int64 of its rows, on the device
    rows: tuple[int | None, ...]  # [T]: whose token each row of this step takes; None: the host knows it

    def into(self, token_ids: Tensor) -> Tensor:
        """The step's tokens: [T] int64 on the CPU, with these in their places."""
        known = self.ids.tolist()
        return torch.tensor([token if row is None else known[row] for token, row in zip(token_ids.tolist(), self.rows, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    token_ids: Tensor  # [T] int64, on the CPU; any value where `carried` has a row
    slices: tuple[SequenceSlice, ...]  # in row order, disjoint, covering T
    logits_rows: Tensor | None  # [R] int64 rows whose logits are wanted; None: the last row of every slice
    carried: Carried | None = None


OnLaunch = Callable[[str | None], None]  # told which of the graphs of so many rows a step runs by, or that it runs by none


class Model(Protocol):
    """Weights, in place, that steps can be run by."""

    def forward(self, batch: ForwardBatch, on_layer: OnLayer = None, before_layer: OnLayer = None) -> Tensor:
        """fp32 logits [R, vocab]; `on_layer(i)` is called once layer i's K and V of this batch are in the cache.

        `before_layer(i)` is called before layer i's weights are read; with num_layers before the last norm's and the head's.
        """

    def decode(
        self, batch: ForwardBatch, asks: Sequence[Ask], before_layer: OnLayer = None, on_launch: OnLaunch | None = None
    ) -> Drawn | None:
        """A step of one token of each sequence that draws the next ones itself; None where it does not: draw from `forward`'s logits.

        `on_launch` is called before anything of the step is handed over.
        """


@runtime_checkable
class Following(Protocol):
    """A model whose decode steps another rank draws."""

    def follow(self, slices: Sequence[SequenceSlice], graph: str | None, before_layer: OnLayer = None) -> None:
        """This rank's part of `decode`; `graph` is what `on_launch` was told."""


class ModelRunner:
    """One per worker. Not thread-safe: the engine thread owns it."""

    def __init__(
        self,
        *,
        batch_invariant: bool = False,
        device: torch.device | str = "cpu",
        collectives: Collectives | None = None,
        planned: PlannedModels | None = None,
    ) -> None:
        """`collectives`: with the other ranks, of which this is one. `planned`: where steps are planned for a GPU."""
        self._planned = planned
        self.batch_invariant = batch_invariant
        self.device = torch.device(device)
        self._collectives = collectives
        self._skeletons: dict[tuple[ArchConfig, torch.dtype], Decoder] = {}
        self._bound: OrderedDict[Hashable, Model] = OrderedDict()  # by model and place, the latest last

    def prepare(self, dtype: str) -> None:
        """Compile what steps in `dtype` run by, so that no request waits for it: seconds for the first process of a machine."""
        if not self.batch_invariant and self.device.type == "cpu" and self._collectives is None:
            ops.prepare_few_rows(DTYPES[dtype])

    def bind(self, manifest: ImageManifest, weights: Tensor, kv: Tensor) -> Model:
        """A model ready to run, over the uint8 image `weights` and the cache `kv` [N, L, 2, Hkv, S, D]; both must outlive this runner, or
        the next `forget`: a model that returns to a place where it was before is not bound again.

        Raises CheckpointError or WireError for an image that cannot be run, ConfigError for a cache of another shape.
        """
        key = (manifest.digest, manifest.shard, manifest.dtype, manifest.layout, weights.data_ptr(), kv.data_ptr(), kv.shape)
        if self._planned is not None:
            return self._bind(manifest, weights, kv, key)
        model = self._bound.get(key)
        if model is None:
            if len(self._bound) == MAX_BOUND:
                self._bound.popitem(last=False)
            model = self._bound[key] = self._bind(manifest, weights, kv, key)
        self._bound.move_to_end(key)
        return model

    def forget(self) -> None:
        """Let go of all weights and caches."""
        self._bound.clear()

    def _bind(self, manifest: ImageManifest, weights: Tensor, kv: Tensor, key: Hashable) -> Model:
        dtype = DTYPES[manifest.dtype]
        whole = ArchConfig.from_json(manifest.config_json, "the weight image's config.json")
        config = rank_config(whole, manifest.shard.num_ranks)
        layout = config.kv_layout(manifest.dtype)
        wanted = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        if tuple(kv.shape[1:]) != wanted or kv.dtype != dtype or not kv.is_contiguous():
            raise ConfigError(f"kv of shape {tuple(kv.shape)} and {kv.dtype} is not contiguous blocks of {wanted} and {dtype}")
        self._check(manifest.shard)
        skeleton = self._skeletons.get((whole, dtype))
        if skeleton is None:
            skeleton = self._skeletons[whole, dtype] = self._make(whole, dtype)
        bound = bind_weights(config, manifest, weights)
        if self._planned is not None:
            return self._planned.bind(skeleton, bound, PagedCache(kv), key)
        return BoundModel(skeleton, bound, PagedCache(kv), self.device)

    def _check(self, shard: Shard) -> None:
        ranks = self._collectives
        here = Shard(rank=ranks.rank, num_ranks=ranks.num_ranks) if ranks is not None else WHOLE
        if shard != here:
            raise ConfigError(f"an image for rank {shard.rank} of {shard.num_ranks} cannot run on rank {here.rank} of {here.num_ranks}")

    def _make(self, config: ArchConfig, dtype: torch.dtype) -> Decoder:
        if self._collectives is None:
            return Decoder(config, dtype, self.device, batch_invariant=self.batch_invariant)
        return RankDecoder(config, dtype, self.device, self._collectives, batch_invariant=self.batch_invariant)


def plan_on(device: Device, *, max_num_seqs: int, batch_invariant: bool) -> PlannedModels | None:
    """What a runner plans its steps by on a device; None where that takes them as they come."""
    if device.graphs is None:
        return None
    from polymux.actors.gpu.model import PlannedModels

    return PlannedModels(device, device.graphs, max_num_seqs=max_num_seqs, batch_invariant=batch_invariant)


class BoundModel:
    """One model's weights, in place, with the skeleton that computes them."""

    def __init__(self, skeleton: Decoder, weights: ModelWeights, cache: PagedCache, device: torch.device) -> None:
        self.config = skeleton.config
        self._skeleton = skeleton
        self._weights = weights
        self._cache = cache
        self._device = device
        self._few_rows = skeleton.few_rows(weights, cache)
        self._planner = Planner(cache.shape, cache.kv.element_size(), device, skeleton.batch_invariant)

    def forward(self, batch: ForwardBatch, on_layer: OnLayer = None, before_layer: OnLayer = None) -> Tensor:
        few_rows, slices = self._few_rows, batch.slices
        if batch.carried is not None:
            batch = replace(batch, token_ids=batch.carried.into(batch.token_ids), carried=None)
        with torch.inference_mode():
            if few_rows is not None and 0 < len(slices) <= few_rows.max_rows and all(s.num_tokens == 1 for s in slices):
                logits = self._skeleton.decode(self._weights, few_rows, batch.token_ids, slices, on_layer, before_layer)
                return logits if batch.logits_rows is None else logits[batch.logits_rows]
            return self._skeleton.forward(self._weights, self._cache, self._step(batch), on_layer, before_layer)

    def decode(
        self, batch: ForwardBatch, asks: Sequence[Ask], before_layer: OnLayer = None, on_launch: OnLaunch | None = None
    ) -> Drawn | None:
        return None

    def _step(self, batch: ForwardBatch) -> Step:
        slices, num_tokens = batch.slices, batch.token_ids.shape[0]
        assert sum(s.num_tokens for s in slices) == num_tokens, "the slices do not cover the batch"
        wanted = batch.logits_rows
        if wanted is None and any(s.num_tokens > 1 for s in slices):
            wanted = torch.tensor([s.start + s.num_tokens - 1 for s in slices], device=self._device)
        token_ids = batch.token_ids.to(self._device)
        order = _by_length(slices)
        if order is not None:
            slices, token_ids, wanted = _reorder(slices, token_ids, wanted, order)
        positions = [p for s in slices for p in range(s.context_len, s.context_len + s.num_tokens)]
        padding = self._padded(num_tokens) - num_tokens
        if padding and wanted is None:
            wanted = torch.arange(num_tokens, device=self._device)
        windows = dict.fromkeys(self.config.windows)
        return Step(
            token_ids=torch.nn.functional.pad(token_ids, (0, padding)) if padding else token_ids,
            positions=torch.tensor(positions + [0] * padding, device=self._device),
            max_position=max(positions),
            writes=plan_writes(slices, self._cache.shape, self._device),
            attention={window: self._planner.plan(slices, window) for window in windows},
            logits_rows=wanted,
        )

    def _padded(self, num_tokens: int) -> int:
        if num_tokens <= ROW_COUNTS[-1] and not self._skeleton.batch_invariant:
            return next(count for count in ROW_COUNTS if count >= num_tokens)
        step = INVARIANT_ROWS if self._skeleton.batch_invariant else ROW_STEP
        return -(-num_tokens // step) * step


def _by_length(slices: Sequence[SequenceSlice]) -> list[int] | None:
    """The order in which single tokens come first, those of long contexts before those of short; None when it is that already."""
    keys = [(s.num_tokens > 1, -s.context_len) for s in slices]
    order = sorted(range(len(slices)), key=lambda i: keys[i][:1] if keys[i][0] else keys[i])
    return None if order == list(range(len(slices))) else order


def _reorder(
    slices: Sequence[SequenceSlice], token_ids: Tensor, wanted: Tensor | None, order: Sequence[int]
) -> tuple[tuple[SequenceSlice, ...], Tensor, Tensor]:
    """The slices in `order`, their tokens moved along, and where the wanted rows went; all rows in their old order when none were named."""
    moved: list[SequenceSlice] = []
    rows: list[int] = []
    start = 0
    for i in order:
        moved.append(replace(slices[i], start=start))
        rows += range(slices[i].start, slices[i].start + slices[i].num_tokens)
        start += slices[i].num_tokens
    source = torch.tensor(rows, device=token_ids.device)
    place = torch.empty_like(source)
    place[source] = torch.arange(len(rows), device=token_ids.device)
    return tuple(moved), token_ids[source], place if wanted is None else place[wanted]
