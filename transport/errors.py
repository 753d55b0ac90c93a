"""Every error that polymux raises on purpose, in one tree.

PolymuxError                     500 internal_error
├── InvalidRequest               400  a field of a request is wrong; names it
│   ├── ContextLengthExceeded    400  prompt + max_tokens can never fit
│   ├── ModelNotFound            404
│   └── RequestTooLarge          413
├── AuthenticationFailed         401
│   └── PermissionDenied         403
├── ConfigError                       a setting is wrong; names it and the remedy
├── CheckpointError                   a file or tensor of a checkpoint is wrong; names both
├── Refused                      503  retry later
│   ├── RateLimited              429
│   ├── Overloaded               503  a bounded queue is full
│   ├── ModelLoading             503  waking it would outlast the deadline
│   └── Draining                 503
├── Cancelled                    499  the client went away
├── DeadlineExceeded             408
├── WorkerLost                   504  retried by replay before a client sees it
│   └── RankLost                 504  a rank of an instance is dead or silent: the instance is fenced
├── CudaError                         a CUDA call failed
├── NonFiniteLogits                   the model computed NaN or infinity instead of logits
├── OutOfMemory                       the arena or the host store cannot hold it
│   └── NoFreeBlocks                  retry when a sequence ends
├── WireError                         bytes from a peer that are not a message
│   └── ProtocolMismatch              the two sides differ in version, layout or settings; names the field
└── TransferError                     a KV transfer ended without a commit
    ├── StaleEpoch                    the peer speaks for an incarnation that is gone
    ├── LayoutMismatch                the two sides' KV layouts differ
    ├── GrantViolation                blocks outside the grant, overlapping or out of range
    ├── TransferTimeout               the deadline passed
    └── PeerLost                      the peer is dead or its link is down
        └── NcclError                 NCCL refused, broke off or got stuck; another edge may work
"""

from __future__ import annotations

from typing import Any, ClassVar


class PolymuxError(Exception):
    """The root. `status`, `kind` and `code` are the HTTP form (OpenAI's `Error` schema); `retryable` says whether trying again may help."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, request_id: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the keyword fields when an actor raises this into another process."""
        return _rebuild, (type(self), self.message, self.param, self.request_id, self.retry_after_s)


def _rebuild(cls: type[PolymuxError], message: str, param: str | None, request_id: str | None, retry_after_s: float | None) -> PolymuxError:
    return cls(message, param=param, request_id=request_id, retry_after_s=retry_after_s)


class InvalidRequest(PolymuxError):
    status, kind = 400, "invalid_request_error"
    code: ClassVar[str | None] = None


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    status, code = 404, "model_not_found"


class RequestTooLarge(InvalidRequest):
    status, code = 413, "request_too_large"


class AuthenticationFailed(PolymuxError):
    status, kind, code = 401, "authentication_error", "invalid_api_key"


class PermissionDenied(AuthenticationFailed):
    status, kind, code = 403, "permission_error", "model_not_allowed"


class ConfigError(PolymuxError):
    """A setting that cannot work; the message names the field, its value and the remedy."""


class CheckpointError(PolymuxError):
    """A checkpoint that cannot be served; the message names the file, the tensor where there is one, and the fix."""


class Refused(PolymuxError):
    status, kind, code, retryable = 503, "service_unavailable_error", "overloaded", True


class RateLimited(Refused):
    status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"


class Overloaded(Refused):
    pass


class ModelLoading(Refused):
    code = "model_loading"


class Draining(Refused):
    code = "draining"


class Cancelled(PolymuxError):
    status, kind = 499, "cancelled"
    code: ClassVar[str | None] = None


class DeadlineExceeded(PolymuxError):
    status, kind, code = 408, "timeout_error", "request_timeout"


class WorkerLost(PolymuxError):
    status, kind, code, retryable = 504, "timeout_error", "upstream_timeout", True


class RankLost(WorkerLost):
    """A rank of an instance died, or did not answer in time. The instance computes nothing any more; a new one takes its place."""


class NonFiniteLogits(PolymuxError):
    """No token can be drawn. `rows` are the batch's rows at fault, for whoever stepped it; the others may be sampled again without them."""

    rows: tuple[int, ...] = ()


class CudaError(PolymuxError):
    """`is_sticky`: every later call of this process will fail too, so the process must end."""

    is_sticky = False


class OutOfMemory(PolymuxError):
    """The arena or the host store cannot hold what was asked for, even after eviction."""


class NoFreeBlocks(OutOfMemory):
    retryable = True


class WireError(PolymuxError):
    """Bytes from a peer that are not a message: too long, malformed, of an unknown kind or of the wrong types."""


class ProtocolMismatch(WireError):
    pass


class TransferError(PolymuxError):
    retryable = True


class StaleEpoch(TransferError):
    pass


class LayoutMismatch(TransferError):
    retryable = False


class GrantViolation(TransferError):
    retryable = False


class TransferTimeout(TransferError):
    pass


class PeerLost(TransferError):
    pass


class NcclError(PeerLost):
    pass


def _tree(root: type[PolymuxError]) -> dict[str, type[PolymuxError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


ERRORS_BY_NAME = _tree(PolymuxError)


def error_from_name(name: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> PolymuxError:
    """Rebuild an error that a peer reported by class name; an unknown name becomes the root class, with the name kept in the text."""
    cls = ERRORS_BY_NAME.get(name)
    if cls is None:
        return PolymuxError(f"{name}: {message}", param=param)
    return cls(message, param=param, retry_after_s=retry_after_s)
