"""The processes that make load: one Python alone cannot ask a GPU's server fast enough."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from darktrt.errors import DarktrtError
from darktrt.serve.client.model_info import ModelInfo
from darktrt.serve.client.slots import SharedMemory, Slot
from darktrt.serve.client.transport import Endpoint, Transport
from darktrt.vision.detector import Arrays


@dataclass(frozen=True)
class Latency:
    """Milliseconds from request to answer: of half of the requests, of 90, 95 and 99 in a hundred not more."""

    p50: float
    p90: float
    p95: float
    p99: float

    @staticmethod
    def of(milliseconds: Sequence[float]) -> Latency:
        return Latency(*(round(float(value), 3) for value in np.percentile(milliseconds, (50, 90, 95, 99))))


@dataclass(frozen=True)
class Asked:
    """What the side that asks saw of a level of load."""

    infer_per_second: float
    """Images, whatever the batch."""
    latency: Latency
    failures: int = 0


Ask = Callable[[int], Asked]
"""Makes load, so many requests at once."""


@dataclass(frozen=True)
class Task:
    """What to ask of which model."""

    endpoint: Endpoint
    model: ModelInfo
    requests: tuple[Arrays, ...]
    """Inputs to take turns with."""
    batch: int
    shared_memory: SharedMemory
    timeout: float


@dataclass(frozen=True)
class Round:
    """When a measurement counts, by the monotonic clock, which all processes share."""

    start: float
    end: float


@dataclass
class Counted:
    """What came of a round."""

    latencies: list[float] = field(default_factory=list)
    """Milliseconds of the requests that were answered inside it."""
    failures: int = 0
    error: str = ""
    """The first one."""


class Workers:
    """Processes, kept over several rounds."""

    def __init__(self, pipes: Sequence[Connection], batch: int) -> None:
        self._pipes, self._batch = pipes, batch

    def ask(self, concurrency: int, seconds: float) -> Asked:
        """A round of all processes together, which begins to count when a fifth of the time has gone to warming up.

        Raises:
            DarktrtError: a worker could not begin, or no request was answered.
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
            pipe.send(Round(start, start + seconds))
        counts: list[Counted] = [_received(pipe) for pipe in busy]
        latencies = [value for one in counts for value in one.latencies]
        if not latencies:
            error = next((one.error for one in counts if one.error), "each takes longer")
            raise DarktrtError(f"no request was answered within {seconds:g} s ({error})")
        rate = round(len(latencies) * self._batch / seconds, 2)
        return Asked(rate, Latency.of(latencies), sum(one.failures for one in counts))


def _received(pipe: Connection) -> Any:
    try:
        found = pipe.recv()
    except EOFError as error:
        raise DarktrtError("a process that made load ended early; is there enough memory?") from error
    if isinstance(found, DarktrtError):
        raise found
    return found


@contextmanager
def workers(task: Task, processes: int) -> Iterator[Workers]:
    """So many processes that ask as ``task`` says; they end with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would copy gRPC's threads half
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
    """In a process: rounds, until the other side closes the pipe."""
    try:
        asyncio.run(_rounds(task, pipe))
    except DarktrtError as error:
        pipe.send(error)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass


async def _rounds(task: Task, pipe: Connection) -> None:
    transport = Transport(task.endpoint, task.timeout, retry_seconds=0)
    slots: list[Slot] = []
    try:
        while True:
            share: int = await asyncio.to_thread(pipe.recv)
            while len(slots) < share:
                slots.append(Slot(task.model, task.batch, task.shared_memory))
                await slots[-1].take_memory(transport)
            requests = [task.requests[i % len(task.requests)] for i in range(share)]
            with suppress(DarktrtError):  # the first of a server may take long; what is wrong with it is told below
                await asyncio.gather(
                    *(slot.send(transport, slot.prepare(transport, one)) for slot, one in zip(slots, requests, strict=False))
                )
            pipe.send("ready")
            round_, counted = await asyncio.to_thread(pipe.recv), Counted()
            await asyncio.gather(
                *(_ask(slot, transport, one, round_, counted) for slot, one in zip(slots, requests, strict=False))
            )
            pipe.send(counted)
    finally:
        for slot in slots:
            await slot.close(transport)
        await transport.close()


async def _ask(slot: Slot, transport: Transport, inputs: Arrays, round_: Round, counted: Counted) -> None:
    """One request after the other until the round ends; those that end before its start are the warm-up."""
    prepared = slot.prepare(transport, inputs)
    while time.monotonic() < round_.end:
        began = time.monotonic()
        try:
            await slot.send(transport, prepared)
        except DarktrtError as error:
            counted.failures += 1
            counted.error = counted.error or str(error)
            await asyncio.sleep(0.1)  # a server that refuses at once is not to be flooded
            prepared = slot.prepare(transport, inputs)
            continue
        ended = time.monotonic()
        if round_.start <= ended < round_.end:
            counted.latencies.append(1e3 * (ended - began))
