"""The OpenAPI document: request bodies from the schemas that check them, the rest by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

import polymux
from polymux.deploy.http.openai import (
    NEUTRAL_CHAT,
    NEUTRAL_COMPLETION,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Neutral,
    TokenizeRequest,
)

BODIES = (ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
ERROR_STATUSES = {
    "400": "a field is wrong; `param` names it",
    "401": "the API key is missing or wrong",
    "404": "no such model",
    "408": "the deadline passed",
    "413": "the body is too large",
    "429": "too many requests; see Retry-After",
    "500": "a bug",
    "503": "overloaded, loading or draining; see Retry-After",
    "504": "a worker was lost and nobody could take over",
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
HEADERS = {
    "X-Request-Id": "echoed; ours when it is left out",
    "x-request-timeout-s": "deadline in seconds, at most the server's",
    "x-slo-ttft-ms": "target time to first token",
    "x-slo-tpot-ms": "target time per output token after it",
}


_TIMELINE = [
    {"name": name, "in": "query", "description": text, "schema": schema}
    for name, text, schema in (
        ("seconds", "how far to look back", {"type": "number", "default": 300, "maximum": 3600}),
        ("limit", "spans of each worker, the newest, at most", {"type": "integer", "default": 4096, "maximum": 65_536}),
        (
            "format",
            "a browser gets the page, others JSON; `chrome` is the trace event format, which Perfetto reads",
            {"enum": ["json", "chrome", "html"]},
        ),
    )
]


_DRAIN = [
    {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
    {
        "name": "timeout_s",
        "in": "query",
        "description": "for its sequences to move or end; after it the worker goes on serving",
        "schema": {"type": "number", "default": 60, "maximum": 600},
    },
]


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "polymux", "version": polymux.__version__, "description": "An OpenAI-compatible server of many models."},
        "paths": _paths(),
        "components": {
            "schemas": {**schemas["$defs"], "Error": ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _paths() -> dict[str, Any]:
    model = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "/v1/chat/completions": {"post": _generation("Complete a conversation", ChatCompletionRequest.__name__, NEUTRAL_CHAT)},
        "/v1/completions": {"post": _generation("Complete prompts", CompletionRequest.__name__, NEUTRAL_COMPLETION)},
        "/v1/models": {"get": _operation("Every registered model")},
        "/v1/models/{model}": {"get": _operation("One model") | {"parameters": model}},
        "/v1/polymux/topology": {"get": _operation("Workers and models, as the controller sees them")},
        "/v1/polymux/timeline": {"get": _operation("What every worker did in the last minutes") | {"parameters": _TIMELINE}},
        "/v1/polymux/workers/{id}/drain": {"post": _operation("Empty a worker, then stop it") | {"parameters": _DRAIN}},
        "/tokenize": {"post": _operation("Text or messages to token ids", TokenizeRequest.__name__)},
        "/detokenize": {"post": _operation("Token ids to text", DetokenizeRequest.__name__)},
        "/health": {"get": _open("This process answers")},
        "/ready": {"get": _open("The cluster can serve: 200, else 503 with the reasons")},
        "/metrics": {"get": _open("Prometheus text")},
        "/version": {"get": _open("The version that runs")},
    }


def _generation(summary: str, body: str, neutral: Neutral) -> dict[str, Any]:
    refused = ", ".join(f"`{name}`" for name in sorted(neutral))
    operation = _operation(summary, body)
    operation["description"] = f"Null means the default. Refused unless neutral: {refused}. Unknown fields are refused by name."
    operation["parameters"] = [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()
    ]
    operation["responses"]["200"]["content"] = {"application/json": {}, "text/event-stream": {}}
    return operation


def _operation(summary: str, body: str | None = None) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": {"application/json": {}}},
            **{status: {"description": text, **error} for status, text in ERROR_STATUSES.items()},
        },
    }
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _open(summary: str) -> dict[str, Any]:
    return {"summary": summary, "security": [], "responses": {"200": {"description": "done"}}}
