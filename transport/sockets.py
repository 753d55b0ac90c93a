"""TCP sockets as all of transport wants them: non-blocking, without Nagle's delay, with keep-alive; and how addresses are written."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

from polymux.transport.errors import ConfigError, PeerLost
from polymux.transport.frames import drive_async
from polymux.transport.handshake import Introduction, dial

_BACKLOG = 128


def tcp_address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "tcp://host:port". Raises ConfigError for anything else."""
    try:
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"address={address!r} is not of the form tcp://host:port")


def listen_tcp(host: str, port: int) -> socket.socket:
    """Raises ConfigError when the address cannot be listened on."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another host, or port 0 for any") from error
    sock.setblocking(False)
    return sock


def tune(sock: socket.socket) -> None:
    """Send small frames at once, and notice a host that vanished within half a minute."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


async def dial_tcp(address: str, intro: Introduction, token: str, deadline_s: float) -> tuple[socket.socket, bytes]:
    """Connect and shake hands; returns the socket and the acceptor's body.

    Raises PeerLost, TransferTimeout, or what the handshake raises.
    """
    host, port = parse_address(address)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + deadline_s
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        tune(sock)
        try:
            async with asyncio.timeout_at(until_s):
                await loop.sock_connect(sock, (host, port))
        except OSError as error:  # TimeoutError is one
            raise PeerLost(f"{address} cannot be reached: {error or 'no answer'}") from error
        return sock, await drive_async(dial(intro, token), sock, max(until_s - loop.time(), 1e-3))
    except BaseException:
        sock.close()
        raise


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side has closed it, as the kernel's own books say: true even where one of the two was frozen in between."""
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
