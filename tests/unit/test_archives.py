"""Archives of arrays: what they declare is checked before anything is unpacked."""

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from darktrt.archives import array_of, header_array, header_of, read_arrays
from darktrt.errors import DarktrtError


def _saved(path: Path) -> bytes:
    np.savez_compressed(path, counts=np.arange(6).reshape(2, 3), names=np.array(["a", "bc"]), turned=np.ones((2, 3), order="F"))
    return path.read_bytes()


def _zip(content: bytes, name: str = "counts.npy", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header.encode() + content


def test_arrays_come_back(tmp_path: Path) -> None:
    _saved(tmp_path / "a.npz")
    arrays = read_arrays(tmp_path / "a.npz", 1000, "x")
    assert set(arrays) == {"counts", "names", "turned"}
    assert arrays["counts"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["names"].tolist() == ["a", "bc"]
    assert arrays["turned"].shape == (2, 3)
    arrays["counts"][0, 0] = 7  # writable


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
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(DarktrtError, match=r"a\.npz: is damaged \(.+\); calibrate again"):
        read_arrays(path, 1 << 40, "calibrate again")


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 99), (10, zipfile.ZIP_LZMA)])
def test_encrypted_members_and_other_compressions_are_refused(tmp_path: Path, place: int, value: int) -> None:
    content = bytearray(_saved(tmp_path / "a.npz"))
    content[content.index(b"PK\x01\x02") + place] = value
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DarktrtError, match=r"is damaged \(it (is encrypted|has a compression that NumPy does not write)\)"):
        read_arrays(tmp_path / "a.npz", 1000, "x")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", counts=np.zeros(1 << 20))
    reads: list[str] = []
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, member: reads.append(member.filename))
    with pytest.raises(DarktrtError, match=r"its arrays have 8 MB, more than 1 MB"):
        read_arrays(tmp_path / "a.npz", 1_000_000, "x")
    assert not reads


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", counts=np.zeros(1 << 16))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + 24 : start + 28] = struct.pack("<I", 128)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DarktrtError, match="is damaged"):
        read_arrays(tmp_path / "a.npz", 1000, "x")


@pytest.mark.parametrize(
    "damage", [lambda data, i: data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :], lambda data, i: data[:i]]
)
def test_every_damaged_byte_ends_in_arrays_or_a_sentence(tmp_path: Path, damage: Callable[[bytes, int], bytes]) -> None:
    whole = _saved(tmp_path / "a.npz")
    for place in range(len(whole)):
        (tmp_path / "b.npz").write_bytes(damage(whole, place))
        try:
            read_arrays(tmp_path / "b.npz", 1000, "x")
        except DarktrtError:
            pass


# --- what the arrays of a file of darktrt say ---


def test_the_header_comes_back() -> None:
    values = {"tensors": ["a: b", "größe"], "count": 3}
    assert header_of({"header": header_array(values)}, "a.npz", "x") == values


def test_a_file_without_a_header_it_can_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="it has no header"):
        header_of({"counts": np.zeros(3)}, "a.npz", "x")
    with pytest.raises(DarktrtError, match=r"^a\.npz: is damaged \(it is nested too deeply\); make it again$"):
        header_of({"header": np.frombuffer(b"[" * 100_000, np.uint8)}, "a.npz", "make it again")
    with pytest.raises(ValueError, match="utf-8"):
        header_of({"header": np.array([0xFF], np.uint8)}, "a.npz", "x")
    monkeypatch.setattr("darktrt.archives.TEXT_BYTES", 17)
    assert header_of({"header": header_array({"a": "12345678"})}, "a.npz", "x") == {"a": "12345678"}
    with pytest.raises(ValueError, match="it has no header"):
        header_of({"header": header_array({"a": "123456789"})}, "a.npz", "x")


def test_an_array_is_of_the_type_and_shape_that_are_asked_for() -> None:
    arrays = {"counts": np.zeros((2, 3), np.int64)}
    assert array_of(arrays, "counts", np.int64, (2, 3)) is arrays["counts"]
    for name, dtype, shape in (("zeros", np.int64, (2, 3)), ("counts", np.float64, (2, 3)), ("counts", np.int64, (3, 2))):
        with pytest.raises(ValueError, match=f"its '{name}' have another type or shape"):
            array_of(arrays, name, dtype, shape)
