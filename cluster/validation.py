"""Configuration sections that check themselves, and errors that name the field, its value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from polymux.transport.errors import ConfigError

MAX_REPORTED = 5
_SECRET = ("security",)  # values that never appear in a message


class Section(BaseModel):
    """One part of the configuration: frozen, every field described, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, data: Any) -> Any:
        """YAML reads a section whose lines are all commented out as null."""
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {k: v for k, v in data.items() if v is not None or k not in fields or not _is_section(fields[k].annotation)}


S = TypeVar("S", bound=Section)


def validated(section: type[S], data: object, *, source: str = "configuration") -> S:
    """Build a section from plain data. Raises ConfigError; its `param` is the first wrong field, dotted."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} must be a mapping of settings, not {type(data).__name__}")
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_explain(section, detail) for detail in found[:MAX_REPORTED]]
        if len(found) > MAX_REPORTED:
            lines.append(f"and {len(found) - MAX_REPORTED} more")
        raise ConfigError(f"{source}: " + "; ".join(lines), param=_dotted(found[0]["loc"])) from None


def _explain(section: type[Section], detail: ErrorDetails) -> str:
    loc = detail["loc"]
    path = _dotted(loc)
    if detail["type"] == "extra_forbidden":
        return f"{path} is not a setting{_nearest(section, loc)}"
    field = _field(section, loc)
    if detail["type"] == "missing":
        return f"{path} is missing; {_described(field)}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")
    if not loc or (_section(section, loc) is not None and detail["type"] == "value_error"):
        return message  # of fields together, which it names
    value = "" if loc and loc[0] in _SECRET else f"={detail['input']!r:.80}"
    return f"{path}{value} {message}; {_described(field)}".rstrip("; ")


def _described(field: FieldInfo | None) -> str:
    if field is None or not field.description:
        return ""
    default = field.get_default()
    has_default = not field.is_required() and field.default_factory is None and not isinstance(default, BaseModel)
    return f"it is {field.description}" + (f" (default {'auto' if default is None else default})" if has_default else "")


def _nearest(section: type[Section], loc: Sequence[int | str]) -> str:
    """The known key that was probably meant: a close spelling here, else the same or a close spelling elsewhere."""
    key = str(loc[-1])
    parent = _section(section, loc[:-1])
    here = list(parent.model_fields) if parent else []
    close = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {_dotted([*loc[:-1], close[0]])}?"
    everywhere = {path.rsplit(".", 1)[-1]: path for path in _paths(section)}
    close = difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {everywhere[close[0]]}?"
    return f"; known here: {', '.join(here)}" if here else ""


def _dotted(loc: Sequence[int | str]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def _field(section: type[Section], loc: Sequence[int | str]) -> FieldInfo | None:
    """The innermost described field on the way to `loc`."""
    found: FieldInfo | None = None
    current: type[Section] | None = section
    for part in loc:
        if current is not None and isinstance(part, str) and part in current.model_fields:
            found = current.model_fields[part]
            current = _section_of(found.annotation)
    return found


def _section(section: type[Section], loc: Sequence[int | str]) -> type[Section] | None:
    current: type[Section] | None = section
    for part in loc:
        if isinstance(part, str):
            field = current.model_fields.get(part) if current else None
            current = _section_of(field.annotation) if field else None
    return current


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type, through optional, tuple and annotated."""
    if _is_section(annotation):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _section_of(part))), None)


def _paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")
