"""The processes that make load: one Python process cannot send requests fast enough for the server of a GPU."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from darktrt.errors import DarktrtError
from darktrt.serve.client.slots import SharedMemory, Slot
from darktrt.serve.client.transport import Endpoint, Transport
from darktrt.serve.model_info import ModelInfo
from darktrt.vision.detector import Arrays


@dataclass(frozen=True)
class Latency:
    """Percentiles of the milliseconds from request to answer."""

    p50: float
    p90: float
    p95: float
    p99: float

    @staticmethod
    def of(milliseconds: Sequence[float]) -> Latency:
        return Latency(*(round(float(value), 3) for value in np.percentile(milliseconds, (50, 90, 95, 99))))


@dataclass(frozen=True)
class LoadResult:
    """A level of load, measured by the clients."""

    infer_per_second: float
    """Images, whatever the batch."""
    latency: Latency
    failures: int = 0


@dataclass(frozen=True)
class Task:
    """The requests to send to a model."""

    endpoint: Endpoint
    model: ModelInfo
    requests: tuple[Arrays, ...]
    """Inputs, used in turns."""
    batch: int
    shared_memory: SharedMemory
    timeout: float


@dataclass(frozen=True)
class Window:
    """Start and end of a measurement by the monotonic clock, which all processes share."""

    start: float
    end: float


@dataclass
class Counts:
    """The requests of one process in a window."""

    latencies: list[float] = field(default_factory=list)
    """Milliseconds of the requests with an answer in the window."""
    failures: int = 0
    error: str = ""
    """The first one."""


class Workers:
    """Processes that send requests, for several levels of load."""

    def __init__(self, pipes: Sequence[Connection], batch: int) -> None:
        self._pipes, self._batch = pipes, batch

    def send(self, concurrency: int, seconds: float) -> LoadResult:
        """Send requests from all processes together; the window begins after a fifth of its length to warm up.

        Raises:
            DarktrtError: a process could not begin, or no request was answered.
        """
        count = len(self._pipes)
        shares = [concurrency // count + (i < concurrency % count) for i in range(count)]
        busy = {pipe: share for pipe, share in zip(self._pipes, shares, strict=True) if share}
        for pipe, share in busy.items():
            pipe.send(share)
        for pipe in busy:
            _received(pipe)
        start = time.monotonic() + seconds / 5
        for pipe in busy:
            pipe.send(Window(start, start + seconds))
        return self._result([_received(pipe) for pipe in busy], seconds)

    def _result(self, counts: Sequence[Counts], seconds: float) -> LoadResult:
        latencies = [latency for process in counts for latency in process.latencies]
        if not latencies:
            error = next((process.error for process in counts if process.error), "each lasts longer")
            raise DarktrtError(f"no request was answered within {seconds:g} s ({error})")
        rate = round(len(latencies) * self._batch / seconds, 2)
        return LoadResult(rate, Latency.of(latencies), sum(process.failures for process in counts))


def _received(pipe: Connection) -> Any:
    try:
        message = pipe.recv()
    except EOFError as error:
        raise DarktrtError("a process that made load ended early; is there enough memory?") from error
    if isinstance(message, DarktrtError):
        raise message
    return message


@contextmanager
def workers(task: Task, processes: int) -> Iterator[Workers]:
    """So many processes that send the requests of the task; they end with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would copy gRPC's state without its threads
    with ExitStack() as stack:
        pipes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 10)
            stack.callback(ours.close)  # ends the worker
            pipes.append(ours)
        yield Workers(pipes, task.batch)


def _work(task: Task, pipe: Connection) -> None:
    """In a process: measure windows until the other end of the pipe closes."""
    try:
        asyncio.run(_windows(task, pipe))
    except DarktrtError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass


async def _windows(task: Task, pipe: Connection) -> None:
    transport = Transport(task.endpoint, task.timeout, retry_seconds=0)
    slots: list[Slot] = []
    try:
        while True:
            share: int = await asyncio.to_thread(pipe.recv)
            while len(slots) < share:
                slots.append(Slot(task.model, task.batch, task.shared_memory))
                await slots[-1].allocate(transport)
            pairs = [(slot, task.requests[i % len(task.requests)]) for i, slot in enumerate(slots[:share])]
            with suppress(DarktrtError):  # the first request of a server may be slow; its errors are counted below
                await asyncio.gather(*(slot.run(transport, inputs) for slot, inputs in pairs))
            pipe.send("ready")
            window, counts = await asyncio.to_thread(pipe.recv), Counts()
            await asyncio.gather(*(_send(slot, transport, inputs, window, counts) for slot, inputs in pairs))
            pipe.send(counts)
    finally:
        for slot in slots:
            await slot.close(transport)
        await transport.close()


async def _send(slot: Slot, transport: Transport, inputs: Arrays, window: Window, counts: Counts) -> None:
    """Send one request after the other until the window ends; answers before its start belong to the warm-up."""
    prepared = await slot.prepare(transport, inputs)
    while time.monotonic() < window.end:
        began = time.monotonic()
        try:
            await slot.send(transport, prepared)
        except DarktrtError as error:
            counts.failures += 1
            counts.error = counts.error or str(error)
            await asyncio.sleep(0.1)  # spares a server that refuses at once
            prepared = await slot.prepare(transport, inputs)
            continue
        ended = time.monotonic()
        if window.start <= ended < window.end:
            counts.latencies.append(1e3 * (ended - began))
