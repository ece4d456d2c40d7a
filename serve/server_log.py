"""The log of a server process: read at once, so that it never holds the server up, and kept in memory and in a file."""

from __future__ import annotations

import os
import stat
from collections import deque
from io import FileIO
from queue import Full, Queue
from threading import Thread
from typing import IO

from darktrt.errors import DarktrtError
from darktrt.progress import LOGGER

_LINES_KEPT = 400
_LINE_BYTES = 16 << 10
"""A longer line counts as several."""

_WAITING = 10_000
"""Most lines that wait for the file; more are dropped."""


class ServerLog:
    """What a server writes, over all its starts; to be closed.

    One thread reads, and another one writes the file: a disk that is full or slow costs lines of the file, and nothing else.

    Args:
        path: the file of the log, which is emptied first; None for memory alone.

    Raises:
        DarktrtError: the file cannot be written, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES_KEPT)
        """The last ones of the latest process."""
        self._path = path
        self._file = None if path is None else _open(path)
        self._waiting: Queue[str | None] = Queue(_WAITING)
        self._lost = 0
        self._failing = False
        if self._file:
            self._writer = Thread(target=self._write_lines, args=(self._file,), daemon=True)
            self._writer.start()

    def follow(self, stream: IO[str]) -> None:
        """Read the stream of another process in a thread until it ends."""
        self.lines.clear()
        Thread(target=self._read, args=(stream,), daemon=True).start()

    def close(self) -> None:
        """Write what waits, as far as that takes no longer than two seconds."""
        if self._file is None:
            return
        _put(self._waiting, None)
        self._writer.join(2)
        if not self._writer.is_alive():
            self._file.close()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in iter(lambda: stream.readline(_LINE_BYTES), ""):
                self.lines.append(line.rstrip("\n"))
                if self._file and not _put(self._waiting, line):
                    self._lost += 1

    def _write_lines(self, file: FileIO) -> None:
        while (line := self._waiting.get()) is not None:
            lost = self._lost
            if self._write(file, f"({lost} lines were lost here)\n{line}" if lost else line):
                self._lost -= lost
            else:
                self._lost += 1

    def _write(self, file: FileIO, text: str) -> bool:
        """Whether the file took the text; the first failure in a row is reported."""
        rest = text.encode(errors="replace")
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            if not self._failing:
                LOGGER.warning(f"{self._path}: cannot write the log: {error.strerror}; the server goes on, and lines are lost")
            self._failing = True
        else:
            self._failing = False
        return not self._failing


def _put(queue: Queue[str | None], line: str | None) -> bool:
    """Add a line, if there is room."""
    try:
        queue.put_nowait(line)
    except Full:
        return False
    return True


def _open(path: str | os.PathLike[str]) -> FileIO:
    try:
        file = FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666), "wb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DarktrtError(f"{os.fspath(path)}: cannot write the log: {reason}", "log") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DarktrtError(f"{os.fspath(path)}: is a pipe or device, which could hold the server up; name a file", "log")
    file.truncate(0)
    return file
