"""Output files that are written whole or not at all, the checks of outputs before long work, and the cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from darktrt.errors import DarktrtError


def cache_folder() -> Path:
    """The folder of everything that darktrt keeps between runs: timing caches, plugin libraries, TensorRT's headers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darktrt"


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends well, delete it otherwise.

    Raises:
        DarktrtError: the folder is missing or not writable, the disk is full, or ``path`` is a folder or a device.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{token_hex(4)}{target.suffix}"
    try:  # around the creation too, so that Ctrl-C at any moment leaves nothing
        _create(temporary, path)
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise DarktrtError(f"{target}: cannot write: {error.strerror or error}; nothing was kept") from error
    finally:
        with suppress(OSError):  # there may be no such folder
            temporary.unlink()


class _NotWrittenError(Exception):
    """Leaves an output's block; nothing is written then."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before long work, that :func:`atomic_output` could write ``path``; what is there stays.

    Raises:
        DarktrtError: as there.
    """
    with suppress(_NotWrittenError), atomic_output(path):
        raise _NotWrittenError


def _create(temporary: Path, path: str | os.PathLike[str]) -> None:
    """Make an empty file beside ``path``, if that can be written."""
    target = Path(path)
    try:
        if target.is_dir() or str(path).endswith(os.sep):
            raise DarktrtError(f"{path}: is a folder; name a file to write")
        if target.exists() and not target.is_file():
            raise DarktrtError(f"{target}: is a device, which would be replaced; name a file to write")
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise DarktrtError(
            f"{target}: cannot write: {error.strerror}; does the folder exist, and may you write there?"
        ) from error


def keep_inputs(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse an output that is one of the inputs (or another output), or a link to one.

    Raises:
        DarktrtError: it is.
    """
    if any(path and Path(output).resolve() == Path(path).resolve() for path in inputs):
        raise DarktrtError(f"{output}: is given twice and would be overwritten; choose another output")


def check_outputs(outputs: Iterable[str | os.PathLike[str] | None], inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """See, before any work, that the files asked for can be written, and that none of them is an input or another of them.

    Raises:
        DarktrtError: one is, or cannot be written.
    """
    kept = list(inputs)
    for output in outputs:
        if output:
            keep_inputs(output, *kept)
            check_writable(output)
            kept.append(output)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
