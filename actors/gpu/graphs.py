"""CUDA graphs of decode steps: captured lazily, kept for as long as what they read is where it was.

A graph holds addresses. Those of a step's inputs never move (`frames.py`); those of weights and cache are part of its key: a model that was
evicted and came back to the same place has its graphs still.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

log = logging.getLogger("polymux.gpu")

MAX_GRAPHS = 384  # about two megabytes each for a model of thirty layers

Work = Callable[[], None]


class Graphs(Protocol):
    def run(self, key: Hashable, work: Work) -> None:
        """Do `work`, which reads and writes only what has one address for all calls with this key."""

    def clear(self) -> None: ...


class CudaGraphs:
    """The first call with a key runs as it is, and compiles and allocates what it needs; the second is captured; later ones replay.

    All graphs share one pool of memory for what they compute in between: they run one after another, and leave nothing there. Work is
    captured on the stream that it runs on. Other threads may call CUDA meanwhile: they copy weights and KV.
    """

    def __init__(self, max_graphs: int = MAX_GRAPHS) -> None:
        self._max_graphs = max_graphs
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()  # None: met once
        self._is_refused = False  # a capture failed: all runs as it is from then on
        self._pool: Any = None  # torch's name of the pool
        self.num_captured = self.num_replayed = 0

    def run(self, key: Hashable, work: Work) -> None:
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > self._max_graphs:
                self._forget(next(iter(self._graphs)))
            work()
            return
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph is None and not self._is_refused:
            graph = self._graphs[key] = self._capture(key, work)
        if graph is None:
            work()
            return
        self.num_replayed += 1
        graph.replay()

    def clear(self) -> None:
        """Nothing may be running."""
        self._graphs.clear()
        self._pool = None

    def _forget(self, key: Hashable) -> None:
        if self._graphs.pop(key) is not None:
            torch.cuda.current_stream().synchronize()  # a graph that runs must not be destroyed

    def _capture(self, key: Hashable, work: Work) -> torch.cuda.CUDAGraph | None:
        """None when this work cannot be captured."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it frees could call CUDA in the middle of the capture
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            log.warning("graph.not_captured key=%s reason=%s", key, str(error).partition("\n")[0])
            self._is_refused = True
            return None
        finally:
            if collects:
                gc.enable()
        self.num_captured += 1
        return graph
