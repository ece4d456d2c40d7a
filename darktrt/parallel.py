"""Work in groups by several workers: the protocol, and workers that are threads of this process.

A room whose work can be spread says how a worker is made and which groups of items there are, and puts the results together in
an order of its own, for they come as they are done. It does not know where the workers are: they are threads here, or processes
on other machines (:mod:`darktrt.cluster`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from darktrt.memory import available_bytes

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Worker = Callable[[Sequence[_Item]], _Result]
"""Takes a group and returns its result. Several threads may call it at once."""


@dataclass(frozen=True, eq=False)
class Done(Generic[_Item, _Result]):
    """A group and its result."""

    group: Sequence[_Item]
    result: _Result
    node: str = ""
    """The machine that made it, where there are several."""


class Workers(Protocol):
    """Where work in groups is done."""

    @property
    def group_size(self) -> int:
        """How many images a group should have."""

    def results(
        self,
        make_worker: Callable[[], Worker[_Item, _Result]],
        groups: Iterable[Sequence[_Item]],
        *,
        bytes_each: int,
        gpu: bool = False,
        files: Sequence[Path] = (),
    ) -> Generator[Done[_Item, _Result], None, None]:
        """Yield the result of every group once, as they are done.

        Close the generator if you stop before its end. It waits for no group then but those that threads are at.

        Args:
            make_worker: makes a worker. It is pickled where workers are processes, and makes one in each. What it needs of a
                model it has itself, for the file may not be there.
            groups: are taken as they are needed. Their images, as :func:`images_of` finds them, are read by a worker through
                :func:`darktrt.files.open_input`.
            bytes_each: the memory that one group takes while a worker is at it.
            gpu: a worker needs a GPU, and is at one group at a time.
            files: files that every worker reads besides, through :func:`darktrt.files.open_input`.

        Raises:
            DarktrtError: of a worker; the other groups are not finished.
        """


@dataclass(frozen=True)
class Threads:
    """Workers that are threads of this process and share one worker: as many as there are cores and memory for."""

    most: int | None = None
    """No more than so many."""
    group_size: int = 4

    def results(
        self,
        make_worker: Callable[[], Worker[_Item, _Result]],
        groups: Iterable[Sequence[_Item]],
        *,
        bytes_each: int,
        gpu: bool = False,
        files: Sequence[Path] = (),
    ) -> Generator[Done[_Item, _Result], None, None]:
        """As :meth:`Workers.results`."""
        worker, waiting, done = make_worker(), iter(groups), SimpleQueue[Future[Done[_Item, _Result]]]()
        count = 1 if gpu else self.count(bytes_each)
        pool = ThreadPoolExecutor(count, "worker")

        def start(most: int) -> int:
            taken = list(islice(waiting, most))
            for group in taken:
                pool.submit(lambda one: Done(one, worker(one)), group).add_done_callback(done.put)
            return len(taken)

        try:
            under_way = start(2 * count)  # each finds its next group at once
            while under_way:
                result = done.get().result()
                under_way += start(1) - 1
                yield result
        finally:
            pool.shutdown(cancel_futures=True)

    def count(self, bytes_each: int) -> int:
        """How many threads work."""
        fit = available_bytes() // 2 // max(bytes_each, 1)
        return max(1, min(fit, len(os.sched_getaffinity(0)), *([self.most] if self.most else [])))


def images_of(group: Iterable[object]) -> list[Path]:
    """The image files of a group, whose items are paths, or tuples with a path."""
    return [part for item in group for part in (item if isinstance(item, tuple) else (item,)) if isinstance(part, Path)]


def in_groups(items: Sequence[Any], size: int) -> Generator[Sequence[Any], None, None]:
    """The items in groups of this size, in order; the last may be smaller."""
    yield from (items[first : first + size] for first in range(0, len(items), size))
