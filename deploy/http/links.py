"""Connections to workers: one for each incarnation, kept open. Their frames are taken apart and handed to the requests they concern."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from polymux.deploy.http.settings import FrontDoorSettings
from polymux.transport.errors import PeerLost, PolymuxError
from polymux.transport.link import WorkerLink
from polymux.transport.messages import Cancel, Peer, SequenceUpdate
from polymux.transport.units import Epoch, SequenceId, WorkerId

log = logging.getLogger("polymux.frontdoor")

Incarnation = tuple[WorkerId, Epoch]
CANCEL_S = 5.0  # for a cancellation to leave; a worker that takes longer is as good as lost, and cancels by itself


class Listener(Protocol):
    """An open request, as its links see it."""

    def put(self, update: SequenceUpdate) -> None: ...

    def link_lost(self, link: WorkerLink) -> None: ...


class Links:
    """All of one event loop. `open` dials where it must; `listen` names who wants a sequence's updates."""

    def __init__(self, settings: FrontDoorSettings) -> None:
        self._settings = settings
        self._links: dict[Incarnation, WorkerLink] = {}
        self._dialling: dict[Incarnation, asyncio.Task[WorkerLink]] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._cancels: set[asyncio.Task[None]] = set()
        self._users: dict[Incarnation, set[Listener]] = {}
        self._listeners: dict[SequenceId, Listener] = {}
        self._is_closed = False

    @property
    def num_open(self) -> int:
        return len(self._links)

    async def open(self, peer: Peer, user: Listener, timeout_s: float) -> WorkerLink:
        """The link to this incarnation; `user` hears when it is lost. Raises PeerLost when it cannot be reached in time."""
        key = (peer.worker_id, peer.epoch)
        link = self._links.get(key)
        if link is None:
            if self._is_closed:
                raise PeerLost("the front door is closed")
            dial = self._dialling.get(key)
            if dial is None:
                dial = self._dialling[key] = asyncio.get_running_loop().create_task(self._dial(key, peer))
                dial.add_done_callback(_retrieve)
            try:
                async with asyncio.timeout(timeout_s):
                    link = await asyncio.shield(dial)
            except TimeoutError:
                raise PeerLost(f"worker {peer.worker_id} did not let us in within {timeout_s:.1f} s") from None
            except PolymuxError as error:
                raise PeerLost(f"worker {peer.worker_id} at {peer.address} cannot be reached: {error.message}") from error
            if self._links.get(key) is not link:
                raise PeerLost(f"worker {peer.worker_id} was lost at once")
        self._users[key].add(user)
        return link

    def listen(self, sequence_id: SequenceId, listener: Listener) -> None:
        self._listeners[sequence_id] = listener

    def ignore(self, sequence_id: SequenceId) -> None:
        """What still comes for this sequence is dropped."""
        self._listeners.pop(sequence_id, None)

    def leave(self, user: Listener) -> None:
        for users in self._users.values():
            users.discard(user)

    def cancel(self, peer: Peer, sequence_id: SequenceId, reason: str) -> None:
        """Ask the worker to stop, if it is still connected; a lost one stops by itself. Goes out without being waited for."""
        link = self._links.get((peer.worker_id, peer.epoch))
        if link is not None:
            task = asyncio.get_running_loop().create_task(self._cancel(link, Cancel(sequence_id=sequence_id, reason=reason)))
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)

    async def close(self) -> None:
        """What was to be cancelled still is."""
        self._is_closed = True
        await asyncio.gather(*self._cancels)
        for dial in list(self._dialling.values()):
            dial.cancel()
        for link in list(self._links.values()):
            await link.close()
        await asyncio.gather(*self._readers, *self._dialling.values(), return_exceptions=True)

    async def _cancel(self, link: WorkerLink, message: Cancel) -> None:
        try:
            async with asyncio.timeout(CANCEL_S):
                await link.send(message)
        except (PolymuxError, TimeoutError) as error:
            log.warning("link.cancel_failed worker=%s sequence=%s reason=%s", link.peer.worker_id, message.sequence_id, error)

    async def _dial(self, key: Incarnation, peer: Peer) -> WorkerLink:
        try:
            settings = self._settings
            link = await WorkerLink.connect(peer, settings.client_id, settings.token, settings.connect_timeout_s)
        finally:
            del self._dialling[key]
        self._links[key] = link
        self._users[key] = set()
        reader = asyncio.get_running_loop().create_task(self._read(key, link))
        self._readers.add(reader)
        reader.add_done_callback(self._readers.discard)
        return link

    async def _read(self, key: Incarnation, link: WorkerLink) -> None:
        """Hand updates on until the link ends; then tell everyone who relied on it."""
        listeners = self._listeners
        try:
            async for frame in link:
                for update in frame.updates:
                    listener = listeners.get(update.sequence_id)
                    if listener is not None:
                        listener.put(update)
        except PolymuxError as error:
            log.warning("link.lost worker=%s epoch=%s reason=%s", link.peer.worker_id, link.peer.epoch, error.message)
        finally:
            del self._links[key]
            for user in self._users.pop(key):
                user.link_lost(link)
            await link.close()


def _retrieve(task: asyncio.Task[WorkerLink]) -> None:
    """Whoever waited has heard of the failure; when nobody waits any more, nobody needs to."""
    if not task.cancelled():
        task.exception()
