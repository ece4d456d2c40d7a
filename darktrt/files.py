"""Input files that are regular and small enough, outputs that are written whole or not at all, and the cache folder.

What is unfinished lies under a hidden name beside its target and is locked by :func:`fcntl.flock` while its process lives. The
kernel frees the lock of a process however it ends, so the next run for the same target finds what a killed one left, and
removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from darktrt.errors import DarktrtError

TEXT_BYTES = 64 << 20
"""The largest text file that is read as a whole."""

_NAME_BYTES = 180
"""The longest name of an output that its temporary name repeats; file systems allow 255 bytes."""

_AT_ONCE = 16
"""How many runs may write one output at the same time; each has a temporary name of its own."""


def cache_folder() -> Path:
    """The folder of everything that darktrt keeps between runs: timing caches, plugin libraries, TensorRT's headers.

    Raises:
        DarktrtError: the user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darktrt"
    except RuntimeError as error:
        raise DarktrtError("there is no home folder to keep files in; set XDG_CACHE_HOME to a folder") from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        DarktrtError: it cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:
        raise DarktrtError(f"{os.fspath(path)}: cannot make this folder: {_reason(error)}; choose another") from error


@contextmanager
def one_process_at_a_time(lock: str | os.PathLike[str]) -> Iterator[None]:
    """Wait until no other process is in a block with this lock file, whose folder is made where it is missing.

    Raises:
        DarktrtError: the file cannot be made.
    """
    make_folder(Path(lock).parent)
    try:
        descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise DarktrtError(f"{os.fspath(lock)}: cannot write: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_sent: dict[str, tuple[bytes, int]] = {}
"""The content of files that are not read from disk, by their paths, and in how many blocks of :func:`sent_files`."""
_sending = threading.Lock()


@contextmanager
def sent_files(contents: Mapping[str, bytes]) -> Iterator[None]:
    """In the block, all threads find these files under their paths through :func:`open_input`, whatever the disk has there.

    Another machine has sent them along with the work.
    """
    with _sending:
        for path, content in contents.items():
            _sent[path] = content, _sent.get(path, (b"", 0))[1] + 1
    try:
        yield
    finally:
        with _sending:
            for path in contents:
                content, blocks = _sent.pop(path)
                if blocks > 1:
                    _sent[path] = content, blocks - 1


@contextmanager
def open_input(path: str | os.PathLike[str], most_bytes: int | None = None, advice: str = "") -> Iterator[BinaryIO]:
    """Open a regular file to read its bytes; a pipe or a device, which may never end, is refused without waiting for it.

    Args:
        most_bytes: the largest size that is accepted.
        advice: what to do about a file that cannot be read, for the message.

    Raises:
        DarktrtError: there is no such file, it may not be read, is not regular, or is larger.
    """
    if sent := _sent.get(str(path)):
        _check_size(len(sent[0]), path, most_bytes)
        yield BytesIO(sent[0])
        return
    then = f"; {advice}" if advice else ""
    try:
        _check_regular(os.stat(path), path, most_bytes)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise DarktrtError(f"{os.fspath(path)}: cannot read: {_reason(error)}{then}") from error
    with open(descriptor, "rb") as file:
        _check_regular(os.fstat(descriptor), path, most_bytes)
        try:
            yield file
        except OSError as error:
            if error.filename is not None:  # of another file
                raise
            raise DarktrtError(f"{os.fspath(path)}: cannot read: {_reason(error)}{then}") from error


def check_input(path: str | os.PathLike[str], most_bytes: int | None = None, advice: str = "") -> None:
    """See that a library, which opens ``path`` itself, will find a regular file that may be read.

    Raises:
        DarktrtError: as :func:`open_input`.
    """
    with open_input(path, most_bytes, advice):
        pass


def read_bytes(path: str | os.PathLike[str], most_bytes: int, advice: str = "") -> bytes:
    """The content of a regular file.

    Raises:
        DarktrtError: as :func:`open_input`.
    """
    with open_input(path, most_bytes, advice) as file:
        return file.read()


def read_text(path: str | os.PathLike[str], most_bytes: int = TEXT_BYTES, advice: str = "") -> str:
    """The text of a regular file in UTF-8; a byte order mark is dropped.

    Raises:
        DarktrtError: as :func:`open_input`, or the bytes are no UTF-8.
    """
    content = read_bytes(path, most_bytes, advice)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        then = advice or "save it as UTF-8"
        raise DarktrtError(f"{os.fspath(path)}: is no UTF-8 text (byte {error.start}); {then}") from error


def _reason(error: Exception) -> str:
    """The system's words about a file, without its name."""
    return getattr(error, "strerror", None) or str(error)


def _check_regular(status: os.stat_result, path: str | os.PathLike[str], most_bytes: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise DarktrtError(f"{os.fspath(path)}: is {kind}; name a file")
    _check_size(status.st_size, path, most_bytes)


def _check_size(bytes_: int, path: str | os.PathLike[str], most_bytes: int | None) -> None:
    if most_bytes is not None and bytes_ > most_bytes:
        size = f"has {bytes_:,} bytes, and such a file may have {most_bytes:,}"
        raise DarktrtError(f"{os.fspath(path)}: {size}; is it the right file?")


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` when the block ends well, delete it otherwise.

    Temporary files of killed runs for the same ``path`` are removed first.

    Raises:
        DarktrtError: the folder is missing or not writable, the disk is full, or ``path`` is a folder or a device.
    """
    target = Path(path)
    _check_target(target, path)
    with _unfinished(target, _new_file) as temporary:
        yield temporary
        temporary.replace(target)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], unfinished: Path | None = None) -> Iterator[Path]:
    """Yield a new folder beside ``path``; it takes the place of ``path`` when the block ends well, and vanishes otherwise.

    Missing parents are made. Temporary folders of killed runs for the same ``path`` are removed first; where one was killed
    between the two renames, the old folder comes back.

    Args:
        unfinished: the name beside which the new folder lies instead, in a folder of the same file system; no other ``path``
            may have it.

    Raises:
        DarktrtError: the place is not writable, the disk is full, or ``path`` is a file.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_dir():
            raise DarktrtError(f"{target}: is a file; name a folder to write")
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise DarktrtError(f"{target}: cannot write: {_reason(error)}") from error
    with _unfinished(target, _new_folder, unfinished) as temporary:
        yield temporary
        _replace_folder(target, temporary)


def abandoned(names: Path) -> list[Path]:
    """What killed runs left beside the names of a pattern, such as ``folder / "*"``."""
    return [path for path in sorted(names.parent.glob(f".{names.name}.darktrt-*")) if _is_abandoned(path)]


def _is_abandoned(path: Path) -> bool:
    """Whether no process holds the lock of something unfinished."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _lock(descriptor) is True
    finally:
        os.close(descriptor)


def _replace_folder(target: Path, new: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = _aside(new)
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor)  # so that no other run takes it for a stray
        target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        _remove(old)
        os.close(descriptor)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for intermediate files; it vanishes when the block ends, and at the next run where this one is killed."""
    with _unfinished(Path(tempfile.gettempdir()) / f"darktrt-{os.getuid()}", _new_private_folder) as folder:
        yield folder


@contextmanager
def unfinished_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside ``path`` for files that are moved to their places when all are whole; it vanishes when the block ends.

    Raises:
        DarktrtError: the place is not writable, or the disk is full.
    """
    with _unfinished(Path(path), _new_folder) as folder:
        yield folder


@contextmanager
def _unfinished(target: Path, create: Callable[[Path], int], beside: Path | None = None) -> Iterator[Path]:
    """A locked temporary file or folder beside ``target``, which vanishes unless the block renames it."""
    with ExitStack() as held:
        try:
            temporary = _claimed(target, _temporaries(beside or target), create, held)
        except (OSError, ValueError) as error:
            raise DarktrtError(
                f"{target}: cannot write: {_reason(error)}; does the folder exist, and may you write there?"
            ) from error
        try:
            yield temporary
        except OSError as error:
            raise DarktrtError(f"{target}: cannot write: {_reason(error)}; nothing was kept") from error


def _claimed(target: Path, names: list[Path], create: Callable[[Path], int], held: ExitStack) -> Path:
    """The first of a target's temporary names that no other run has; ``held`` frees it."""
    for name in names:
        _remove_stray(name)
        _remove_stray(_aside(name), instead=target)
    for name in names:
        if held.enter_context(_claim(name, create)):
            return name
    unfinished = f"if there are none, remove the unfinished files such as {names[0]}"
    raise DarktrtError(f"{target}: cannot write: {_AT_ONCE} other runs write it; {unfinished}")


@contextmanager
def _claim(path: Path, create: Callable[[Path], int]) -> Iterator[bool]:
    """Create and lock what a temporary name stands for; yield whether no other run has it. An interrupt leaves nothing."""
    descriptor = -1
    try:
        with suppress(FileExistsError):
            descriptor = create(path)
        yield descriptor >= 0 and _lock(descriptor) is not False and _same(descriptor, path)  # another may take it for a stray
    finally:
        if descriptor < 0:
            _remove_stray(path)  # an interrupt may come between the creation and its descriptor
        else:
            if _same(descriptor, path):
                _remove(path)
            os.close(descriptor)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path, mode: int = 0o777) -> int:
    path.mkdir(mode)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _new_private_folder(path: Path) -> int:
    return _new_folder(path, 0o700)


def _lock(descriptor: int) -> bool | None:
    """Whether nobody else holds the lock, which is taken then; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether a path still names what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _temporaries(target: Path) -> list[Path]:
    """The temporary names of a target, one for each run that may write it at the same time.

    They are few and fixed, so that what killed runs left is found without a search of the folder, which may be large.
    """
    name, suffix = target.name, target.suffix
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    if len(os.fsencode(suffix)) > 20:
        suffix = ""
    return [target.parent / f".{name}.darktrt-{number}{suffix}" for number in range(_AT_ONCE)]


def _aside(temporary: Path) -> Path:
    """The name of the folder that a new one replaces, while it does."""
    return temporary.with_name(f"{temporary.name}.old")


def _remove_stray(path: Path, instead: Path | None = None) -> None:
    """Remove what a killed run left under a temporary name; where ``instead`` is missing, it becomes that."""
    with suppress(OSError):  # mostly there is nothing
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not _lock(descriptor) or not _same(descriptor, path):
                return
            if instead and not instead.exists():
                path.rename(instead)
            else:
                _remove(path)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, link or folder if it is there, and also where Ctrl-C comes meanwhile."""
    try:
        _try_to_remove(path)
    except KeyboardInterrupt:
        _try_to_remove(path)
        raise


def _try_to_remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


class _NotWrittenError(Exception):
    """Leaves an output's block; nothing is written then."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """See, before long work, that :func:`atomic_output` could write ``path``; what is there stays.

    Raises:
        DarktrtError: as there.
    """
    with suppress(_NotWrittenError), atomic_output(path):
        raise _NotWrittenError


def _check_target(target: Path, path: str | os.PathLike[str]) -> None:
    """Refuse an output that is no file and could not become one."""
    try:
        if target.is_dir() or str(path).endswith(os.sep):
            raise DarktrtError(f"{path}: is a folder; name a file to write")
        if target.exists() and not target.is_file():
            raise DarktrtError(f"{target}: is a device, which would be replaced; name a file to write")
    except (OSError, ValueError) as error:
        raise DarktrtError(f"{target}: cannot write: {_reason(error)}") from error


def keep_inputs(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse an output that is one of the inputs (or another output), or a link to one.

    Raises:
        DarktrtError: it is.
    """
    if any(path and os.path.realpath(output) == os.path.realpath(path) for path in inputs):
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
    """Hexadecimal SHA-256 of a regular file.

    Raises:
        DarktrtError: as :func:`open_input`.
    """
    digest = hashlib.sha256()
    with open_input(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
