"""JSON of files that anybody may have written, and frozen records from it, checked by the types that they declare."""

from __future__ import annotations

import json
import math
import os
import types
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from darktrt.errors import DarktrtError, quote
from darktrt.files import TEXT_BYTES, read_text

Record = TypeVar("Record")

MOST_MEMORY = 3 << 30
"""The most that the values of a JSON text may take of the memory, in bytes."""

_MEMORY = {"{": 240, "[": 96, ",": 32, '"': 28}
"""About what CPython needs for an object, a list, a value and half a text."""


class Excerpt:
    """Base of records of only some fields of a JSON object, as of another program's file; its other fields are skipped."""


def read_json(path: str | os.PathLike[str], advice: str, most_bytes: int = TEXT_BYTES) -> Any:
    """Decode the JSON of a file; see :func:`parse_json`.

    Raises:
        DarktrtError: the file cannot be read, is larger than ``most_bytes``, or holds no such JSON.
    """
    return parse_json(read_text(path, most_bytes, advice), os.fspath(path), advice)


def parse_json(text: str, where: str, advice: str) -> Any:
    """Decode JSON whose numbers are finite and fit 64 bits, and whose strings can be written as UTF-8.

    Args:
        where: the file, for errors.
        advice: what to do about it, for errors.

    Raises:
        DarktrtError: it is none, or it would take more than :data:`MOST_MEMORY`.
    """
    if (memory := sum(cost * text.count(mark) for mark, cost in _MEMORY.items())) > MOST_MEMORY:
        needed = f"its values would take {memory / 1e9:.1f} GB of memory, and may take {MOST_MEMORY / 1e9:.1f} GB"
        raise DarktrtError(f"{where}: {needed}; {advice}")
    try:
        return decode_json(text)
    except ValueError as error:
        raise DarktrtError(f"{where}: is damaged or no JSON ({quote(str(error))}); {advice}") from error


def decode_json(text: str) -> Any:
    """The values of a JSON: finite numbers, integers of 64 bits, texts of whole characters.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_refused)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text has half a character, a lone surrogate") from error
    return values


def read_record(
    kind: type[Record],
    path: str | os.PathLike[str],
    advice: str,
    most_bytes: int = TEXT_BYTES,
    file_format: str | int | None = None,
) -> Record:
    """The record of a JSON file.

    Args:
        kind: a dataclass.
        path: the file.
        advice: what to do about a file that holds no such record, for errors.
        most_bytes: the largest size of the file.
        file_format: what the file must have as its ``format``; None for files without one.

    Raises:
        DarktrtError: the file cannot be read, is larger, or holds no such record.
    """
    values = read_json(path, advice, most_bytes)
    if file_format is not None and (not isinstance(values, dict) or values.get("format") != file_format):
        own = quote(repr(values.get("format") if isinstance(values, dict) else None), 40)
        raise DarktrtError(
            f"{os.fspath(path)}: is of another kind or version (its format is {own}, not {file_format!r}); {advice}"
        )
    try:
        return record(kind, values)
    except (ValueError, TypeError, DarktrtError) as error:
        raise DarktrtError(f"{os.fspath(path)}: is damaged ({error}); {advice}") from error


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= (value := int(digits)) < 1 << 63:
        raise ValueError(f"{quote(digits, 24)} is beyond 64 bits")
    return value


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{quote(digits, 24)} is no finite number")
    return value


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no finite number")


def finite(value: Any) -> Any:
    """The value with None for NaN and infinite numbers, which JSON does not have, and lists for tuples."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record(kind: type[Record], values: Any) -> Record:
    """A record of the dataclass ``kind`` from a JSON object.

    Lists become tuples, and nested objects become the records that the fields declare. Fields with defaults may be missing.

    Raises:
        ValueError, TypeError: a field is missing, unknown or of another type, or the record refuses its value.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{kind.__name__.strip('_')} is {quote(repr(values), 40)}")
    hints, needed = _fields(kind)  # type: ignore[arg-type]  # a class is hashable
    if issubclass(kind, Excerpt):
        values = {name: values[name] for name in hints if name in values}
    if (unknown := next((name for name in values if name not in hints), None)) is not None:
        raise ValueError(f"unknown field '{quote(unknown)}'")
    if missing := next((name for name in needed if name not in values), None):
        raise ValueError(f"'{missing}' is missing")
    return kind(**{name: _value(name, hints[name], value) for name, value in values.items()})


@cache
def _fields(kind: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The types by name, and the names of those that have no default."""
    hints = get_type_hints(kind)
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]
    return {one.name: hints[one.name] for one in fields(kind)}, tuple(needed)


def _value(name: str, hint: Any, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Any or (hint is float and number) or (isinstance(hint, type) and type(value) is hint):
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(name, arguments, value)
    if is_dataclass(hint):
        return record(hint, value)  # type: ignore[arg-type]  # a class
    if origin is tuple and isinstance(value, list | tuple):
        return _tuple(name, arguments, value)
    if origin is dict and isinstance(value, dict):
        return {str(key): _value(name, arguments[1], one) for key, one in value.items()}
    if origin is Literal and value in arguments:
        return value
    raise ValueError(f"{name!r} is {quote(repr(value), 40)}")


def _one_of(name: str, kinds: tuple[Any, ...], value: Any) -> Any:
    """A value of ``kind | None``, or of one of several types that are no records."""
    if value is None and type(None) in kinds:
        return None
    if type(value) in kinds:
        return value
    return _value(name, next(one for one in kinds if one is not type(None)), value)


def _tuple(name: str, kinds: tuple[Any, ...], values: Any) -> tuple[Any, ...]:
    if kinds[1:] == (...,):
        return tuple(_value(name, kinds[0], one) for one in values)
    if len(values) != len(kinds):
        raise ValueError(f"{name!r} is {quote(repr(values), 40)}")
    return tuple(_value(name, kind, one) for kind, one in zip(kinds, values, strict=True))
