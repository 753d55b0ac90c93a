"""What other threads leave for the engine thread: a bounded queue with one wake-up."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from polymux.transport.errors import Overloaded

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Many producers, one consumer. `post` never blocks: full means Overloaded, which the caller tells its peer.

    `tell` is for what must arrive and is bounded elsewhere: the ends of transfers, of which each edge has so many, and of connections.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._arrived = threading.Event()

    def post(self, item: T) -> None:
        """Raises Overloaded when the consumer has fallen `capacity` items behind."""
        if len(self._items) >= self._capacity:
            raise Overloaded(f"the worker has {self._capacity} messages waiting; try again")
        self.tell(item)

    def tell(self, item: T) -> None:
        self._items.append(item)
        self._arrived.set()

    def drain(self) -> list[T]:
        """Everything posted so far, in order."""
        self._arrived.clear()
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def wake(self) -> None:
        """End a wait with nothing posted."""
        self._arrived.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until something is posted, or the time is over; True when something was."""
        return self._arrived.wait(timeout_s)
