"""Open files handed from process to process over a unix socket (SCM_RIGHTS), and the abstract names such sockets have.

Abstract names leave nothing behind in a file system. Anyone in the network namespace may dial them, so they authenticate like all others.
"""

from __future__ import annotations

import array
import secrets
import socket

from polymux.transport.errors import ConfigError, PeerLost, TransferTimeout, WireError

_SCHEME = "unix:@"


def listen_abstract(purpose: str) -> tuple[socket.socket, str]:
    """A listening unix socket and its name, which nobody else has."""
    name = f"polymux-{purpose}-{secrets.token_hex(8)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(f"\0{name}")
    sock.listen(64)
    return sock, name


def dial_abstract(name: str, deadline_s: float) -> socket.socket:
    """Raises PeerLost when nobody listens under this name in our network namespace."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(deadline_s)
    try:
        sock.connect(f"\0{name}")
    except OSError as error:
        sock.close()
        raise PeerLost(f"no listener at {_SCHEME}{name}: {error}") from error
    return sock


def unix_address(name: str) -> str:
    return _SCHEME + name


def unix_name(address: str) -> str:
    """Undo `unix_address`. Raises ConfigError for anything else."""
    if not address.startswith(_SCHEME):
        raise ConfigError(f"address={address!r} does not begin with {_SCHEME}")
    return address.removeprefix(_SCHEME)


def send_fd(sock: socket.socket, fd: int) -> None:
    """The descriptor, beside one byte of the stream."""
    socket.send_fds(sock, [b"\0"], [fd])


def receive_fd(sock: socket.socket, deadline_s: float) -> int:
    """The descriptor beside the next byte of the stream; the caller closes it. Raises TransferTimeout, PeerLost, WireError."""
    fds = array.array("i")
    sock.settimeout(deadline_s)
    try:
        data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as error:
        raise TransferTimeout(f"the peer handed no descriptor over within {deadline_s:g} s") from error
    except OSError as error:
        raise PeerLost(f"the connection broke: {error}") from error
    if not data:
        raise PeerLost("the peer closed the connection instead of handing a descriptor over")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: fds.itemsize])
    if not fds:
        raise WireError("the peer sent a byte without the descriptor that belongs to it")
    return fds[0]
