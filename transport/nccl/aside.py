"""Calls that may take long, or never return, each in a thread of its own: who started one looks whether it is done, and never waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", covariant=True)


class Aside(Protocol[T]):
    """A call that is going on elsewhere. `result` only once it is done, and then it raises what the call raised."""

    @property
    def is_done(self) -> bool: ...

    def result(self) -> T: ...


class ThreadAside(Generic[T]):
    """One daemon thread; it does not hold up the end of the process."""

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._call = call
        self._done = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # it is the starter's to deal with
            self._error = error
        self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self, timeout_s: float) -> bool:
        """For a starter that has the time: whether it is done."""
        return self._done.wait(timeout_s)

    def result(self) -> T:
        assert self._done.is_set()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
