"""Backend `shm`: two processes of one host. The prefill worker hands its region's descriptor over, and the decode worker maps it read-only;
of an instance the regions of all ranks.

The unix connection that carried the descriptor stays open and is the fence: closing it is seen at once on the other side, by the
kernel's own books, even where one of the two was frozen in between.
"""

from __future__ import annotations

import asyncio
import os
import socket

from polymux.transport.descriptors import receive_fd
from polymux.transport.errors import PeerLost, TransferTimeout, WireError
from polymux.transport.frames import drive_async
from polymux.transport.handshake import Introduction, dial
from polymux.transport.head_slices import MAX_RANKS
from polymux.transport.kv_backend import Landing
from polymux.transport.kv_pull import PullReceiver
from polymux.transport.protocol import EdgeTerms
from polymux.transport.reactor import Reactor
from polymux.transport.region import map_read_only
from polymux.transport.sockets import is_closed
from polymux.transport.units import MIB

_MAX_MAPPED_BYTES = 128 * MIB


async def open_shm(
    terms: EdgeTerms, intro: Introduction, token: str, deadline_s: float, reactor: Reactor, landing: Landing
) -> PullReceiver:
    """Raises PeerLost, TransferTimeout, AuthenticationFailed, WireError or ConfigError when the region cannot be had."""
    if not terms.unix_name:
        raise PeerLost("the source's region is plain memory")
    if not 0 < terms.num_ranks <= MAX_RANKS:
        raise WireError(f"the source says that it has {terms.num_ranks} ranks; an instance has at most {MAX_RANKS}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.connect(f"\0{terms.unix_name}")
        except OSError as error:
            raise PeerLost(f"its unix socket cannot be reached: {error}") from error
        await drive_async(dial(intro, token), sock, deadline_s)
        source: list[memoryview] = []
        for _ in range(terms.num_ranks):
            fd = await _receive_fd(sock, deadline_s)
            try:
                source.append(map_read_only(fd, terms.region_bytes))
            finally:
                os.close(fd)
    except BaseException:
        sock.close()
        raise
    return PullReceiver("shm", reactor.loop, landing, source, lambda: is_closed(sock), sock.close, _MAX_MAPPED_BYTES)


async def _receive_fd(sock: socket.socket, deadline_s: float) -> int:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        async with asyncio.timeout(deadline_s):
            await readable.wait()
        return receive_fd(sock, 0.0)
    except TimeoutError as error:
        raise TransferTimeout("the source handed no descriptor over") from error
    finally:
        loop.remove_reader(sock)
