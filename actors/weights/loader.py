"""The loader of a worker: one thread that works on the loads under way, urgent ones first, oldest first among equals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from polymux.actors.weights.load import Fetch, Load, Target, Work
from polymux.transport.image_maps import KEEP_S, ImageMaps
from polymux.transport.messages import ModelSpec

STOP_S = 10.0  # for the piece under way


class Loader:
    """`begin` starts a load at once; the thread starts with the first one, and ends with `close`."""

    def __init__(self, fetch: Fetch, clock: Callable[[], float] = time.monotonic, maps: ImageMaps | None = None) -> None:
        self._fetch = fetch
        self.maps = maps if maps is not None else ImageMaps()
        self._clock = clock
        self._changed = threading.Condition()
        self._loads: list[Load] = []
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def begin(self, spec: ModelSpec, target: Target, *, is_urgent: bool) -> Load:
        """Bring the model's image into `target`."""
        load = self._make(spec, target, is_urgent=is_urgent)
        with self._changed:
            assert not self._is_closed, "the loader is closed"
            self._loads.append(load)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="polymux-loader", daemon=True)
                self._thread.start()
        return load

    def _make(self, spec: ModelSpec, target: Target, *, is_urgent: bool) -> Load:
        return Load(spec, self._fetch, target, self.maps, self._changed, is_urgent=is_urgent, clock=self._clock)

    def hurry(self, load: Load) -> None:
        """Somebody waits for it now."""
        with self._changed:
            load.is_urgent = True
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel what is under way. May be called twice."""
        with self._changed:
            self._is_closed = True
            loads = list(self._loads)
            self._changed.notify_all()
        for load in loads:
            load.cancel()
        if self._thread is not None:
            self._thread.join(STOP_S)
        self.maps.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                step = self._next()
                if step is None:
                    if self._is_closed:
                        return
                    self._changed.wait(KEEP_S)
            if step is not None:
                step()
            del step  # it holds views of the arena
            self.maps.expire(self._clock())

    def _next(self) -> Work | None:
        self._loads = [load for load in self._loads if load.is_under_way]
        for load in sorted(self._loads, key=lambda load: not load.is_urgent):
            step = load.claim()
            if step is not None:
                return step
        return None
