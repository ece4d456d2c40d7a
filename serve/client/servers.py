"""The servers of a client: a request goes to the one with the fewest under way, and one that fails gets none until it is back.

A server is back when it has the same model and has answered an inference: one whose model's process has ended reports that it
is ready all the same. All methods run in one event loop, and what happens between two ``await`` happens at once.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

from darktrt.errors import DarktrtError, quote
from darktrt.metadata import DetectorInfo
from darktrt.progress import LOGGER
from darktrt.serve.client.calls import damaged
from darktrt.serve.client.requests import noise_request
from darktrt.serve.client.shared_memory import free_abandoned
from darktrt.serve.client.slots import SharedMemory, Slot
from darktrt.serve.client.statistics import ModelStatistics
from darktrt.serve.client.transport import Endpoint, ModelAwayError, TimedOutError, Transport, UnreachableError
from darktrt.serve.model_info import ModelInfo
from darktrt.vision.detector import Arrays

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two tries: doubled each time, and then a random part, so that clients do not return all at once."""

STEADY_SECONDS = 10.0
"""A server that was up for as long as this has its pauses begin anew."""

_CLOSE_SECONDS = 5.0
"""How long a server that fails may take to release memory."""

_Answer = TypeVar("_Answer")


class OtherModelError(ModelAwayError):
    """The server has another model than the others under the name at the moment."""


@dataclass(frozen=True)
class ServerState:
    """What a client knows of one of its servers."""

    server: str
    up: bool
    """Whether it gets requests."""
    under_way: int
    """Requests at this moment."""
    answered: int
    """Requests so far."""
    failed: int
    """Requests so far that it did not answer: they were repeated, here or at another server."""


class RemoteServer:
    """One of the servers, with a slot for each request that may be under way there."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.slots: list[Slot] = []
        self.free: list[Slot] = []
        self.up = True
        self.failure: DarktrtError | None = None
        """The latest, while it is not up."""
        self.changed = -math.inf
        """When it was last lost, or came back, by the monotonic clock."""
        self.pauses = iterate_pauses()
        self.turn = 0
        """The number of its latest request among those of all servers."""
        self.answered = self.failed = 0

    def __str__(self) -> str:
        return str(self.transport.endpoint)

    @property
    def under_way(self) -> int:
        return len(self.slots) - len(self.free)

    async def only_model(self) -> str:
        """The name of the server's model.

        Raises:
            DarktrtError: it has none, or several.
        """
        names = await self.transport.models()
        if len(names) != 1:
            has = f"has the models {quote(', '.join(names), 400)}; name one" if names else "has no model that is ready"
            raise DarktrtError(f"{self}: {has}", "model")
        return names[0]

    async def model(self, name: str, version: str) -> ModelInfo:
        return ModelInfo.from_config(await self.transport.config(name, version), str(self), version)

    async def check(self, model: ModelInfo) -> None:
        """See that the server has this model.

        Raises:
            OtherModelError: it has another one of the name.
            DarktrtError: it has none that is ready, or does not answer.
        """
        if text := difference(await self.model(model.name, model.version), model):
            raise OtherModelError(f"{self}: its model '{model.name}' is another one than that of the other servers: {text}")

    def add_slots(self, model: ModelInfo, batch: int, count: int, kind: SharedMemory) -> None:
        """Have as many slots as this, or more; the new ones have no memory yet."""
        added = [Slot(model, batch, kind) for _ in range(count - len(self.slots))]
        self.slots += added
        self.free += added

    async def allocate(self) -> None:
        """Give free slots the shared memory that they lack.

        Raises:
            DarktrtError: there is not enough, or the server cannot use it.
        """
        lacking = [slot for slot in self.free if slot.lacks_memory]
        if lacking:
            await free_abandoned(self.transport)
        for slot in lacking:
            if slot in self.free:  # still
                self.free.remove(slot)
                try:
                    await slot.allocate(self.transport)
                finally:
                    self.free.append(slot)

    async def give_up_memory(self) -> None:
        for slot in self.slots:
            await slot.give_up_memory(self.transport)

    async def statistics(self, model: ModelInfo) -> list[ModelStatistics]:
        records = await self.transport.statistics(model.name, model.version)
        try:
            return [ModelStatistics.of(record, str(self)) for record in records]
        except ValueError as error:
            raise damaged(self, str(error)) from error

    async def close(self) -> None:
        if not self.up:
            self.transport.timeout = min(self.transport.timeout or math.inf, _CLOSE_SECONDS)
        slots, self.slots, self.free = self.slots, [], []
        await asyncio.gather(*(slot.close(self.transport) for slot in slots))
        await self.transport.close()


class Servers:
    """All servers of a client, from the event loop that runs when they are made; to be closed.

    Args:
        timeout: time limit of a call in seconds; None for no limit.
        retry_seconds: how long a request is repeated, from its first failure on, while no server can be reached.

    Raises:
        DarktrtError: tritonclient is not installed, or a certificate cannot be used.
    """

    _model: ModelInfo
    """Of the requests."""

    def __init__(self, endpoints: Sequence[Endpoint], timeout: float | None, retry_seconds: float) -> None:
        self.all = [RemoteServer(Transport(endpoint, timeout)) for endpoint in endpoints]
        self.retry_seconds = retry_seconds
        self.retries = 0
        """How many requests were repeated so far."""
        self._turns = itertools.count(1)
        self._freed, self._returned = asyncio.Event(), asyncio.Event()
        """Set for a moment when a slot may have become free, and when a server is back."""
        self._running: set[asyncio.Task[Any]] = set()
        self._probes: dict[RemoteServer, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, endpoints: Sequence[Endpoint], timeout: float | None, retry_seconds: float) -> Servers:
        return cls(endpoints, timeout, retry_seconds)

    async def find(self, name: str | None, version: str) -> ModelInfo:
        """The model of this name, or the only one. Servers that are away get requests once they are back.

        Raises:
            DarktrtError: all are away, or one has no such model, or another one of its name.
        """
        name = await self._only_name() if name is None else name
        found, failures = await self._ask_all(lambda server: server.model(name, version))
        first, model = next(iter(found.items()))
        for server, other in found.items():
            if text := difference(other, model):
                raise OtherModelError(f"{server}: its model '{name}' is another one than that of {first}: {text}", "server")
        for server, error in failures.items():
            server.failure, server.up = error, False
        self._model = model
        return model

    async def _only_name(self) -> str:
        names, _ = await self._ask_all(RemoteServer.only_model)
        (first, name), *others = names.items()
        for server, other in others:
            if other != name:
                raise DarktrtError(f"{server}: has the model '{quote(other)}', and {first} '{quote(name)}'; name one", "model")
        return name

    async def _ask_all(
        self, call: Callable[[RemoteServer], Awaitable[_Answer]]
    ) -> tuple[dict[RemoteServer, _Answer], dict[RemoteServer, DarktrtError]]:
        """The answers of the servers, and the errors of those that are away.

        Raises:
            DarktrtError: all are away, or one refuses.
        """
        answers = await asyncio.gather(*map(call, self.all), return_exceptions=True)
        found: dict[RemoteServer, _Answer] = {}
        failures: dict[RemoteServer, DarktrtError] = {}
        for server, answer in zip(self.all, answers, strict=True):
            if isinstance(answer, UnreachableError | TimedOutError):
                failures[server] = answer
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[server] = answer
        if not found:
            raise self._nobody(failures)
        return found, failures

    async def make_slots(self, model: ModelInfo, batch: int, count: int, kind: SharedMemory) -> None:
        """Have so many slots at each server. One of several servers that cannot use the memory gets images by the socket.

        Raises:
            DarktrtError: no server can use it.
        """
        self._model = model
        refusals: dict[RemoteServer, DarktrtError] = {}
        for server in self.all:
            server.add_slots(model, batch, count, kind)
            if server.up:
                try:
                    await server.allocate()
                except (UnreachableError, TimedOutError) as error:
                    if len(self.all) == 1:
                        raise
                    server.failure, server.up = error, False
                except DarktrtError as error:
                    refusals[server] = error
        if refusals and len(refusals) == sum(server.up for server in self.all):
            raise next(iter(refusals.values()))
        for server, refusal in refusals.items():
            await self._use_socket(server, refusal)
        for server in self.all:
            if not server.up:
                self._watch(server)

    async def _use_socket(self, server: RemoteServer, error: DarktrtError) -> None:
        LOGGER.warning(f"{error}; it gets images by the socket")
        await server.give_up_memory()

    def states(self) -> list[ServerState]:
        return [ServerState(str(one), one.up, one.under_way, one.answered, one.failed) for one in self.all]

    # --- requests ---

    async def run(self, inputs: Arrays) -> Arrays:
        """All outputs of a request, from any of the servers.

        Raises:
            DarktrtError: a server refuses it, or none answers it.
        """
        task = asyncio.current_task()
        assert task
        self._running.add(task)
        try:
            return await self._run(inputs)
        finally:
            self._running.discard(task)

    async def _run(self, inputs: Arrays) -> Arrays:
        """At another server at once while one is up that has not failed for this request; after pauses otherwise."""
        failures: dict[RemoteServer, DarktrtError] = {}
        end, pauses = math.inf, iterate_pauses()
        while True:
            server, slot = await self.take()
            try:
                return await self.attempt(server, slot, partial(slot.run, server.transport, inputs))
            except (UnreachableError, TimedOutError) as error:
                failures[server] = error
                now = time.monotonic()
                end = min(end, now + self.retry_seconds)
                if not any(one.up and one not in failures for one in self.all):
                    pause = next(pauses)
                    late = isinstance(error, TimedOutError) and len(self.all) == 1  # it may still be working on the request
                    if late or now + pause > end:
                        raise self._nobody(failures) from error
                    await self._pause(pause)
            self.retries += 1

    async def take(self) -> tuple[RemoteServer, Slot]:
        """Wait for a slot; one of the server with the fewest requests under way, of equals the one whose last is the oldest.

        Raises:
            DarktrtError: the client is closed.
        """
        while not (free := [server for server in self._candidates() if server.free]):
            if not any(server.slots for server in self.all):
                raise DarktrtError("the client is closed")
            await self._freed.wait()
        server = min(free, key=lambda one: (one.under_way, one.turn))
        server.turn = next(self._turns)
        return server, server.free.pop()

    def _candidates(self) -> list[RemoteServer]:
        """The servers that are up; where none is, those to try, the silent ones last."""
        up = [server for server in self.all if server.up]
        return up or [server for server in self.all if not isinstance(server.failure, TimedOutError)] or self.all

    async def attempt(self, server: RemoteServer, slot: Slot, send: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Send a request in a slot that was taken, and free it.

        Raises:
            UnreachableError, TimedOutError: the server is lost, if it was up.
            DarktrtError: the server refuses the request.
        """
        trial = not server.up
        try:
            if trial:
                await server.check(self._model)
            answer = await send()
        except (UnreachableError, TimedOutError) as error:
            server.failed += 1
            self._lose(server, error)
            raise
        finally:
            server.free.append(slot)
            _pulse(self._freed)
        server.answered += 1
        if trial:
            self._regain(server)
        return answer

    async def _pause(self, seconds: float) -> None:
        """Until a server is up, at most so long."""
        if not any(server.up for server in self.all):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._returned.wait(), seconds)

    def _nobody(self, failures: dict[RemoteServer, DarktrtError]) -> DarktrtError:
        """The error where these servers failed and there is no other."""
        errors = list(failures.values())
        if len(self.all) == 1:
            return errors[0]
        return UnreachableError(f"no server answers: {'; '.join(map(str, errors))}")

    # --- servers that fail ---

    def _lose(self, server: RemoteServer, error: DarktrtError) -> None:
        server.failure = error
        if not server.up:
            return
        now = time.monotonic()
        if now - server.changed > STEADY_SECONDS:
            server.pauses = iterate_pauses()
        server.up, server.changed = False, now
        self._watch(server)

    def _watch(self, server: RemoteServer) -> None:
        """Probe one of several servers until it is back; a single one is only tried by requests."""
        if len(self.all) == 1 or (server in self._probes and not self._probes[server].done()):
            return
        LOGGER.warning(f"{server.failure}; it gets no requests until it is back")
        self._probes[server] = asyncio.create_task(self._probe(server))

    async def _probe(self, server: RemoteServer) -> None:
        """Ask a server, at growing intervals, until it has the model and answers an image of noise."""
        slot = Slot(self._model, self._model.info.batch[0], "none")
        while not server.up:
            await asyncio.sleep(next(server.pauses))
            try:
                await server.check(self._model)
                await slot.run(server.transport, await asyncio.to_thread(noise_request, self._model))
                await self._allocate(server)
            except DarktrtError as error:
                if isinstance(error, OtherModelError) and str(error) != str(server.failure):
                    LOGGER.warning(str(error))
                server.failure = error
            else:
                self._regain(server)

    async def _allocate(self, server: RemoteServer) -> None:
        try:
            await server.allocate()
        except (UnreachableError, TimedOutError):
            raise
        except DarktrtError as error:
            await self._use_socket(server, error)

    def _regain(self, server: RemoteServer) -> None:
        if server.up:
            return
        now = time.monotonic()
        if len(self.all) > 1:
            LOGGER.info(f"{server}: is back")
        server.up, server.failure, server.changed = True, None, now
        _pulse(self._returned)
        _pulse(self._freed)

    # --- all servers ---

    async def statistics(self) -> list[ModelStatistics]:
        """The counts of all servers that answer; a warning names the others.

        Raises:
            DarktrtError: none answers.
        """
        found, failures = await self._ask_all(lambda server: server.statistics(self._model))
        for error in failures.values():
            LOGGER.warning(f"{error}; its statistics are missing")
        return [one for statistics in found.values() for one in statistics]

    async def close(self) -> None:
        """Cancel what is under way, and release the memory."""
        tasks = [*self._running, *self._probes.values()]
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.close() for server in self.all))
        for result in results[len(self._running) :]:
            if isinstance(result, Exception):  # a mistake of ours; those of requests reach their callers
                raise result


def iterate_pauses() -> Iterator[float]:
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, LONGEST_PAUSE)


def _pulse(event: asyncio.Event) -> None:
    """Wake those that wait at this moment."""
    event.set()
    event.clear()


def difference(one: ModelInfo, other: ModelInfo) -> str | None:
    """What two models of one name differ in, which then are not the same network made in the same way; None if nothing.

    They may run on different backends and GPUs.
    """
    facts, others = _facts(one), _facts(other)
    for name in {**facts, **others}:
        if facts.get(name) != others.get(name):
            return f"{name} is {quote(facts.get(name), 150)}, not {quote(others.get(name), 150)}"
    return None


def _facts(model: ModelInfo) -> dict[str, object]:
    """In which servers must agree."""
    info = {field.name: getattr(model.info, field.name) for field in fields(DetectorInfo)}
    hashes = {f"SHA-256 of the {file}": value for file, value in info.pop("sources").items()}
    tensors = {kind: ", ".join(map(str, getattr(model, kind).values())) for kind in ("inputs", "outputs")}
    return {"name": info["name"], **hashes, **info, "max_batch_size": model.max_batch, **tensors}
