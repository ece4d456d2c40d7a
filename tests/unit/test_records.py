"""JSON that anybody may have written ends in a value that the program can rely on, or in a sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from darktrt import records
from darktrt.errors import DarktrtError
from darktrt.records import Excerpt, finite, parse_json, read_json, read_record, record


@dataclass(frozen=True)
class _Box:
    sides: tuple[int, int]
    name: str | None = None
    score: float = 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("1e999", "1e999 is no finite number"),
        ("1" * 5000, r"1{21}\.\.\. is beyond 64 bits"),
        ("9223372036854775808", "is beyond 64 bits"),
        ("-9223372036854775809", "is beyond 64 bits"),
        (r'"\ud800"', "lone surrogate"),
        (r'{"\uDC00": 1}', "lone surrogate"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_json_that_cannot_be_relied_on_is_refused(text: str, reason: str) -> None:
    with pytest.raises(DarktrtError, match=rf"^file\.json: is damaged.*{reason}.*; make it again$"):
        parse_json(text, "file.json", "make it again")


def test_values_come_through() -> None:
    text = r'{"a": [1, 2.5, -9223372036854775808, 9223372036854775807, true, null, "\u00e4\ud83d\ude00"]}'
    assert parse_json(text, "f", "x") == {"a": [1, 2.5, -(2**63), 2**63 - 1, True, None, "ä😀"]}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text('{"sides": [1, 2], "score": 3}')
    assert read_record(_Box, path, "x") == _Box((1, 2), None, 3)
    with pytest.raises(DarktrtError, match="such a file may have 8"):
        read_json(path, "x", most_bytes=8)
    path.write_text('{"sides": [1, 2.5]}')
    with pytest.raises(DarktrtError, match=r"box\.json: is damaged \('sides' is 2\.5\); make it again"):
        read_record(_Box, path, "make it again")


@pytest.mark.parametrize(
    "values", [[], 3, None, {"sides": 1}, {"sides": [1]}, {"sides": [1, True]}, {"sides": [1, 2], "x": 1}, {}]
)
def test_other_values_are_refused(values: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        record(_Box, values)


def test_a_field_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"^'sides' is missing$"):
        record(_Box, {"name": "a"})


def test_a_field_without_a_name_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"^unknown field ''$"):
        record(_Box, {"sides": [1, 2], "": 1})


def test_a_sentence_quotes_at_most_a_line() -> None:
    with pytest.raises(ValueError, match=r"^unknown field 'x{77}\.\.\.'$"):
        record(_Box, {"x" * 100_000: 1})


@dataclass(frozen=True)
class _Part(Excerpt):
    """Some fields of another program's object."""

    id: int | str
    box: _Box | None = None
    flag: int | bool = 0
    anything: Any = None


def test_an_excerpt_skips_other_fields() -> None:
    assert record(_Part, {"id": "a", "other": [1], "flag": True}) == _Part("a", None, True)
    assert record(_Part, {"id": 7, "box": {"sides": [1, 2]}, "anything": {"x": [None]}}) == _Part(
        7, _Box((1, 2)), anything={"x": [None]}
    )
    for values in ({"id": None}, {"id": 0.5}, {"id": True}, {"id": []}, {"id": 1, "flag": 0.5}, {"id": 1, "box": 2}):
        with pytest.raises(ValueError, match=" is "):
            record(_Part, values)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"^'sides' is missing$"):
        record(_Box, {"name": "a"})
    with pytest.raises(ValueError, match=r"^'id' is missing$"):
        record(_Part, {"flag": 1})


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, own in (('{"format": 2}', "2"), ('{"format": true}', "True"), ("[]", "None"), ('{"sides": [1, 2]}', "None")):
        path.write_text(text)
        with pytest.raises(DarktrtError, match=rf"a\.json: is of another kind or version \(its format is {own}, not 3\); x"):
            read_record(_Box, path, "x", file_format=3)


def test_json_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MOST_MEMORY", 100_000)
    for text in ("[" + "[]," * 1000 + "0]", "[" + "{}," * 400 + "0]", "[" + "1," * 3200 + "0]", "[" + '"ab",' * 1200 + "0]"):
        with pytest.raises(DarktrtError, match=r"^f: its values would take 0\.0 GB of memory, and may take 0\.0 GB; x$"):
            parse_json(text, "f", "x")
    assert len(parse_json('"' + "a" * 1_000_000 + '"', "f", "x")) == 1_000_000


def test_numbers_that_json_lacks_become_null() -> None:
    """At any depth; all else stays, and tuples become lists."""
    values = {"a": (1.5, float("nan"), float("inf"), [-float("inf"), 3, 0.0]), "b": {"c": True, "d": None, "e": "nan"}}
    assert finite(values) == {"a": [1.5, None, None, [None, 3, 0.0]], "b": {"c": True, "d": None, "e": "nan"}}
    assert finite(2.5) == 2.5 and finite(float("nan")) is None


@dataclass(frozen=True)
class _Kinds:
    """Of every type that a field may have."""

    kind: Literal["a", "b"]
    table: dict[str, int]
    rows: tuple[_Box, ...] = ()
    pair: tuple[int, str] = (0, "")
    part: float | None = None


def test_fields_of_every_type() -> None:
    values = {"kind": "b", "table": {"x": 1}, "rows": [{"sides": [1, 2]}], "pair": [3, "y"], "part": 2}
    assert record(_Kinds, values) == _Kinds("b", {"x": 1}, (_Box((1, 2)),), (3, "y"), 2)
    for name, value in (
        ("kind", "c"),
        ("table", {"x": "1"}),
        ("table", [1]),
        ("rows", [{"sides": [1]}]),
        ("rows", {"sides": [1, 2]}),
        ("pair", [3]),
        ("pair", ["y", 3]),
        ("pair", [3, "y", 4]),
        ("part", "2"),
        ("part", True),
    ):
        with pytest.raises(ValueError, match=r".+ is .+"):
            record(_Kinds, {**values, name: value})
