"""The parts of the documentation that are facts of the code: settings, environment variables, request fields.

`python -m polymux.deploy.reference` writes them into docs/; a test holds that they are written.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from polymux.cluster.config import ClusterConfig
from polymux.cluster.environment import FIELDS, VARIABLES
from polymux.cluster.quantities import format_bytes
from polymux.cluster.validation import Section
from polymux.deploy.http import openai

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- made by python -m polymux.deploy.reference: {name} -->", "<!-- end of {name} -->"
BOUNDS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
QUANTITIES = {"parse_bytes": "size", "parse_seconds": "duration"}


def settings() -> str:
    """Every setting, one table a section."""
    return "\n".join(_tables(ClusterConfig, "", "Top level")).strip()


def _tables(section: type[Section], prefix: str, title: str) -> Iterator[str]:
    """The section's own settings, then those of the sections in it."""
    nested = {name: found for name, field in section.model_fields.items() if (found := _nested(field.annotation))}
    own = {name: field for name, field in section.model_fields.items() if name not in nested}
    if own:
        yield f"### {title}\n"
        yield from ("| setting | value | default | meaning |", "|---|---|---|---|")
        yield from (f"| `{name}` | {kind(field)} | {_default(field)} | {field.description} |" for name, field in own.items())
        yield ""
    for name, (inner, is_list) in nested.items():
        path = f"{prefix}{name}" + ("[]" if is_list else "")
        yield from _tables(inner, f"{path}.", f"`{path}`: {section.model_fields[name].description}")


def _nested(annotation: Any) -> tuple[type[Section], bool] | None:
    """The section that a field holds, and whether it holds several."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if get_origin(annotation) is tuple and (found := _nested(get_args(annotation)[0])):
        return found[0], True
    return None


def kind(field: FieldInfo) -> str:
    """What may stand there, in words."""
    names = [QUANTITIES[name] for name in _validators(field.annotation, field.metadata) if name in QUANTITIES]
    is_auto = "_auto" in _validators(field.annotation, field.metadata)
    if names:
        text = names[0]
    else:
        text = _plain(field.annotation)
        bounds = [one for one in field.metadata if isinstance(one, annotated_types.BaseMetadata)]
        text += "".join(f", {word} {getattr(one, attribute)}" for one in bounds for attribute, word in BOUNDS if hasattr(one, attribute))
    return f"{text} or `auto`" if is_auto and "`auto`" not in text else text


def _validators(annotation: Any, metadata: typing.Sequence[Any]) -> list[str]:
    """Names of the functions that read a value, through optional and annotated."""
    found = [one.func.__name__ for one in metadata if hasattr(one, "func")]
    if hasattr(annotation, "__metadata__"):
        found += _validators(annotation.__origin__, annotation.__metadata__)
    for part in get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ():
        found += _validators(part, ())
    return found


def _plain(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_plain(part) for part in parts if part is not type(None))
    if hasattr(annotation, "__metadata__"):
        return _plain(annotation.__origin__)
    if origin is tuple or origin is list:
        return f"list of {_plain(parts[0])}s"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "made at start"
    value = field.default
    if value is None:
        return "`auto`" if "_auto" in _validators(field.annotation, field.metadata) else "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int) and "parse_bytes" in _validators(field.annotation, field.metadata):
        return f"`{format_bytes(value)}`"
    if isinstance(value, float) and "parse_seconds" in _validators(field.annotation, field.metadata):
        return f"`{value:g}s`"
    return f"`{value}`" if value not in ((), {}) else "none"


def environment() -> str:
    rows = [f"| `{name}` | {meaning} | {f'`{FIELDS[name]}`' if name in FIELDS else ''} |" for name, meaning in VARIABLES.items()]
    return "\n".join(["| variable | meaning | sets |", "|---|---|---|", *rows])


def honoured(*bodies: type[openai.Body]) -> str:
    """Fields that the endpoints honour, with the endpoints that have them."""
    names = {name: body.model_fields[name] for body in bodies for name in body.model_fields}
    rows = []
    for name, field in names.items():
        where = ["yes" if name in body.model_fields else "" for body in bodies]
        rows.append(f"| `{name}` | {' | '.join(where)} | {field.description or ''} |")
    heads = [
        body.__name__.removesuffix("Request").replace("ChatCompletion", "chat").replace("Completion", "completions") for body in bodies
    ]
    return "\n".join([f"| field | {' | '.join(heads)} | note |", "|---|" + "---|" * (len(bodies) + 1), *rows])


def refused(neutral: openai.Neutral) -> str:
    """Fields that are refused, and the values that are accepted because they ask for nothing."""
    rows = [
        f"| `{name}` | {', '.join(f'`{json.dumps(value)}`' for value in values) or 'only null'} |"
        for name, values in sorted(neutral.items())
    ]
    return "\n".join(["| field | accepted beside null |", "|---|---|", *rows])


def sections() -> dict[str, dict[str, str]]:
    """What goes where: file, name of the part, text."""
    return {
        "configuration.md": {"settings": settings(), "environment": environment()},
        "api.md": {
            "honoured": honoured(openai.ChatCompletionRequest, openai.CompletionRequest),
            "refused-chat": refused(openai.NEUTRAL_CHAT),
            "refused-completions": refused(openai.NEUTRAL_COMPLETION),
            "refused-messages": refused(openai.NEUTRAL_MESSAGE),
        },
    }


def filled(text: str, parts: dict[str, str]) -> str:
    """A document with its parts renewed. Raises ValueError when it lacks a part's marks."""
    for name, part in parts.items():
        begin, end = BEGIN.format(name=name), END.format(name=name)
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the document lacks the marks of {name}: {begin} and {end}")
        text = f"{head}{begin}\n\n{part}\n\n{end}{tail}"
    return text


def main() -> None:
    for file, parts in sections().items():
        path = DOCS / file
        path.write_text(filled(path.read_text(), parts))


if __name__ == "__main__":
    main()
