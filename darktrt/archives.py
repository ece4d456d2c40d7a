"""Arrays that anybody may have written: zip files of a text and arrays, and single arrays as bytes."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output, open_input

_ENCRYPTED = 1
_DAMAGES = (
    *(ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError),
    *(RuntimeError, TokenError, UserWarning, zipfile.BadZipFile, zlib.error),
)
"""What zipfile and NumPy raise at damaged bytes; RuntimeError at deep nesting."""


def write_archive(path: str | os.PathLike[str], text_name: str, text: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a text and arrays as a zip file, whole or not at all; the same content makes the same bytes.

    Args:
        text_name: of the text in the archive.

    Raises:
        DarktrtError: the file cannot be written.
    """
    with atomic_output(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(_member_info(text_name), "w") as member:
            member.write(text.encode())
        for name, array in arrays.items():
            with archive.open(_member_info(f"{name}.npy"), "w", force_zip64=True) as member:
                npy.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _member_info(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)  # of 1980, whenever it is written
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


@dataclass(frozen=True)
class Archive:
    """A zip file of a text and arrays, open for reading.

    The sizes that the file and the arrays declare are checked before anything is unpacked, and no pickle is read.
    """

    text: str
    _file: zipfile.ZipFile
    _members: Mapping[str, zipfile.ZipInfo]

    def array(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
        """An array that has this type and shape.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        if name not in self._members:
            raise ValueError(f"it has no '{name}'")
        found = _member(self._file, self._members[name])
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(f"its '{name}' have another type or shape")
        return found


@contextmanager
def open_archive(
    path: str | os.PathLike[str], text_name: str, names: Sequence[str], most_bytes: int, most_text: int, advice: str
) -> Iterator[Archive]:
    """Open what :func:`write_archive` wrote.

    Args:
        text_name: of the text in the archive.
        names: of the arrays that such a file may have.
        most_bytes: the largest size of all arrays together.
        most_text: the largest size of the text.
        advice: what to do about a damaged file, for errors.

    Raises:
        DarktrtError: the file cannot be read, is larger, or is damaged; also where the block raises what damaged arrays raise.
    """
    with open_input(path, most_bytes + most_text, advice) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _checked(archive.infolist(), {text_name, *(f"{name}.npy" for name in names)})
                if text_name not in members:
                    raise ValueError(f"it has no {text_name}")
                text = members.pop(text_name)
                _check_sizes(text, list(members.values()), most_bytes, most_text)
                yield Archive(archive.read(text).decode(), archive, members)
        except _DAMAGES as error:
            reason = quote(str(error)) or type(error).__name__
            raise DarktrtError(f"{os.fspath(path)}: is damaged ({reason}); {advice}") from error


def _checked(members: list[zipfile.ZipInfo], names: Set[str]) -> dict[str, zipfile.ZipInfo]:
    """The members by their names, without the suffix of arrays."""
    if len({member.filename for member in members} & names) < len(members):
        raise ValueError("it has members that no such file has")
    if any(member.flag_bits & _ENCRYPTED for member in members):
        raise ValueError("it is encrypted")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("it has a compression that darktrt does not write")
    return {member.filename.removesuffix(".npy"): member for member in members}


def _check_sizes(text: zipfile.ZipInfo, arrays: list[zipfile.ZipInfo], most_bytes: int, most_text: int) -> None:
    for what, size, most in (
        ("text has", text.file_size, most_text),
        ("arrays have", sum(array.file_size for array in arrays), most_bytes),
    ):
        if size > most:
            raise ValueError(f"its {what} {size / 1e6:,.0f} MB, more than {most / 1e6:,.0f} MB")


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        return _array(file, member.filename)


def parse_array(content: bytes) -> NDArray[Any]:
    """The array of a ``.npy`` file's bytes; no pickle is read.

    Raises:
        ValueError: they are damaged.
    """
    try:
        return _array(BytesIO(content), "the array")
    except _DAMAGES as error:
        raise ValueError(f"an array is damaged: {quote(str(error)) or type(error).__name__}") from error


def _array(file: IO[bytes], name: str) -> NDArray[Any]:
    shape, fortran, dtype = _header(file)
    declared = math.prod(shape) * dtype.itemsize
    content = file.read()  # at most the declared size of the member
    if dtype.hasobject or declared != len(content):
        raise ValueError(f"'{quote(name)}' holds another number of bytes than it declares")
    return np.frombuffer(bytearray(content), dtype).reshape(shape, order="F" if fortran else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of an array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # at a header of Python 2
        shape, fortran, dtype = readers[version](file)
    if any(side < 0 for side in shape):
        raise ValueError("an array with a negative size")
    return shape, fortran, dtype
