"""Frozen records from decoded JSON, checked field by field by the types that they declare."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def record(kind: type[Record], values: Any) -> Record:
    """A record of the dataclass ``kind`` from a JSON object.

    Lists become tuples, and nested objects become the records that the fields declare. Fields with defaults may be missing.

    Raises:
        ValueError, TypeError: a field is missing, unknown or of another type, or the record refuses its value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__} is {values!r:.40}")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    for name in values:
        if name not in names:
            raise ValueError(f"unknown field {name!r}")
    return kind(**{name: _value(name, hints[name], value) for name, value in values.items()})


def _value(name: str, hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _optional(name, arguments, value)
    if is_dataclass(hint):
        return record(hint, value)  # type: ignore[arg-type]  # a class
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(name, arguments, value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(name, arguments[1], one) for key, one in value.items()}
    if origin is Literal and value in arguments:
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (hint is float and number) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise ValueError(f"{name!r} is {value!r:.40}")


def _optional(name: str, kinds: tuple[Any, ...], value: Any) -> Any:
    """A value of ``kind | None``."""
    if value is None and type(None) in kinds:
        return None
    (kind,) = (one for one in kinds if one is not type(None))
    return _value(name, kind, value)


def _tuple(name: str, kinds: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
    if kinds[1:] == (...,):
        return tuple(_value(name, kinds[0], one) for one in values)
    if len(values) != len(kinds):
        raise ValueError(f"{name!r} is {values!r:.40}")
    return tuple(_value(name, kind, one) for kind, one in zip(kinds, values, strict=True))
