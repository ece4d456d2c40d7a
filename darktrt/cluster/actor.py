"""The process on a node that holds a worker: its methods are called by the driver, through Ray."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from darktrt.errors import DarktrtError
from darktrt.files import sent_files
from darktrt.parallel import Worker, images_of
from darktrt.progress import LOGGER


@dataclass(frozen=True)
class Job:
    """What every worker needs."""

    make_worker: Callable[[], Worker[Any, Any]]
    files: Mapping[str, bytes]
    """The content of files that it reads, by their paths."""
    images_are_sent: bool
    """Else they are read from a folder that all nodes share."""
    folder: str
    """The current one of the driver, for relative paths."""


@dataclass(frozen=True)
class Outcome:
    """What became of a group."""

    result: Any
    failed: bool
    """``result`` is the sentence of a :class:`DarktrtError` and its argument."""
    notes: Sequence[tuple[int, str]]
    """Levels and texts of what was logged meanwhile."""


class Actor:
    """A worker in a process of its own; several threads may call :meth:`work`.

    It is made at once; :meth:`open` loads the model.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: Worker[Any, Any] | None = None
        self._notes = _Notes()
        with suppress(OSError):  # this node does not have it
            os.chdir(job.folder)
        LOGGER.addHandler(self._notes)
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False

    def open(self) -> Outcome:
        """Make the worker."""

        def make() -> None:
            self._worker = self._job.make_worker()

        with sent_files(self._job.files):
            return self._outcome(make)

    def work(self, group: Sequence[Any], contents: Mapping[str, bytes]) -> Outcome:
        """The result of a group.

        Args:
            group: its items.
            contents: of the images among them that are sent along, by their paths.
        """

        def result() -> Any:
            if not self._job.images_are_sent:
                _check_shared(group)
            assert self._worker is not None
            return self._worker(group)

        with sent_files({**self._job.files, **contents}):
            return self._outcome(result)

    def _outcome(self, function: Callable[[], Any]) -> Outcome:
        try:
            return Outcome(function(), False, self._notes.taken())
        except DarktrtError as error:
            return Outcome((str(error), error.argument), True, self._notes.taken())


def _check_shared(group: Sequence[Any]) -> None:
    for path in images_of(group):
        if not os.path.exists(path):
            advice = "name images by a path that all nodes share, or send them along"
            raise DarktrtError(f"{path}: is not on this node; {advice}", "ship_images")


class _Notes(logging.Handler):
    """Keeps what is logged until the driver takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._guard = threading.Lock()
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        with self._guard:
            self._kept.append((record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[int, str]]:
        """What was logged since the last call."""
        with self._guard:
            kept, self._kept = self._kept, []
        return kept
