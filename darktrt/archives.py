"""Arrays that anybody may have written: NumPy's ``.npz`` files, and single arrays as bytes."""

from __future__ import annotations

import json
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from darktrt.errors import DarktrtError, quote
from darktrt.files import TEXT_BYTES, open_input
from darktrt.records import parse_json

_ENCRYPTED = 1
_DAMAGES = (
    *(ValueError, TypeError, SyntaxError, EOFError, OverflowError, MemoryError),
    *(RuntimeError, TokenError, UserWarning, zipfile.BadZipFile, zlib.error),
)
"""What zipfile and NumPy raise at damaged bytes; RuntimeError at deep nesting."""


def read_arrays(path: str | os.PathLike[str], most_bytes: int, advice: str) -> dict[str, NDArray[Any]]:
    """The arrays of a ``.npz`` file by their names.

    The sizes that the archive and the arrays declare are checked before anything is unpacked, and no pickle is read.

    Args:
        most_bytes: the largest size of all arrays together.
        advice: what to do about a damaged file, for errors.

    Raises:
        DarktrtError: the file cannot be read, is larger, or is damaged.
    """
    with open_input(path, most_bytes, advice) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _checked(archive.infolist(), most_bytes)
                return {name: _member(archive, member) for name, member in members.items()}
        except _DAMAGES as error:
            reason = quote(str(error)) or type(error).__name__
            raise DarktrtError(f"{os.fspath(path)}: is damaged ({reason}); {advice}") from error


def _checked(members: list[zipfile.ZipInfo], most_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """The members by the names of their arrays."""
    named = {member.filename.removesuffix(".npy"): member for member in members}
    if len(named) != len(members) or any(not member.filename.endswith(".npy") for member in members):
        raise ValueError("its members are no arrays")
    if any(member.flag_bits & _ENCRYPTED for member in members):
        raise ValueError("it is encrypted")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("it has a compression that NumPy does not write")
    if (total := sum(member.file_size for member in members)) > most_bytes:
        raise ValueError(f"its arrays have {total / 1e6:,.0f} MB, more than {most_bytes / 1e6:,.0f} MB")
    return named


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


def header_array(values: Mapping[str, Any]) -> NDArray[np.uint8]:
    """JSON as the array ``header``, which says in words what the other arrays hold."""
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def header_of(arrays: Mapping[str, NDArray[Any]], where: str, advice: str) -> Any:
    """The JSON of the array ``header``.

    Raises:
        ValueError: there is none.
        DarktrtError: it is damaged; see :func:`darktrt.records.parse_json`.
    """
    if "header" not in arrays or arrays["header"].nbytes > TEXT_BYTES:
        raise ValueError("it has no header")
    return parse_json(arrays["header"].tobytes().decode(), where, advice)


def array_of(arrays: Mapping[str, NDArray[Any]], name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """An array that has this type and shape.

    Raises:
        ValueError: there is none.
    """
    found = arrays.get(name)
    if found is None or found.dtype != dtype or found.shape != shape:
        raise ValueError(f"its '{name}' have another type or shape")
    return found
