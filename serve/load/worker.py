"""The processes that make load: one Python process cannot send requests fast enough for the server of a GPU."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from darktrt.errors import DarktrtError
from darktrt.progress import LOGGER
from darktrt.serve.client.servers import RemoteServer, Servers
from darktrt.serve.client.slots import PreparedRequest, SharedMemory, Slot
from darktrt.serve.client.transport import Endpoint
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
    """A level of load, at one server or at all, measured by the clients."""

    infer_per_second: float
    """Images, whatever the batch."""
    latency: Latency | None
    """None where no request was answered."""
    failures: int = 0


@dataclass(frozen=True)
class Task:
    """The requests to send to a model."""

    endpoints: tuple[Endpoint, ...]
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
    """The requests of one process to one server in a window."""

    latencies: list[float] = field(default_factory=list)
    """Milliseconds of the requests with an answer in the window."""
    failures: int = 0
    error: str = ""
    """The first one."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.latencies + other.latencies, self.failures + other.failures, self.error or other.error)


class Workers:
    """Processes that send requests, for several levels of load."""

    def __init__(self, pipes: Sequence[Connection], batch: int) -> None:
        self._pipes, self._batch = pipes, batch

    def send(self, concurrency: int, seconds: float) -> tuple[LoadResult, list[LoadResult]]:
        """Send requests from all processes together; the window begins after a fifth of its length to warm up.

        Returns:
            What all servers answered together, and each server.

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
        processes: list[list[Counts]] = [_received(pipe) for pipe in busy]
        servers = [sum(counts, Counts()) for counts in zip(*processes, strict=True)]
        together = sum(servers, Counts())
        if not together.latencies:
            raise DarktrtError(f"no request was answered within {seconds:g} s ({together.error or 'each lasts longer'})")
        return self._result(together, seconds), [self._result(counts, seconds) for counts in servers]

    def _result(self, counts: Counts, seconds: float) -> LoadResult:
        rate = round(len(counts.latencies) * self._batch / seconds, 2)
        return LoadResult(rate, Latency.of(counts.latencies) if counts.latencies else None, counts.failures)


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
            process = context.Process(target=_work_quietly, args=(task, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 10)
            stack.callback(ours.close)  # ends the worker
            pipes.append(ours)
        yield Workers(pipes, task.batch)


def _work_quietly(task: Task, pipe: Connection) -> None:
    """Without warnings of servers that fail, which are counted."""
    LOGGER.setLevel(logging.ERROR)
    _work(task, pipe)


def _work(task: Task, pipe: Connection) -> None:
    """In a process: measure windows until the other end of the pipe closes."""
    try:
        asyncio.run(_windows(task, pipe))
    except DarktrtError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass


async def _windows(task: Task, pipe: Connection) -> None:
    servers = Servers(task.endpoints, task.timeout, retry_seconds=0)
    sender = _Sender(servers)
    try:
        while True:
            share: int = await asyncio.to_thread(pipe.recv)
            await servers.make_slots(task.model, task.batch, share, task.shared_memory)
            shares = [task.requests[i % len(task.requests)] for i in range(share)]
            with suppress(DarktrtError):  # the first request of a server may be slow; its errors are counted below
                await asyncio.gather(*(servers.run(inputs) for inputs in shares * len(servers.all)))
            pipe.send("ready")
            window = await asyncio.to_thread(pipe.recv)
            pipe.send(await sender.send(shares, window))
    finally:
        await servers.close()


class _Sender:
    """Sends requests that are prepared once in each slot."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._prepared: dict[Slot, PreparedRequest] = {}

    async def send(self, requests: Sequence[Arrays], window: Window) -> list[Counts]:
        """Keep one request under way for each of these until the window ends; the counts of each server."""
        counts = {server: Counts() for server in self._servers.all}
        self._prepared.clear()
        await asyncio.gather(*(self._send(inputs, window, counts) for inputs in requests))
        return list(counts.values())

    async def _send(self, inputs: Arrays, window: Window, counts: Mapping[RemoteServer, Counts]) -> None:
        """One request after the other; answers before the start of the window belong to the warm-up."""
        while (began := time.monotonic()) < window.end:
            server, slot = await self._servers.take()
            try:
                await self._servers.attempt(server, slot, partial(self._send_prepared, server, slot, inputs))
            except DarktrtError as error:
                counts[server].failures += 1
                counts[server].error = counts[server].error or str(error)
                await asyncio.sleep(0.1)  # spares a server that refuses at once
                continue
            if window.start <= (ended := time.monotonic()) < window.end:
                counts[server].latencies.append(1e3 * (ended - began))

    async def _send_prepared(self, server: RemoteServer, slot: Slot, inputs: Arrays) -> None:
        prepared = self._prepared.pop(slot, None) or await slot.prepare(server.transport, inputs)
        await slot.send(server.transport, prepared)
        self._prepared[slot] = prepared  # not after an error, for its memory may be another one
