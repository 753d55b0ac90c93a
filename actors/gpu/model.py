"""A model on a GPU: its steps are planned, so that what depends on the sequences is in tensors, and decode steps are captured graphs.

Between the start of a step and its last launch nothing waits for the device. A step that decodes draws its tokens as part of its graph,
unless a row's logits are edited or reported: those are drawn right behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from polymux.actors.device import Device
from polymux.actors.drawn import Ask, Drawn, Later, draw_later
from polymux.actors.gpu.frames import Frame, FrameSettings, padded_rows
from polymux.actors.gpu.graphs import Graphs
from polymux.actors.model_runner import ForwardBatch, OnLaunch, SequenceSlice
from polymux.actors.models.decoder import Decoder, ModelWeights, OnLayer, PlannedStep
from polymux.kernels.choice import choices, implementation
from polymux.kernels.gpu.plan import StepPlan, Workspace
from polymux.kernels.ops import PagedCache
from polymux.kernels.row_sampling import Picks, RowPick, pack_picks
from polymux.transport.errors import ConfigError

NOBODY = RowPick()  # a padding row's


class PlannedModels:
    """Those of one worker: what they share."""

    def __init__(self, device: Device, graphs: Graphs, *, max_num_seqs: int, batch_invariant: bool) -> None:
        """Raises ConfigError where POLYMUX_KERNELS cannot be followed."""
        self._device, self._graphs = device, graphs
        try:
            choices(device.torch_device)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        workspace = Workspace(device.torch_device)
        self._settings = FrameSettings(workspace=workspace, max_num_seqs=max_num_seqs, batch_invariant=batch_invariant)
        self._frames: dict[Decoder, Frame] = {}

    def bind(self, skeleton: Decoder, weights: ModelWeights, cache: PagedCache, key: Hashable) -> PlannedModel:
        """`key` names the weights and where they and the cache are: equal keys, equal bytes at equal addresses."""
        frame = self._frames.get(skeleton)
        if frame is None:
            dtype, device = cache.kv.dtype, self._device.torch_device
            frame = Frame(skeleton.config, skeleton.vocab_size, cache.shape, dtype, self._settings, device)
            self._frames[skeleton] = frame
        return PlannedModel(skeleton, weights, cache, self._device, self._graphs, frame, key)


class PlannedModel:
    """One model's weights, in place on a device that plans its steps."""

    def __init__(
        self, skeleton: Decoder, weights: ModelWeights, cache: PagedCache, device: Device, graphs: Graphs, frame: Frame, key: Hashable
    ) -> None:
        self._skeleton, self._weights, self._cache = skeleton, weights, cache
        self._device, self._graphs, self._frame, self._key = device, graphs, frame, key
        skeleton.prepare()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, on_layer: OnLayer = None, before_layer: OnLayer = None) -> Tensor:
        """As the CPU's: fp32 logits [R, vocab], here of a step that may still be computing."""
        slices, num_tokens, frame = batch.slices, batch.token_ids.shape[0], self._frame
        assert batch.carried is None and sum(s.num_tokens for s in slices) == num_tokens, "the slices do not cover the batch"
        staging = frame.prefill(num_tokens, slices)
        staging.begin()
        words, token_ids = staging.take(num_tokens)
        words[:] = batch.token_ids.numpy()
        wanted = _wanted_rows(batch)
        rows = None
        if wanted is not None:
            words, rows = staging.take(len(wanted))
            words[:] = wanted
        plan = frame.planner.plan(slices, frame.windows, staging)
        step = PlannedStep(token_ids.long(), plan, None if rows is None else rows.long())
        return self._skeleton.forward(self._weights, self._cache, step, on_layer, before_layer)

    def decode(self, batch: ForwardBatch, asks: Sequence[Ask], before_layer: OnLayer = None, on_launch: OnLaunch | None = None) -> Drawn:
        """A step of one token of each sequence, and the next one drawn. While weights are on their way nothing is captured."""
        is_plain = not any(ask.edits_logits or ask.num_logprobs is not None for ask in asks)
        with torch.inference_mode():
            num_rows, work, graph = self._stage(batch, asks, before_layer, draws_inside=is_plain)
            self._launch(num_rows, work, graph if before_layer is None else None, on_launch)
            if is_plain:
                results = self._frame.results[: 2 * num_rows].view(2, num_rows)
                return Later(self._frame.feed[:num_rows], asks, self._device.download(results))
            return draw_later(self._frame.logits[: len(asks)], asks, self._device)

    def follow(self, slices: Sequence[SequenceSlice], graph: str | None, before_layer: OnLayer = None) -> None:
        """As `decode`, for a rank that draws nothing: the tokens come from rank 0 in the middle of the step, the logits go there."""
        frame, num_rows = self._frame, padded_rows(len(slices))
        with torch.inference_mode():
            frame.decode.begin()
            plan = frame.planner.plan(slices, frame.windows, frame.decode, num_rows)
            self._launch(num_rows, partial(self._compute_share, plan, before_layer), graph)

    def _launch(self, num_rows: int, work: Callable[[], None], graph: str | None, on_launch: OnLaunch | None = None) -> None:
        if on_launch is not None:
            on_launch(graph)
        if graph is not None:
            self._graphs.run((self._key, num_rows, graph), work)
        else:
            work()

    def _stage(
        self, batch: ForwardBatch, asks: Sequence[Ask], before_layer: OnLayer, *, draws_inside: bool
    ) -> tuple[int, Callable[[], None], str]:
        """Send a step's inputs to where its graph finds them. The padded rows, the work, and what else tells one graph from another."""
        frame, slices = self._frame, batch.slices
        num_rows = padded_rows(len(slices))
        assert num_rows <= frame.num_rows and all(s.num_tokens == 1 for s in slices), "a decode step has one token of each sequence"
        frame.decode.begin()
        token_words, token_ids = frame.decode.take(num_rows)
        token_words[:] = 0
        token_words[: len(slices)] = batch.token_ids.numpy()
        source_words, sources = frame.decode.take(num_rows)
        source_words[:] = np.arange(frame.num_rows, frame.num_rows + num_rows)
        if batch.carried is not None:
            self._carry(batch.carried.ids)
            for row, source in enumerate(batch.carried.rows):
                if source is not None:
                    source_words[row] = source
        pick_words, draws, filters = pack_picks([*(ask.pick for ask in asks), *[NOBODY] * (num_rows - len(asks))])
        staged_words, staged_picks = frame.decode.take(len(pick_words))
        staged_words[:] = pick_words
        plan = frame.planner.plan(slices, frame.windows, frame.decode, num_rows)
        picks = Picks.of(staged_picks, draws=draws, filters=filters) if draws_inside else None
        work = partial(self._compute, token_ids, sources, plan, picks, before_layer)
        kind = f"{'draw' if draws else 'greedy'}{' filtered' if filters else ''}"
        return num_rows, work, kind if draws_inside else "logits"

    def _carry(self, ids: Tensor) -> None:
        """Tokens that were drawn beside a graph go to where graphs look for them."""
        if ids.data_ptr() != self._frame.feed.data_ptr():
            self._frame.feed[: len(ids)].copy_(ids)

    def _compute(self, token_ids: Tensor, sources: Tensor, plan: StepPlan, picks: Picks | None, before_layer: OnLayer) -> None:
        frame, num_rows = self._frame, len(token_ids)
        frame.feed[frame.num_rows : frame.num_rows + num_rows].copy_(token_ids)
        fed = self._skeleton.agreed(frame.feed.index_select(0, sources))
        logits = self._skeleton.forward(self._weights, self._cache, PlannedStep(fed, plan, None), None, before_layer)
        if picks is None:
            frame.logits[:num_rows].copy_(logits)
            return
        ids, is_finite = implementation("pick", logits.device)(logits, picks)
        frame.feed[:num_rows].copy_(ids)
        frame.results[:num_rows].copy_(ids)
        frame.results[num_rows : 2 * num_rows].copy_(is_finite)

    def _compute_share(self, plan: StepPlan, before_layer: OnLayer) -> None:
        fed = self._skeleton.agreed(self._frame.feed[: plan.num_rows])
        self._skeleton.forward(self._weights, self._cache, PlannedStep(fed, plan, None), None, before_layer)


def _wanted_rows(batch: ForwardBatch) -> np.ndarray[tuple[int], np.dtype[np.int64]] | list[int] | None:
    """The rows whose logits are wanted; None: all, in order."""
    if batch.logits_rows is not None:
        rows: np.ndarray[tuple[int], np.dtype[np.int64]] = batch.logits_rows.numpy()
        return rows
    if all(s.num_tokens == 1 for s in batch.slices):
        return None
    return [s.start + s.num_tokens - 1 for s in batch.slices]
