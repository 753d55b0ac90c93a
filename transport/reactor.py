"""One thread with an event loop: everything that a worker's sockets do happens in there, between two callbacks at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

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


async def all_set(events: Iterable[asyncio.Event], within_s: float, what: str) -> None:
    """Wait for all of them, but no longer; what is late is logged, since whoever closes can only go on."""
    try:
        async with asyncio.timeout(within_s):
            for event in events:
                await event.wait()
    except TimeoutError:
        log.warning("transport.unsettled what=%s after_s=%g", what, within_s)
