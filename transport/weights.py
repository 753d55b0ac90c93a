"""What a node's store hands to its workers: descriptors of weight images, whose bytes they read at their own pace, and of the host tier.

    worker                         store
    handshake (kind "image")  -->
    ImageRequest(model, rank) -->  builds or looks up the image, however long that takes within the worker's deadline
                              <--  ImageReply, the manifest's bytes, the descriptor; or Refusal(error)
    or handshake (kind "host_tier")
                              <--  HostTierTerms, the descriptor

The descriptor is read-only where the store says so, and outlives eviction in the store: the memory goes with its last reader.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from polymux.transport.descriptors import dial_abstract, listen_abstract, receive_fd, send_fd, unix_address, unix_name
from polymux.transport.errors import CheckpointError, PolymuxError, WireError
from polymux.transport.frames import Steps, drive_blocking, frame, read_frame
from polymux.transport.handshake import Introduction, accept, check_target, check_token, dial, from_report, report
from polymux.transport.host_tier import OpenTier
from polymux.transport.messages import WHOLE, Shard
from polymux.transport.protocol import HostTierTerms, ImageReply, ImageRequest, PeerKind, Refusal
from polymux.transport.units import MIB, Epoch, ModelName
from polymux.transport.wire import MAX_BULK_BYTES, decode, decode_as, encode

log = logging.getLogger(__name__)

_TARGET = "weights"
_EPOCH = Epoch(0)  # a store has one life: its address dies with it
_HANDSHAKE_S = 5.0
_REPLY_S = 30.0
_CHUNK_BYTES = 16 * MIB


@dataclass(slots=True)
class OpenImage:
    """A fetched image. A context manager that closes `fd`."""

    manifest: bytes
    fd: int
    nbytes: int

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class ImageServer:
    """`open_image(model, shard)` returns the manifest and a descriptor that the server closes, or raises a PolymuxError, which travels.

    `open_tier()` returns the slab size and a descriptor of the node's host tier; None: the node has none.

    It is called from a few threads of the server's own. More than `max_waiting` fetches at once are hung up on.
    """

    def __init__(
        self,
        *,
        token: str,
        open_image: Callable[[ModelName, Shard], tuple[bytes, int]],
        open_tier: Callable[[], tuple[int, int]] | None = None,
        num_threads: int = 4,
        max_waiting: int = 64,
    ) -> None:
        check_token(token)
        self._token = token
        self._open_image = open_image
        self._open_tier = open_tier
        self._places = threading.BoundedSemaphore(max_waiting)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="polymux-images")
        self._listener, name = listen_abstract("images")
        self.address = unix_address(name)
        self._thread = threading.Thread(target=self._listen, name="polymux-images", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; fetches under way end first. May be called twice."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        self._thread.join()
        self._listener.close()
        self._pool.shutdown()

    def _listen(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._places.acquire(blocking=False):
                self._pool.submit(self._serve, sock)
            else:
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                self._answer(sock)
        finally:
            self._places.release()

    def _answer(self, sock: socket.socket) -> None:
        def decide(intro: Introduction) -> bytes:
            if intro.kind not in (PeerKind.IMAGE, PeerKind.HOST_TIER):
                raise WireError(f"this socket serves weight images and host memory, not peers of kind {intro.kind}")
            check_target(intro, _TARGET, _EPOCH)
            return b""

        try:
            intro = drive_blocking(accept(self._token, decide), sock, _HANDSHAKE_S)
            if intro.kind is PeerKind.HOST_TIER:
                self._send_tier(sock)
                return
            request = decode_as(ImageRequest, drive_blocking(read_frame(), sock, _HANDSHAKE_S))
            self._send_image(sock, ModelName(request.model), request.shard)
        except (PolymuxError, OSError) as error:
            log.info("image.refused error=%s", error)

    def _send_tier(self, sock: socket.socket) -> None:
        if self._open_tier is None:
            drive_blocking(_send(encode(HostTierTerms(tier_bytes=0, slab_bytes=0))), sock, _REPLY_S)
            return
        slab_bytes, fd = self._open_tier()
        try:
            terms = HostTierTerms(tier_bytes=os.fstat(fd).st_size, slab_bytes=slab_bytes)
            drive_blocking(_send(encode(terms)), sock, _REPLY_S)
            send_fd(sock, fd)
        finally:
            os.close(fd)

    def _send_image(self, sock: socket.socket, model: ModelName, shard: Shard) -> None:
        try:
            manifest, fd = self._open_image(model, shard)
        except Exception as error:
            if not isinstance(error, PolymuxError):
                log.exception("image.failed model=%s", model)
            known = error if isinstance(error, PolymuxError) else PolymuxError(f"the weight store failed: {error!r}")
            drive_blocking(_send(encode(Refusal(error=report(known)))), sock, _REPLY_S)
            return
        try:
            reply = ImageReply(manifest_bytes=len(manifest), image_bytes=os.fstat(fd).st_size)
            drive_blocking(_send(encode(reply)), sock, _REPLY_S)
            drive_blocking(_send(manifest), sock, _REPLY_S)
            send_fd(sock, fd)
        finally:
            os.close(fd)


def fetch_image(address: str, token: str, model: ModelName, deadline_s: float, shard: Shard = WHOLE) -> OpenImage:
    """Ask the node's store for a model's image, or for one rank's; the caller closes the result.

    Raises what the store raised, or PeerLost, TransferTimeout, AuthenticationFailed, WireError.
    """
    with dial_abstract(unix_name(address), deadline_s) as sock:
        intro = Introduction(kind=PeerKind.IMAGE, peer_id=str(os.getpid()), target=_TARGET, epoch=_EPOCH, body=b"")
        drive_blocking(dial(intro, token), sock, deadline_s)
        reply, manifest = drive_blocking(_request(model, shard), sock, deadline_s)
        fd = receive_fd(sock, deadline_s)
    size = os.fstat(fd).st_size
    if size < reply.image_bytes:
        os.close(fd)
        raise WireError(f"the image of {model} is {size} bytes, not the {reply.image_bytes} announced")
    return OpenImage(manifest, fd, reply.image_bytes)


def fetch_host_tier(address: str, token: str, deadline_s: float) -> OpenTier | None:
    """Ask the node's store for its host memory; None when it has none. Raises as `fetch_image` does."""
    with dial_abstract(unix_name(address), deadline_s) as sock:
        intro = Introduction(kind=PeerKind.HOST_TIER, peer_id=str(os.getpid()), target=_TARGET, epoch=_EPOCH, body=b"")
        drive_blocking(dial(intro, token), sock, deadline_s)
        terms = decode_as(HostTierTerms, drive_blocking(read_frame(), sock, deadline_s))
        if not terms.tier_bytes:
            return None
        return OpenTier(receive_fd(sock, deadline_s), terms.tier_bytes, terms.slab_bytes)


def read_image(fd: int, into: memoryview, offset: int, nbytes: int) -> None:
    """Read `nbytes` from `offset` into the start of `into`, in large chunks and without a buffer between.

    Raises CheckpointError when the image ends before.
    """
    done = 0
    while done < nbytes:
        end = min(done + _CHUNK_BYTES, nbytes)
        read = os.preadv(fd, [into[done:end]], offset + done)
        if read == 0:
            raise CheckpointError(f"the weight image ends {nbytes - done} bytes before byte {offset + nbytes}; build it again")
        done += read


def _send(payload: bytes) -> Steps[None]:
    yield frame(payload)


def _request(model: ModelName, shard: Shard) -> Steps[tuple[ImageReply, bytes]]:
    yield frame(encode(ImageRequest(model=model, shard=shard)))
    reply = decode((yield from read_frame()))
    if isinstance(reply, Refusal):
        raise from_report(reply.error)
    if not isinstance(reply, ImageReply):
        raise WireError(f"expected ImageReply, got {type(reply).__name__}")
    manifest = yield from read_frame(MAX_BULK_BYTES)
    if len(manifest) != reply.manifest_bytes:
        raise WireError(f"a manifest of {len(manifest)} bytes, not the {reply.manifest_bytes} announced")
    return reply, manifest
