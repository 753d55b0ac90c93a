"""How two processes of a cluster meet: same protocol, same secret, the incarnation that was meant.

    dialler                                     acceptor
    preamble, Hello(kind, id, nonce)       -->
                                           <--  preamble, Challenge(nonce)
    Answer(proof, whom I expect, body)     -->
                                           <--  Welcome(proof, body) or Refusal(error)

Proofs are HMAC-SHA256 under the cluster token over everything said before, with the side's name: the token never travels, a recorded
exchange is worthless, and neither side can reflect the other's proof. What follows the handshake is neither encrypted nor signed: the
cluster's sockets belong on a private network.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from polymux.transport.errors import (
    AuthenticationFailed,
    ConfigError,
    PeerLost,
    PolymuxError,
    ProtocolMismatch,
    StaleEpoch,
    WireError,
    error_from_name,
)
from polymux.transport.frames import Steps, frame, read_frame
from polymux.transport.messages import ErrorReport
from polymux.transport.protocol import PREAMBLE, PROTOCOL_VERSION, Answer, Challenge, Hello, PeerKind, Refusal, Welcome
from polymux.transport.units import KIB, Epoch
from polymux.transport.wire import decode, decode_as, encode

MIN_TOKEN_LEN = 16
_MAX_BYTES = 64 * KIB  # before a peer has shown that it knows the token
_NONCE_BYTES = 32

M = TypeVar("M")


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """Who dialled, whom it expects, and what its kind says besides."""

    kind: PeerKind
    peer_id: str
    target: str
    epoch: Epoch
    body: bytes


def check_token(token: str) -> bytes:
    """The token as key. Raises ConfigError for one that could be guessed."""
    if len(token) < MIN_TOKEN_LEN:
        raise ConfigError(f"the cluster token has {len(token)} characters, fewer than {MIN_TOKEN_LEN}; make one with secrets.token_hex(32)")
    return token.encode()


def report(error: PolymuxError) -> ErrorReport:
    return ErrorReport(name=type(error).__name__, message=error.message, param=error.param, retry_after_s=error.retry_after_s)


def from_report(error: ErrorReport) -> PolymuxError:
    return error_from_name(error.name, error.message, param=error.param, retry_after_s=error.retry_after_s)


def dial(intro: Introduction, token: str) -> Steps[bytes]:
    """Steps of the dialling side; they end in the acceptor's body.

    Raises ProtocolMismatch, AuthenticationFailed, WireError, or the error with which the acceptor refused.
    """
    key = check_token(token)
    hello = encode(Hello(kind=intro.kind, peer_id=intro.peer_id, nonce=secrets.token_bytes(_NONCE_BYTES)))
    yield PREAMBLE + frame(hello)
    _check_preamble((yield len(PREAMBLE)))
    challenge = yield from read_frame(_MAX_BYTES)
    _expect(Challenge, challenge)
    said = hello + challenge
    proof = _proof(key, b"dialler", said, intro.target, intro.epoch, intro.body)
    answer = encode(Answer(proof=proof, target=intro.target, epoch=intro.epoch, body=intro.body), limit=_MAX_BYTES)
    yield frame(answer)
    reply = yield from read_frame(_MAX_BYTES)
    welcome = _expect(Welcome, reply)
    if not hmac.compare_digest(welcome.proof, _proof(key, b"acceptor", said + answer, "", Epoch(0), welcome.body)):
        raise AuthenticationFailed("the acceptor does not know the cluster token; check the address and the token on both sides")
    return welcome.body


def accept(token: str, decide: Callable[[Introduction], bytes]) -> Steps[Introduction]:
    """Steps of the accepting side. `decide` returns the body of the Welcome, or raises the PolymuxError that becomes a Refusal."""
    key = check_token(token)
    try:
        preamble = yield len(PREAMBLE)
        yield PREAMBLE
        _check_preamble(preamble)
        hello = yield from read_frame(_MAX_BYTES)
        opened = decode_as(Hello, hello)
        if len(opened.nonce) != _NONCE_BYTES:
            raise WireError(f"Hello.nonce has {len(opened.nonce)} bytes instead of {_NONCE_BYTES}")
        challenge = encode(Challenge(nonce=secrets.token_bytes(_NONCE_BYTES)))
        yield frame(challenge)
        answer = yield from read_frame(_MAX_BYTES)
        said = decode_as(Answer, answer)
        if not hmac.compare_digest(said.proof, _proof(key, b"dialler", hello + challenge, said.target, said.epoch, said.body)):
            raise AuthenticationFailed("wrong cluster token")
        intro = Introduction(kind=opened.kind, peer_id=opened.peer_id, target=said.target, epoch=said.epoch, body=said.body)
        body = decide(intro)
        yield frame(encode(Welcome(proof=_proof(key, b"acceptor", hello + challenge + answer, "", Epoch(0), body), body=body)))
        return intro
    except PeerLost:
        raise
    except PolymuxError as error:
        yield frame(encode(Refusal(error=report(error))))
        raise


def check_target(intro: Introduction, name: str, epoch: Epoch | None) -> None:
    """Raise StaleEpoch unless the dialler means this incarnation. `epoch` None: it has none yet."""
    if epoch is None:
        raise StaleEpoch(f"{name} has no epoch yet; dial again once the controller lists it")
    if intro.target != name or intro.epoch != epoch:
        raise StaleEpoch(f"this is {name} epoch {epoch}, not {intro.target} epoch {intro.epoch}; ask the controller for its address")


def abandon(sock: socket.socket) -> None:
    """Close so that the last bytes sent (a Refusal) still arrive."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    sock.close()


def _proof(key: bytes, side: bytes, said: bytes, target: str, epoch: Epoch, body: bytes) -> bytes:
    digest = hmac.new(key, side, hashlib.sha256)
    for part in (said, target.encode(), str(epoch).encode(), body):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _check_preamble(preamble: bytes) -> None:
    if preamble[:6] != PREAMBLE[:6]:
        raise ProtocolMismatch("the other side is not a polymux transport; check host and port")
    if preamble != PREAMBLE:
        version = int.from_bytes(preamble[6:], "little")
        raise ProtocolMismatch(f"this side speaks protocol version {PROTOCOL_VERSION}, the other {version}; run one release of polymux")


def _expect(cls: type[M], data: bytes) -> M:
    message = decode(data, limit=_MAX_BYTES)
    if isinstance(message, Refusal):
        raise from_report(message.error)
    if not isinstance(message, cls):
        raise WireError(f"expected {cls.__name__}, got {type(message).__name__}")
    return message
