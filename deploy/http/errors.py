"""Errors as HTTP says them: the OpenAI `Error` object, all four keys, with the headers that tell a client whether to try again."""

from __future__ import annotations

import json
import math

from starlette.responses import Response

from polymux.transport.errors import DeadlineExceeded, PolymuxError

STATUS_KINDS = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}


def error_json(error: PolymuxError) -> str:
    """`{"error": {...}}` on one line, as a body and as an event of a stream."""
    return _body(error.message, error.kind, error.param, error.code)


def error_response(error: PolymuxError) -> Response:
    headers = {}
    if error.retry_after_s is not None or error.status in (429, 503):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, DeadlineExceeded):
        headers["X-Should-Retry"] = "false"  # it would take as long again; official clients retry a 408 otherwise
    return Response(error_json(error), error.status, headers, "application/json")


def status_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """For what the HTTP framework itself refuses, such as an unknown path or method."""
    kind = STATUS_KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return Response(_body(message, kind, None, None), status, headers, "application/json")


def internal_error(request_id: str) -> PolymuxError:
    """What a client is told of a bug: where to look, and nothing else."""
    return PolymuxError(f"internal error; the server's log has it under request id {request_id}", request_id=request_id)


def error_from_exception(error: BaseException, request_id: str) -> PolymuxError:
    """Ours as they are; settings and checkpoints that turn out wrong while serving are not the client's business."""
    if isinstance(error, PolymuxError) and error.status != 500:
        return error
    return internal_error(request_id)


def _body(message: str, kind: str, param: str | None, code: str | None) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}, ensure_ascii=False)
