"""One thread with an event loop: everything that a worker's sockets do happens in there, between two callbacks at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Reactor:
    """The thread. It sleeps in the kernel while nothing happens."""

    def __init__(self, name: str = "polymux-transport") -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def post(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function` in the thread, soon. Dropped when the reactor was closed."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        """Run a coroutine in the thread and wait for its result; never from the thread itself. Raises TimeoutError."""
        assert not self.is_current, "would wait for itself"
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        """Stop the thread and wait for it. May be called twice."""
        if not self.loop.is_closed():
            self.post(self.loop.stop)
            if not self.is_current:
                self._thread.join(5.0)
