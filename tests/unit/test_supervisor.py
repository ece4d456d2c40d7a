"""What tells a supervisor that a model has failed, with a model and a clock in their places; tests/serve has real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.serve import supervisor
from darktrt.serve.client.transport import BackendEndedError
from darktrt.serve.server import StartOptions

LAPSE = 20
"""Time passes so many times as fast for those who wait."""


class Model:
    """A model of a server, and a client of it."""

    info = SimpleNamespace(usual_image=(40, 30))

    def __init__(self) -> None:
        self.images: list[NDArray[np.uint8]] = []
        self.of_others = 0
        """Inferences of other clients between two looks."""
        self.errors: list[DarktrtError] = []
        self.fails: DarktrtError | None = None
        self.clients: list[tuple[Any, ...]] = []
        self._answered = 0

    def __call__(self, *place: str, in_flight: int, timeout: float, retry_seconds: float) -> Model:
        self.clients.append((*place, in_flight, timeout, retry_seconds))
        return self

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def statistics(self) -> list[SimpleNamespace]:
        self._answered += self.of_others
        return [SimpleNamespace(inferences=7), SimpleNamespace(inferences=self._answered)]

    def detect(self, image: NDArray[np.uint8]) -> None:
        if error := self.errors.pop(0) if self.errors else self.fails:
            raise error
        self.images.append(image)
        self._answered += 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The seconds that were waited for, which pass fast."""
    seconds: list[float | None] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            seconds.append(timeout)
            return super().wait(None if timeout is None else timeout / LAPSE)

    monkeypatch.setattr(supervisor, "Event", Event)
    return seconds


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, waits: list[float | None]) -> Model:
    made = Model()
    monkeypatch.setattr(supervisor, "Client", made)
    monkeypatch.setattr(supervisor, "_detectors", lambda _: ["a model"])
    return made


@contextmanager
def watched(
    seconds: float, models: tuple[str, ...] | None = None, get: Callable[[str], bytes] = lambda _: b""
) -> Iterator[supervisor._Watch]:
    server: Any = SimpleNamespace(http="127.0.0.1:9000", options=StartOptions(models=models), get=get)
    watch = supervisor._Watch(server, seconds)
    try:
        yield watch
    finally:
        watch.stop()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def failure_within(watch: supervisor._Watch, seconds: float) -> str | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if failure := watch.failure():
            return failure
        time.sleep(0.005)
    return None


def test_a_model_that_nobody_asks_gets_images_of_noise(model: Model, waits: list[float | None]) -> None:
    """Other ones each time, for a cache would answer the same; four in the time that it may be silent."""
    with watched(4.0) as watch:
        wait_for(lambda: len(model.images) > 3)
        assert watch.failure() is None
    assert model.clients == [("http://127.0.0.1:9000", "a model", 1, 4.0, 0)]
    assert set(waits) == {1.0}
    for image in model.images:
        assert image.shape == (30, 40, 3) and image.dtype == np.uint8 and image.min() == 0 and image.max() == 255
    assert not np.array_equal(model.images[0], model.images[1])


def test_a_model_that_others_ask_is_left_alone(model: Model) -> None:
    """But for the first look."""
    model.of_others = 1
    with watched(1.0) as watch:
        assert failure_within(watch, 1.3) is None
    assert len(model.images) == 1


def test_a_model_is_looked_at_every_ten_seconds(model: Model, waits: list[float | None]) -> None:
    with watched(60.0):
        wait_for(lambda: waits)
    assert set(waits) == {10.0}


def test_a_model_that_answers_no_inference_is_silent(model: Model) -> None:
    with watched(1.0) as watch:
        wait_for(lambda: model.images)
        model.fails = DarktrtError("it timed out")
        assert failure_within(watch, 10) == "model 'a model' answered no inference for 1 s"
        model.fails = None
        wait_for(lambda: watch.failure() is None)  # it answers again


def test_a_model_whose_process_has_ended_for_good(model: Model) -> None:
    """Some versions of Triton start it again, so that it counts only when it is found three times in a row."""
    ended = BackendEndedError("its process has ended")
    with watched(4.0) as watch:
        for _ in range(2):
            answered = len(model.images)
            model.errors = [ended, ended]
            wait_for(lambda answered=answered: len(model.images) > answered + 1)
            assert watch.failure() is None
        model.errors = [ended, ended, ended]
        assert failure_within(watch, 10) == "the process of model 'a model' has ended"


def refuses(path: str) -> bytes:
    raise HTTPError(path, 400, "not ready", Message(), None)


def is_gone(path: str) -> bytes:
    raise URLError("connection refused")


def test_only_a_model_that_was_unloaded_may_be_silent(model: Model) -> None:
    """Clients unload models where they may; then the server says that one is not ready."""
    model.fails = DarktrtError("it is not ready")
    asked: list[str] = []
    with watched(0.6, ("a model",), lambda path: asked.append(path) or refuses(path)) as watch:
        assert failure_within(watch, 1.0) is None
    assert set(asked) == {"v2/models/a%20model/ready"}
    for models, get in ((None, refuses), (("a model",), is_gone), (("a model",), lambda _: b"")):
        with watched(0.2, models, get) as watch:
            assert failure_within(watch, 10) == "model 'a model' answered no inference for 0.2 s"


def test_the_first_start_again_is_at_once_and_clients_wait_for_the_last() -> None:
    """A client repeats its request for 30 seconds."""
    first, *later = supervisor.PAUSES
    assert first == 0 and later == sorted(set(later)) and 10 < later[-1] <= 20
    assert supervisor.SILENT_SECONDS == 60 and supervisor.STEADY_SECONDS > sum(later)
