"""Keeps a server serving: starts it again after it ended, and when one of its models answers no inference any more."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from threading import Event, Thread
from urllib.error import HTTPError
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY
from darktrt.progress import LOGGER
from darktrt.serve.client.client import Client
from darktrt.serve.client.transport import BackendEndedError
from darktrt.serve.config import CONFIG_NAME
from darktrt.serve.repository import models_of, read_config
from darktrt.serve.server import Server, last_words

SILENT_SECONDS = 60.0
"""How long a model may answer no inference before its server is started again."""

PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before the first start again, the second one, and so on; the last one, which clients wait for, before all further."""

STEADY_SECONDS = 120.0
"""A server that serves as long as this has its pauses begin anew."""

_CHECK_SECONDS = 10.0
"""Between two looks at a model."""

_ENDED = 3
"""So many times in a row must a model's process be found to have ended, because some versions of Triton start it again."""

_POLL_SECONDS = 0.2


def supervise(server: Server, silent_seconds: float = SILENT_SECONDS, done: Event | None = None) -> None:
    """Watch a server that is ready, and start it again whenever that is needed.

    Warnings tell of each failure and of each start. A model counts as silent when no inference of it succeeds, whoever sends
    it; one that nobody asks gets an image of noise from here.

    Args:
        silent_seconds: how long a model may be silent.
        done: ends this; without it only an interrupt does.
    """
    done = done or Event()
    tries = 0
    while not done.is_set():
        began = time.monotonic()
        if reason := _next_failure(server, silent_seconds, done):
            tries = _start_again(server, reason, 0 if time.monotonic() - began > STEADY_SECONDS else tries, done)


def _next_failure(server: Server, silent_seconds: float, done: Event) -> str | None:
    """Wait for it; what it was, as a sentence without its end."""
    watch = _Watch(server, silent_seconds)
    try:
        while not done.wait(_POLL_SECONDS):
            if (status := server.process.poll()) is not None:
                words = last_words(server.log.lines)
                return f"tritonserver ended with {_status_text(status)}{f' ({words})' if words else ''}"
            if failure := watch.failure():
                return failure
            server.guard_memory()  # of models that were loaded since
    finally:
        watch.stop()
    return None


def _status_text(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {-status}, {signal.Signals(-status).name}"


def _start_again(server: Server, reason: str, tries: int, done: Event) -> int:
    """Start the server until it is ready; how many tries there were with those before."""
    failed = time.monotonic()
    while True:
        server.kill()
        pause = PAUSES[min(tries, len(PAUSES) - 1)]
        LOGGER.warning(f"{reason}; it is started again{f' in {pause:g} s' if pause else ''}")
        if done.wait(pause):
            return tries
        tries += 1
        try:
            server.start(server.log)
            server.settle()
        except DarktrtError as error:
            reason = str(error)
        else:
            LOGGER.warning(f"tritonserver serves again, {time.monotonic() - failed:.1f} s after it failed")
            return tries


class _Watch:
    """When each model last answered an inference; asks in a thread a model.

    Args:
        seconds: how long a model may be silent.
    """

    def __init__(self, server: Server, seconds: float) -> None:
        self._server, self._seconds = server, seconds
        self._done = Event()
        self._lost: str | None = None
        """A model whose process of the Python backend has ended and was not started again."""
        self._answered = dict.fromkeys(_detectors(server), time.monotonic())
        for name in self._answered:
            Thread(target=self._ask, args=(name,), daemon=True).start()

    def stop(self) -> None:
        """The threads end when their requests do, which they do with the server's process."""
        self._done.set()

    def failure(self) -> str | None:
        """What is wrong with a model, if anything is."""
        if self._lost:
            return f"the process of model '{self._lost}' has ended"
        now = time.monotonic()
        silent = (name for name, then in self._answered.items() if now - then > self._seconds)
        return next((f"model '{name}' answered no inference for {self._seconds:g} s" for name in silent), None)

    def _ask(self, name: str) -> None:
        """Note the time whenever the server's count of the model's inferences has grown, if need be by a request from here."""
        with ExitStack() as stack:
            client: Client | None = None
            counted: int | None = None
            ended = 0
            while not self._done.wait(1.0 if ended else min(_CHECK_SECONDS, self._seconds / 4)):
                try:
                    client = client or stack.enter_context(self._client(name))
                    if counted in (None, _inferences(client)):
                        client.detect(_noise(client))
                    counted, ended = _inferences(client), 0
                except BackendEndedError:
                    ended += 1
                    self._lost = name if ended == _ENDED else None
                    continue
                except DarktrtError:
                    if not self._unloaded(name):
                        continue
                self._answered[name] = time.monotonic()

    def _client(self, name: str) -> Client:
        return Client(f"http://{self._server.http}", name, in_flight=1, timeout=self._seconds, retry_seconds=0)

    def _unloaded(self, name: str) -> bool:
        """Whether a client has unloaded the model, where clients may."""
        if self._server.options.models is None:
            return False
        try:
            self._server.get(f"v2/models/{quote(name, safe='')}/ready")
        except HTTPError:
            return True
        except OSError:
            return False
        return False


def _detectors(server: Server) -> list[str]:
    """The models of the repository that darktrt can send images to."""
    folders = models_of(server.repository)
    return [folder.name for folder in folders if METADATA_KEY in read_config(folder / CONFIG_NAME).parameters]


def _inferences(client: Client) -> int:
    """How many images the server has answered so far, without those of its cache."""
    return sum(version.inferences for version in client.statistics())


def _noise(client: Client) -> NDArray[np.uint8]:
    """Another image each time, which no cache can answer."""
    width, height = client.info.usual_image
    return np.random.default_rng().integers(0, 256, (height, width, 3), np.uint8)
