"""The base of all settings: what a setting allows, and errors that say it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexkv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from pydantic.fields import FieldInfo

_MAX_SHOWN = 80  # characters of a value
_MAX_LISTED = 20  # problems of one error
_MAX_BITS = 256  # a number beyond is not worth its digits


class Problem(NamedTuple):
    """What is wrong with ``fields``: the text goes on after their names."""

    fields: tuple[str, ...]
    text: str


class InvalidError(ConfigError):
    """Settings of one section that can't be used; ``problems`` has Python's names."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(str(listed((f"{' and '.join(p.fields)} {p.text}" for p in problems), "")))
        self.problems = problems


class Settings(BaseModel):
    """Frozen and strict: no text for a number, no number for a truth value, no unknown key.

    Raises:
        InvalidError: all that is wrong, at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    if not TYPE_CHECKING:  # type checkers go on seeing the fields as arguments

        def __init__(self, **values: object) -> None:
            problems = _refusals(type(self), values)
            try:
                super().__init__(**values)
            except ValidationError as error:
                problems += _impossible(type(self), values, error)
            else:
                problems += self._conflicts()
            if problems:
                raise InvalidError(problems)

    def _conflicts(self) -> list[Problem]:
        """What is wrong with values that are fine each for itself."""
        return []


def setting(
    meaning: str,
    *,
    default: object,
    allowed: str = "",
    later: tuple[object, ...] = (),
    secret: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A field of ``Settings``.

    ``allowed``: what to say of its values, where type and limits don't; ``later``: values that
    are known, but not in this version; ``secret``: never shown, neither in an error nor a repr.
    """
    extra: dict[str, Any] = {"allowed": allowed, "later": list(later), "secret": secret}
    return Field(
        default=default,
        description=meaning,
        repr=not secret,
        json_schema_extra=extra,
        ge=ge,
        gt=gt,
        le=le,
        lt=lt,
    )


def allowed_values(field: FieldInfo) -> str:
    """What a field may be, in words."""
    extra = _extra(field)
    if extra["allowed"]:
        return str(extra["allowed"])
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in _kinds(field)]
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    if bool in kinds:
        choices = (True, False)
    if choices:
        *most, last = [shown(choice) for choice in choices if choice not in extra["later"]]
        return f"{', '.join(most)} or {last}" if most else last
    if int in kinds:
        return f"a whole number, {_range(field)}"
    if float in kinds:
        return f"a number, {_range(field)}"
    return "a text, not empty" if str in kinds else f"an instance of {kinds[0].__name__}"


def nearest(key: str, *names: Mapping[str, str] | Collection[str]) -> str:
    """What to try instead of ``key``: the nearest of the first ``names`` that has a near one.

    Where the names are a mapping, its keys are compared, and its values are proposed.
    """
    tables = [
        known if isinstance(known, Mapping) else {name: name for name in known} for known in names
    ]
    for cutoff in (1.0, 0.6):  # the very same word elsewhere is nearer than a similar one here
        for proposals in tables:
            if match := difflib.get_close_matches(key[:_MAX_SHOWN], proposals, 1, cutoff):
                return f"did you mean {proposals[match[0]]}?"
    return f"known are {', '.join(sorted(tables[0]))}"


def listed(problems: Iterable[str], source: str) -> ConfigError:
    """One error for all ``problems``."""
    lines = list(dict.fromkeys(problems))
    prefix = f"{source}: " if source else ""
    if len(lines) == 1:
        return ConfigError(prefix + lines[0])
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    head = f"{prefix}{len(lines)} settings can't be used:"
    return ConfigError("\n  ".join([head, *lines[:_MAX_LISTED], *more]))


def shown(value: object) -> str:
    """``value`` as a file has it, on one short line, without credentials of an address."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"a number of {value.bit_length()} bits"
    plain = isinstance(value, str | bool | int | float | None)
    text = re.sub("//[^@]*@", "//...@", json.dumps(value) if plain else repr(value))
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def shown_key(key: object) -> str:
    """``key`` as part of a path of keys."""
    return shown(key)[1:].removesuffix('"') if isinstance(key, str) else shown(key)


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), "every setting is made by setting()"
    return extra


def _kinds(field: FieldInfo) -> list[Any]:
    optional = isinstance(field.annotation, UnionType) or get_origin(field.annotation) is Union
    return [*get_args(field.annotation)] if optional else [field.annotation]


def _range(field: FieldInfo) -> str:
    limits = {
        name: getattr(part, name)
        for part in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if hasattr(part, name)
    }
    if "ge" in limits and "le" in limits:
        return f"{limits['ge']} to {limits['le']}"
    low = f"{limits['ge']} <= x" if "ge" in limits else f"{limits['gt']} < x"
    return f"{low} <= {limits['le']}" if "le" in limits else f"{low} < {limits['lt']}"


def _refusals(settings: type[BaseModel], values: Mapping[str, object]) -> list[Problem]:
    problems = []
    for name, field in settings.model_fields.items():
        value = values.get(name)
        if any(type(value) is type(later) and value == later for later in _extra(field)["later"]):
            text = f"is {shown(value)}: not in this version; it must be {allowed_values(field)}"
            problems.append(Problem((name,), text))
    return problems


def _impossible(
    settings: type[BaseModel], values: Mapping[str, object], error: ValidationError
) -> list[Problem]:
    problems = []
    details = {str(detail["loc"][0]): detail for detail in error.errors()}
    for name, detail in details.items():
        field = settings.model_fields.get(name)
        if field is None:
            hint = nearest(name, list(settings.model_fields))
            problems.append(Problem((name,), f"is not a known key: {hint}"))
        elif isinstance(inner := detail.get("ctx", {}).get("error"), InvalidError):
            problems += [
                Problem(tuple(f"{name}.{f}" for f in p.fields), p.text) for p in inner.problems
            ]
        elif _extra(field)["secret"]:
            problems.append(Problem((name,), f"must be {allowed_values(field)}"))
        else:
            text = f"is {shown(values[name])}: it must be {allowed_values(field)}"
            problems.append(Problem((name,), text))
    return problems
