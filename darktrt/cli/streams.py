"""What the command line prints: readable whatever names hold, and one sentence where it cannot be written."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from darktrt.errors import DarktrtError

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and newline: names in files may hold them, and a terminal obeys them."""

_ESCAPED = "darktrt.escaped"
"""The name of :func:`_escaped` among Python's handlers of what an encoding lacks."""


class ReaderGoneError(Exception):
    """Whoever read standard output, ``head`` for one, has seen enough."""


class Output:
    """Standard output, which takes every text.

    Control characters and what the encoding lacks become JSON's escapes, so that a line of JSON stays one.

    Raises:
        ReaderGoneError, DarktrtError: of ``write`` and ``flush``: it takes no more.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        codecs.register_error(_ESCAPED, _escaped)

    def write(self, text: str) -> int:
        encoding = self._stream.encoding or "utf-8"
        plain = self._plain(text).encode(encoding, _ESCAPED).decode(encoding)
        self._tried(lambda: self._stream.write(plain))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _plain(self, text: str) -> str:
        return _CONTROLS.sub(lambda found: _escapes(found[0]), text)

    def _tried(self, put: Callable[[], object]) -> None:
        try:
            put()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # for what is still buffered
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError from error
        raise DarktrtError(f"cannot write the output: {error.strerror}") from error


class Messages(Output):
    """Standard error, which takes every text as :class:`Output`; what cannot be written is lost, for who could be told?"""

    def __init__(self, stream: Any, escapes: bool = True) -> None:
        super().__init__(stream)
        self._escapes = escapes
        self.unescaped = Messages(stream, escapes=False) if escapes else self
        """For a progress bar, which moves the cursor."""

    def _plain(self, text: str) -> str:
        return super()._plain(text) if self._escapes else text

    def _failed(self, error: OSError) -> None:
        pass


@contextmanager
def readable_streams() -> Iterator[None]:
    """Put :class:`Output` and :class:`Messages` over standard output and error in the block."""
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(stdout), Messages(stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return _escapes(error.object[error.start : error.end]), error.end


def _escapes(characters: str) -> str:
    units = characters.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
