"""A Ray cluster as workers: what :class:`darktrt.parallel.Threads` is on one machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from darktrt.cluster.actor import Job
from darktrt.cluster.dispatch import Dispatch
from darktrt.cluster.nodes import Need
from darktrt.errors import DarktrtError
from darktrt.files import read_bytes
from darktrt.parallel import Done, Worker

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MOST_FILE_BYTES = 4 << 30
"""The largest file that is sent to every worker; an engine has some hundred MB."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a Ray cluster, to calibrate and to evaluate on.

    Results are bit for bit those of one machine, whatever the number of workers and the order, and whichever of them die.
    This process must run on a machine of the cluster. All machines need the same darktrt, onnxruntime, numpy and pillow.

    Args:
        address: ``HOST:PORT`` of the cluster's head, or ``local`` for a new one on this machine; by default the one that this
            machine is part of, else a new one.
        num_cpus_per_worker: the cores that a worker takes; it works on as many groups of images at once and holds one copy of
            the model for them.
        num_gpus_per_worker: the share of a GPU that a worker takes whose model is an engine.
        ship_images: send images along with the work, for machines that do not see them under the same paths.
        workers: no more than so many; by default as many as there is room for.
        group_size: how many images a worker gets at once; what it counts of them comes back as a whole, some 20 to 90 MB.

    Raises:
        DarktrtError: a number is not above 0.
    """

    address: str | None = None
    num_cpus_per_worker: int = 1
    num_gpus_per_worker: float = 1.0
    ship_images: bool = False
    workers: int | None = None
    group_size: int = 32

    def __post_init__(self) -> None:
        for name in ("num_cpus_per_worker", "num_gpus_per_worker", "workers", "group_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise DarktrtError(f"{name} is {value}; it must be above 0", name)

    def results(
        self,
        make_worker: Callable[[], Worker[_Item, _Result]],
        groups: Iterable[Sequence[_Item]],
        *,
        bytes_each: int,
        gpu: bool = False,
        files: Sequence[Path] = (),
    ) -> Generator[Done[_Item, _Result], None, None]:
        """As :meth:`darktrt.parallel.Workers.results`.

        Raises:
            DarktrtError: of a worker, with its node; or there is no cluster or no room in it, a node has other versions, or
                several workers die at one group.
        """
        threads = 1 if gpu else self.num_cpus_per_worker
        need = Need(self.num_cpus_per_worker, self.num_gpus_per_worker if gpu else 0, bytes_each * threads)
        contents = {str(path): read_bytes(path, MOST_FILE_BYTES) for path in files}
        ray = connected(self.address)
        yield from Dispatch(
            ray, Job(make_worker, contents, self.ship_images, os.getcwd()), groups, need, threads, self.workers
        ).results()


def connected(address: str | None) -> Any:
    """The module ray, connected to a cluster; a connection that the program has is kept.

    Raises:
        DarktrtError: Ray is not installed, or no cluster is there.
    """
    try:
        import ray
    except ImportError as error:
        raise DarktrtError("Ray is not installed; install it with: pip install 'darktrt[cluster]'") from error
    if ray.is_initialized():
        return ray
    if address and "://" in address:
        raise DarktrtError(f"{address}: name HOST:PORT of the head, and run this on a machine of the cluster", "address")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # one that is started here reports to nobody
    try:
        with _handlers_kept():
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False  # it prints deaths on standard output, with pages of raylets' logs
    except (ConnectionError, ValueError, RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        where = address or "the Ray cluster of this machine"
        raise DarktrtError(f"{where}: cannot join it ({first}); is 'ray start' run on this machine?", "address") from error
    return ray


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep the handlers of signals, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
