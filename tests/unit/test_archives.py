"""Archives of arrays: what they declare is checked before anything is unpacked."""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darktrt.archives import open_archive, write_archive
from darktrt.errors import DarktrtError

NAMES = ("counts", "zeros", "turned")


def _saved(path: Path) -> bytes:
    arrays = {"counts": np.arange(6).reshape(2, 3), "zeros": np.zeros(3, np.float32), "turned": np.ones((2, 3), order="F")}
    write_archive(path, "a.json", '{"größe": 1}', arrays)
    return path.read_bytes()


def _read(path: Path, most_bytes: int = 1000, most_text: int = 100) -> tuple[str, list[Any]]:
    """The text and all arrays."""
    shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "counts": (np.int64, (2, 3)),
        "zeros": (np.float32, (3,)),
        "turned": (np.float64, (2, 3)),
    }
    with open_archive(path, "a.json", NAMES, most_bytes, most_text, "calibrate again") as archive:
        return archive.text, [archive.array(name, *shapes[name]) for name in NAMES]


def _zip(content: bytes, name: str = "counts.npy", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(name, content)
        archive.writestr("a.json", "{}")
    return file.getvalue()


def _npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header.encode() + content


def test_text_and_arrays_come_back(tmp_path: Path) -> None:
    content = _saved(tmp_path / "a.zip")
    text, (counts, zeros, turned) = _read(tmp_path / "a.zip")
    assert text == '{"größe": 1}'
    assert counts.tolist() == [[0, 1, 2], [3, 4, 5]] and zeros.tolist() == [0, 0, 0] and turned.shape == (2, 3)
    counts[0, 0] = 7  # writable
    assert _saved(tmp_path / "b.zip") == content
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None and archive.namelist() == ["a.json", "counts.npy", "zeros.npy", "turned.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "a.zip")["counts"], [[0, 1, 2], [3, 4, 5]])


def test_nothing_is_written_where_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        write_archive(tmp_path / "a.zip", "a.json", "{}", {"counts": np.array([None])})
    with pytest.raises(DarktrtError, match="cannot write"):
        write_archive(tmp_path / "none" / "a.zip", "a.json", "{}", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "dtype", "shape"), [("zeros", np.int64, (3,)), ("zeros", np.float32, (1, 3)), ("ones", np.int64, ())]
)
def test_an_array_is_of_the_type_and_shape_that_are_asked_for(
    tmp_path: Path, name: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> None:
    _saved(tmp_path / "a.zip")
    with (
        pytest.raises(DarktrtError, match=r"is damaged \((its 'zeros' have another type or shape|it has no 'ones')\); x"),
        open_archive(tmp_path / "a.zip", "a.json", NAMES, 1000, 100, "x") as archive,
    ):
        archive.array(name, dtype, shape)


_HEADER = "{'descr': '<f8', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize(
    "content",
    [
        _zip(_npy(_HEADER % "(4000000000,)", bytes(8))),
        _zip(_npy(_HEADER % "(-1,)", bytes(8))),
        _zip(_npy(_HEADER % "(2,)", bytes(8))),
        _zip(_npy(_HEADER % "(1,)", bytes(16))),
        _zip(_npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", bytes(8))),
        _zip(_npy("(" * 5000, bytes(8))),
        _zip(_npy("{'descr': ", bytes(8))),
        _zip(_npy(_HEADER % "(1,)", bytes(8), version=9)),
        _zip(b"no array"),
        _zip(b"", "counts.txt"),
        _zip(_npy(_HEADER % "(1,)", bytes(8)), compression=zipfile.ZIP_BZIP2)[:-40],
        b"no archive",
        b"",
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    with pytest.raises(DarktrtError, match=r"a\.zip: is damaged \(.+\); calibrate again"):
        _read(path, 1 << 40)


@pytest.mark.parametrize("name", ["counts.txt", "more.npy", "zeros.npy"])
def test_members_that_no_such_file_has_are_refused(tmp_path: Path, name: str) -> None:
    """Nor may one be there twice, for readers of archives differ in which they take."""
    _saved(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(name, b"")
    with pytest.raises(DarktrtError, match=r"a\.zip: is damaged \(it has members that no such file has\); calibrate again"):
        _read(tmp_path / "a.zip")


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99), (10, zipfile.ZIP_LZMA)])
def test_encrypted_members_and_other_compressions_are_refused(tmp_path: Path, place: int, value: int) -> None:
    content = bytearray(_saved(tmp_path / "a.zip"))
    content[content.index(b"PK\x01\x02") + place] = value
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DarktrtError, match=r"is damaged \(it (is encrypted|has a compression that darktrt does not write)\)"):
        _read(tmp_path / "a.zip")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "a.zip", "a.json", " " * 2_000_000, {"counts": np.zeros(1 << 20)})
    reads: list[str] = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, member: reads.append(member.filename))
    with pytest.raises(DarktrtError, match=r"its arrays have 8 MB, more than 1 MB"):
        _read(tmp_path / "a.zip", 1_000_000, 2_000_000)
    with pytest.raises(DarktrtError, match=r"its text has 2 MB, more than 1 MB"):
        _read(tmp_path / "a.zip", 9_000_000, 1_000_000)
    assert not reads


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    write_archive(tmp_path / "a.zip", "a.json", "{}", {"counts": np.zeros(1 << 16)})
    content = bytearray((tmp_path / "a.zip").read_bytes())
    start = content.rindex(b"PK\x01\x02")
    content[start + 24 : start + 28] = struct.pack("<I", 128)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DarktrtError, match="is damaged"):
        _read(tmp_path / "a.zip")


@pytest.mark.parametrize(
    "damage", [lambda data, i: data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :], lambda data, i: data[:i]]
)
def test_every_damaged_byte_ends_in_arrays_or_a_sentence(tmp_path: Path, damage: Callable[[bytes, int], bytes]) -> None:
    whole = _saved(tmp_path / "a.zip")
    for place in range(len(whole)):
        (tmp_path / "b.zip").write_bytes(damage(whole, place))
        try:
            _read(tmp_path / "b.zip")
        except DarktrtError:
            pass
