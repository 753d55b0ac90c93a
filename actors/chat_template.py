"""Chat templates: messages to the text that a model was trained on, rendered as transformers renders them.

A template comes with a checkpoint and is code, so it runs in jinja2's immutable sandbox: no attribute leads out, and nothing that it is
given can be changed. What it needs beyond jinja2 is what transformers gives it: `raise_exception`, `strftime_now`, a `tojson` that leaves
HTML alone, loop controls, and the `generation` block, which marks the assistant's text for training and prints it here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from polymux.actors.weights.json_file import read_object, read_text
from polymux.transport.errors import CheckpointError, InvalidRequest

Message = Mapping[str, Any]
PROBE = "probe 7"


def load_templates(path: Path) -> dict[str, str]:
    """The chat templates of a checkpoint by name; empty when it has none.

    chat_template.jinja and additional_chat_templates/NAME.jinja win over tokenizer_config.json's `chat_template`, a text or a list of
    named ones.
    """
    found = {file.stem: read_text(file) for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        found["default"] = read_text(path / "chat_template.jinja")
    if found or not (path / "tokenizer_config.json").is_file():
        return found
    declared = read_object(path / "tokenizer_config.json").get("chat_template")
    if declared is None:
        return {}
    named = [{"name": "default", "template": declared}] if isinstance(declared, str) else declared
    try:
        found = {entry["name"]: entry["template"] for entry in named}
    except (TypeError, KeyError):
        found = {}
    if not found or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: `chat_template` is neither a text nor a list of named texts; correct it")
    return found


class ChatTemplate:
    """The templates of one checkpoint, compiled. `default` serves; `tool_use`, where there is one, serves requests with tools."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        """`special_tokens` are what templates call `bos_token` and so on. Raises CheckpointError for a template that does not compile."""
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._templates = {}
        for name, source in templates.items():
            try:
                self._templates[name] = environment.from_string(source)
            except TemplateSyntaxError as error:
                raise CheckpointError(f"{origin}: chat template {name}, line {error.lineno}: {error.message}; correct it") from error
        self._takes_parts = {name: self._renders_parts(name) for name in self._templates}

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. `variables` go to the template as they are and may replace special tokens.

        Raises InvalidRequest, of the parameter `messages`, when there is no template or the template cannot render these messages.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest("messages: this model has no chat template; send a prompt to /v1/completions", param="messages")
        plain = [_plain(at, message, self._takes_parts[name]) for at, message in enumerate(messages)]
        if not plain:
            raise InvalidRequest("messages: must have at least one message", param="messages")
        return self._render(name, plain, tools, add_generation_prompt, variables or {})

    def _render(
        self, name: str, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        given = {**self._special_tokens, **variables, "messages": messages, "tools": tools, "documents": variables.get("documents")}
        try:
            return self._templates[name].render(given, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can raise whatever an expression can
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}", param="messages") from error

    def _renders_parts(self, name: str) -> bool:
        """Whether the template reads content given as a list of parts, found by trying; else parts are joined before it sees them."""
        try:
            text = self._render(name, [{"role": "user", "content": PROBE}], None, True, {})
            parts = self._render(name, [{"role": "user", "content": [{"type": "text", "text": PROBE}]}], None, True, {})
        except InvalidRequest:
            return False
        return text == parts


def _plain(at: int, message: Message, takes_parts: bool) -> dict[str, Any]:
    """The message as templates expect it: no key without a value, and content as a text where the template wants one."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"messages[{at}]: must be an object with a `role`", param="messages")
    plain = {key: value for key, value in message.items() if value is not None}
    content = plain.get("content", "")
    if isinstance(content, str):
        return plain
    if not isinstance(content, list):
        raise InvalidRequest(f"messages[{at}].content: must be a text or a list of parts", param="messages")
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"messages[{at}].content[{place}]: only parts of type text are supported", param="messages")
    if not takes_parts:
        plain["content"] = "\n".join(part["text"] for part in content)
    return plain


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` prints what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
