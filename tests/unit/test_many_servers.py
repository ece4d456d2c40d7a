"""One client and several servers, which stand-ins for the transport play: which gets a request, and which gets none."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from test_detect import NAMES
from test_load import remote_model

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, HeadInfo
from darktrt.serve.client import servers as module
from darktrt.serve.client.servers import OtherModelError, Servers
from darktrt.serve.client.shared_memory import FOLDER
from darktrt.serve.client.slots import SharedMemory
from darktrt.serve.client.statistics import to_table
from darktrt.serve.client.transport import (
    BackendEndedError,
    Endpoint,
    MemorySlice,
    ModelAwayError,
    TimedOutError,
    UnreachableError,
)
from darktrt.serve.model_info import ModelInfo
from darktrt.vision.detector import Arrays

HEAD = HeadInfo("head", 1, ((9.0, 9.0),), (0,), len(NAMES), 1.0, False, 4, 5)
MODEL = replace(
    remote_model(), info=replace(remote_model().info, heads=(HEAD,), sources={"cfg": "c0", "weights": "1111"}, batch=(1, 1, 1))
)
_Value = TypeVar("_Value")


def config_of(model: ModelInfo) -> dict[str, Any]:
    tensors = {
        kind: [
            {
                "name": one.name,
                "data_type": f"TYPE_{'UINT8' if one.dtype == np.uint8 else 'FP32'}",
                "dims": [str(d) for d in one.dims],
            }
            for one in ones.values()
        ]
        for kind, ones in (("input", model.inputs), ("output", model.outputs))
    }
    parameters = {METADATA_KEY: {"string_value": model.info.to_json()}}
    plain = {"name": model.name, "backend": model.backend, "max_batch_size": model.max_batch}
    return {**plain, **tensors, "parameters": parameters}


class Remote:
    """A server and the transport to it; a test changes its mood."""

    def __init__(self, endpoint: Endpoint, timeout: float | None) -> None:
        self.endpoint, self.timeout = endpoint, timeout
        self.mood = "good"
        self.seconds = 0.002
        """Of an inference."""
        self.model = MODEL
        self.under_way = self.most = self.answered = self.noise = self.refused = 0
        self.registered: list[str] = []
        self.shares_memory = True
        REMOTES[str(endpoint)] = self

    def _refuse(self, inference: bool) -> None:
        text = f"{self.endpoint}: {self.mood}"
        errors: dict[str, DarktrtError | None] = {
            "away": UnreachableError(text),
            "draining": ModelAwayError(text),
            "ended": BackendEndedError(text) if inference else None,
        }
        if error := errors.get(self.mood):
            self.refused += inference
            raise error

    async def models(self) -> list[str]:
        self._refuse(False)
        return [self.model.name]

    async def config(self, name: str, version: str) -> dict[str, Any]:
        self._refuse(False)
        return config_of(self.model)

    async def statistics(self, name: str, version: str) -> list[dict[str, Any]]:
        self._refuse(False)
        return [{"name": name, "version": "1", "inference_count": str(self.answered), "execution_count": str(self.answered)}]

    def input(self, name: str, array: np.ndarray, place: MemorySlice | None = None) -> tuple[str, Any, Any]:
        return name, array, place

    def output(self, name: str, place: MemorySlice | None = None) -> tuple[str, MemorySlice | None]:
        return name, place

    async def infer(self, model: str, version: str, inputs: Any, outputs: Any) -> Arrays:
        images = next(_shared(array, place) for name, array, place in inputs if name == "images")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            self._refuse(True)
            if self.mood == "silent":
                await asyncio.sleep(0.05)
                raise TimedOutError(f"{self.endpoint}: no answer within 0.05 s")
            await asyncio.sleep(self.seconds)
            if self.mood == "away":  # killed with the request under way
                self._refuse(True)
        finally:
            self.under_way -= 1
        if len(np.unique(images)) > 1:  # the pixels of requests here are all equal
            self.noise += 1
        else:
            self.answered += 1
        mark = images.reshape(len(images), -1)[:, :1].astype(np.float32)
        found = {"boxes": np.repeat(mark, 1200, 1).reshape(-1, 300, 4), "scores": np.repeat(mark, 300, 1)}
        for name, place in outputs:
            if place:
                with (FOLDER / place.region).open("r+b") as file:
                    file.seek(place.offset)
                    file.write(found[name].tobytes())
        return {name: found[name] for name, place in outputs if place is None}

    async def regions(self, kind: str) -> set[str]:
        return set(self.registered)

    async def register_system(self, name: str, size: int) -> None:
        if not self.shares_memory:
            raise DarktrtError(f"{self.endpoint}: shared memory is disabled")
        self.registered.append(name)

    async def unregister(self, kind: str, name: str) -> None:
        with suppress(ValueError):  # Triton does not mind
            self.registered.remove(name)

    async def close(self) -> None:
        pass


def _shared(array: np.ndarray, place: MemorySlice | None) -> np.ndarray:
    if place is None:
        return array
    content = (FOLDER / place.region).read_bytes()[place.offset : place.offset + place.size]
    return np.frombuffer(content, array.dtype).reshape(array.shape)


REMOTES: dict[str, Remote] = {}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "Transport", Remote)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.04)
    yield
    REMOTES.clear()


def image(mark: int) -> Arrays:
    threshold = np.array([0.3], np.float32)
    return {
        "images": np.full((1, 128, 160, 3), mark % 251, np.uint8),
        "score_threshold": threshold,
        "iou_threshold": threshold,
    }


Work = Callable[[Servers, list[Remote]], Awaitable[_Value]]


def with_servers(
    work: Work[_Value],
    count: int = 3,
    *,
    in_flight: int = 2,
    retry_seconds: float = 5.0,
    memory: SharedMemory = "none",
    before: Callable[[list[Remote]], None] = lambda remotes: None,
    name: str | None = "made",
) -> _Value:
    """Open a client's servers, which a test has changed before, and do what it wants to."""

    async def all_of_it() -> _Value:
        endpoints = [Endpoint.parse(f"s{i}-{os.getpid()}:1") for i in range(count)]
        servers = await Servers.open(endpoints, 1.0, retry_seconds)
        remotes = [REMOTES[str(endpoint)] for endpoint in endpoints]
        before(remotes)
        try:
            model = await servers.find(name, "")
            await servers.make_slots(model, 1, in_flight, memory)
            return await work(servers, remotes)
        finally:
            await servers.close()

    return asyncio.run(all_of_it())


async def ask(servers: Servers, mark: int) -> None:
    """A request, whose answer must be its own."""
    found = await servers.run(image(mark))
    assert found["scores"][0, 0] == mark % 251
    assert found["boxes"][0, 299, 3] == mark % 251


async def ask_all(servers: Servers, count: int, at_once: int = 100) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(mark: int) -> None:
        async with gate:
            await ask(servers, mark)

    await asyncio.gather(*(one(mark) for mark in range(count)))


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


# --- the choice ---


def test_requests_go_to_the_server_with_the_fewest_under_way() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].seconds = 0.1
        await ask_all(servers, 150)
        assert [one.most for one in remotes] == [2, 2, 2], "as many as there are slots, never more"
        slow, *fast = (one.answered for one in remotes)
        assert slow + sum(fast) == 150
        assert slow < min(fast) / 2, "a server that is slow has its requests under way for longer"
        assert [one.answered for one in servers.states()] == [one.answered for one in remotes]

    with_servers(work)


def test_servers_with_equally_many_take_turns() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        for mark in range(9):
            await ask(servers, mark)
        assert [one.answered for one in remotes] == [3, 3, 3]
        await ask_all(servers, 60, at_once=3)
        assert max(one.most for one in remotes) == 1, "three requests, one at each"

    with_servers(work)


# --- servers that fail ---


@pytest.mark.parametrize("mood", ["away", "draining", "ended", "silent"])
def test_a_server_that_fails_gets_none_until_it_is_back(mood: str, caplog: pytest.LogCaptureFixture) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        await ask_all(servers, 30)
        remotes[1].mood, before = mood, remotes[1].answered
        await ask_all(servers, 60)
        states = servers.states()
        assert [one.up for one in states] == [True, False, True]
        assert 1 <= states[1].failed == servers.retries <= 2, "as many as were under way there"
        assert (remotes[1].answered, remotes[1].noise) == (before, 0)
        await ask_all(servers, 60)
        assert states[1].failed == servers.states()[1].failed, "nobody asks it but the probe"
        remotes[1].mood = "good"
        await until(lambda: servers.states()[1].up)
        assert remotes[1].noise == 1
        await ask_all(servers, 60)
        assert remotes[1].answered > before

    with caplog.at_level(logging.INFO, "darktrt"):
        with_servers(work)
    name = f"grpc://s1-{os.getpid()}:1"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(f"{name}: ")
    assert lines[0].endswith("; it gets no requests until it is back")
    assert lines[1] == f"{name}: is back"


def test_no_request_pauses_while_another_server_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        for one in servers.all:
            one.pauses = itertools.repeat(0.01)
        for mood in ("away", "good"):
            remotes[0].mood = mood
            await ask_all(servers, 20)
        for one in remotes:
            one.mood = "away"
        asking = asyncio.create_task(ask_all(servers, 3))
        await until(lambda: not any(one.up for one in servers.states()))
        await asyncio.sleep(0.1)
        remotes[1].mood = "good"
        await asking

    monkeypatch.setattr(module, "FIRST_PAUSE", 20.0)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 20.0)
    monkeypatch.setattr(module, "STEADY_SECONDS", math.inf)  # the probes' pauses stay
    started = time.monotonic()
    with_servers(work, retry_seconds=60)
    assert time.monotonic() - started < 10


def test_requests_under_way_at_a_server_that_drains_are_answered_there() -> None:
    """Which does not bring it back: it refuses all further ones."""

    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].seconds = 0.2
        first = asyncio.create_task(ask(servers, 1))
        await until(lambda: remotes[0].under_way == 1)
        remotes[0].mood = "draining"
        await ask_all(servers, 40, at_once=2)
        assert not servers.states()[0].up
        assert not first.done()
        await first
        assert remotes[0].answered == 1
        assert not servers.states()[0].up

    with_servers(work, 2)


def test_a_server_with_another_model_is_not_back(caplog: pytest.LogCaptureFixture) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].mood = "away"
        await ask_all(servers, 10)
        other = replace(MODEL.info, sources={"cfg": "c0", "weights": "2222"})
        remotes[0].model, remotes[0].mood = replace(MODEL, info=other), "good"
        await until(lambda: isinstance(servers.all[0].failure, OtherModelError))
        await ask_all(servers, 10)
        assert (remotes[0].answered, remotes[0].noise) == (0, 0)
        remotes[1].mood = "away"
        with pytest.raises(DarktrtError, match="no server answers"):
            await ask(servers, 1)
        assert remotes[0].answered == 0, "nor where there is no other"
        remotes[0].model = MODEL
        await until(lambda: servers.states()[0].up)
        await ask(servers, 2)

    with_servers(work, 2, retry_seconds=0.3)
    text = f"grpc://s0-{os.getpid()}:1: its model 'made' is another one than that of the other servers: "
    said = [record.getMessage() for record in caplog.records]
    assert said.count(f"{text}SHA-256 of the weights is 2222, not 1111") == 1


def test_requests_wait_for_a_server_while_none_is_up() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        for one in remotes:
            one.mood = "away"
        asking = asyncio.create_task(ask_all(servers, 50))
        await until(lambda: not any(one.up for one in servers.states()))
        await asyncio.sleep(0.3)
        remotes[2].mood = "good"
        started = time.monotonic()
        await asking
        assert time.monotonic() - started < 1
        assert [one.answered for one in remotes] == [0, 0, 50]

    with_servers(work)


def test_that_no_server_is_left_is_told_in_time() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].mood, remotes[1].mood = "away", "silent"
        started = time.monotonic()
        with pytest.raises(UnreachableError) as caught:
            await ask(servers, 1)
        assert 0.1 < time.monotonic() - started < 1
        assert str(caught.value).startswith("no server answers: ")
        assert all(f"grpc://s{i}-{os.getpid()}:1: " in str(caught.value) for i in range(2))

    with_servers(work, 2, retry_seconds=0.3)


def test_a_silent_server_holds_no_requests_while_others_may_come_back() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].mood = "silent"
        await ask_all(servers, 10)
        remotes[1].mood = "away"
        asking = asyncio.create_task(ask_all(servers, 10))
        await until(lambda: not any(one.up for one in servers.states()))
        failed = servers.states()[0].failed
        await asyncio.sleep(0.1)
        remotes[1].mood = "good"
        await asking
        assert servers.states()[0].failed == failed

    with_servers(work, 2)


def test_what_a_server_refuses_is_not_asked_elsewhere() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        for one in remotes:
            one.output = lambda name, place=None: ("boxes", None)  # type: ignore[method-assign]
        with pytest.raises(DarktrtError, match="it has no output 'scores'"):
            await ask(servers, 1)
        assert sum(one.answered for one in remotes) == 1
        assert all(one.up for one in servers.states())
        assert servers.retries == 0

    with_servers(work)


def test_a_single_server_is_tried_by_requests_only() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].mood = "away"
        asking = asyncio.create_task(ask_all(servers, 5))
        await asyncio.sleep(0.2)
        remotes[0].mood = "good"
        await asking
        assert (remotes[0].answered, remotes[0].noise) == (5, 0)
        assert servers.retries >= 5
        remotes[0].mood, retries = "silent", servers.retries
        with pytest.raises(TimedOutError):
            await ask(servers, 1)
        assert servers.retries == retries, "it may still be working on the request"

    with_servers(work, 1)


def test_nothing_is_lost_and_nothing_told_twice_whatever_fails() -> None:
    """For a second, servers fail in all ways, at random; in the end all are up again."""

    async def work(servers: Servers, remotes: list[Remote]) -> None:
        choice, done, asked = random.Random(0), asyncio.Event(), 0
        moods = ["good", "good", "away", "draining", "ended", "silent"]

        async def weather() -> None:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                choice.choice(remotes).mood = choice.choice(moods)
                await asyncio.sleep(0.01)
            for one in remotes:
                one.mood = "good"
            done.set()

        async def requests(first: int) -> None:
            nonlocal asked
            mark = first
            while not done.is_set():
                await ask(servers, mark)
                mark += 1
            asked += mark - first

        await asyncio.gather(weather(), *(requests(1000 * i) for i in range(12)))
        await until(lambda: all(one.up for one in servers.states()))
        assert asked == sum(one.answered for one in servers.states())
        assert servers.retries == sum(one.failed for one in servers.states()) > 10
        assert all(one.under_way == 0 for one in servers.states())

    with_servers(work, 4)


def test_pauses_grow_for_a_server_that_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        pauses = servers.all[0].pauses
        for _ in range(3):
            remotes[0].mood = "away"
            await ask_all(servers, 4)
            remotes[0].mood = "good"
            await until(lambda: servers.states()[0].up)
        assert servers.all[0].pauses is not pauses, "of a server that had been up for long"
        pauses = servers.all[0].pauses
        remotes[0].mood = "away"
        await ask_all(servers, 4)
        assert servers.all[0].pauses is pauses
        monkeypatch.setattr(module, "STEADY_SECONDS", 0.0)
        remotes[0].mood = "good"
        await until(lambda: servers.states()[0].up)
        remotes[0].mood = "away"
        await ask_all(servers, 4)
        assert servers.all[0].pauses is not pauses

    with_servers(work, 2)


# --- opening and closing ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": {"cfg": "c0", "weights": "2222"}}, "SHA-256 of the weights is 2222, not 1111"),
        ({"name": "yolov7"}, "name is yolov7, not yolov4"),
        ({"class_names": tuple(reversed(NAMES))}, "class_names is ("),
        ({"max_detections": 100}, "max_detections is 100, not 300"),
        ({}, "max_batch_size is 4, not 8"),
    ],
)
def test_servers_of_other_models_are_refused(changes: dict[str, Any], said: str) -> None:
    def before(remotes: list[Remote]) -> None:
        for one in remotes:
            one.model = replace(MODEL, info=replace(MODEL.info, name="yolov4"))
        remotes[2].model = replace(
            remotes[2].model, info=replace(remotes[2].model.info, **changes), max_batch=8 if changes else 4
        )

    with pytest.raises(OtherModelError) as caught:
        with_servers(nothing, before=before)
    first, last = (f"grpc://s{i}-{os.getpid()}:1" for i in (0, 2))
    assert str(caught.value).startswith(f"{last}: its model 'made' is another one than that of {first}: {said}")
    assert caught.value.argument == "server"


async def nothing(servers: Servers, remotes: list[Remote]) -> None:
    pass


def test_the_same_model_on_other_backends_is_the_same() -> None:
    def before(remotes: list[Remote]) -> None:
        remotes[1].model = replace(MODEL, backend="tensorrt", cuda_graph=True)

    with_servers(nothing, before=before)


def test_a_server_that_is_not_there_yet_gets_requests_when_it_is(caplog: pytest.LogCaptureFixture) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        await ask_all(servers, 20)
        assert (remotes[0].answered, remotes[0].noise) == (0, 0)
        remotes[0].mood = "good"
        await until(lambda: servers.states()[0].up)
        assert len(remotes[0].registered) == 2, "with memory of its own"
        await ask_all(servers, 20)
        assert remotes[0].answered > 0

    with_servers(work, 2, memory="system", before=lambda remotes: setattr(remotes[0], "mood", "draining"), name=None)
    assert "draining; it gets no requests until it is back" in caplog.text


def test_a_server_that_is_away_at_first_costs_no_request() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        assert [one.up for one in servers.states()] == [False, True]
        await ask_all(servers, 8)
        assert (servers.retries, servers.states()[0].failed) == (0, 0)

    with_servers(work, 2, before=lambda remotes: setattr(remotes[0], "mood", "away"))


def test_without_any_server_there_is_no_client() -> None:
    def before(remotes: list[Remote]) -> None:
        for one in remotes:
            one.mood = "away"

    with pytest.raises(UnreachableError, match=r"no server answers: grpc://s0.*: away; grpc://s1.*: away"):
        with_servers(nothing, 2, before=before)
    with pytest.raises(UnreachableError, match=r"^grpc://s0-\d+:1: away$"):
        with_servers(nothing, 1, before=before)


def test_the_only_model_of_each_server_has_one_name() -> None:
    def before(remotes: list[Remote]) -> None:
        remotes[1].model = replace(MODEL, name="other")

    with pytest.raises(DarktrtError, match=r"s1.*: has the model 'other', and grpc://s0.*:1 'made'; name one") as caught:
        with_servers(nothing, 2, before=before, name=None)
    assert caught.value.argument == "model"


def test_a_server_that_cannot_share_memory_gets_images_by_the_socket(caplog: pytest.LogCaptureFixture) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        assert [len(one.registered) for one in remotes] == [2, 0, 2]
        assert not {*remotes[0].registered} & {*remotes[2].registered}, "each server has regions of its own"

    def one_cannot(remotes: list[Remote]) -> None:
        remotes[1].shares_memory = False

    with_servers(work, memory="system", before=one_cannot)
    assert [one.registered for one in REMOTES.values()] == [[], [], []]
    assert f"grpc://s1-{os.getpid()}:1: shared memory is disabled" in caplog.text
    assert "it gets images by the socket" in caplog.text

    def none_can(remotes: list[Remote]) -> None:
        for one in remotes:
            one.shares_memory = False

    with pytest.raises(DarktrtError, match=r"s0.*shared memory is disabled"):
        with_servers(work, memory="system", before=none_can)


def test_closing_ends_requests_and_probes() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].mood = "away"
        await ask_all(servers, 4)
        for one in remotes:
            one.seconds = 60
        waiting = [asyncio.create_task(ask(servers, mark)) for mark in range(9)]
        await until(lambda: remotes[1].under_way == 2)
        await servers.close()
        assert all(task.cancelled() for task in waiting)
        assert len(asyncio.all_tasks()) == 1
        with pytest.raises(DarktrtError, match="the client is closed"):
            await ask(servers, 1)

    with_servers(work)


def test_a_mistake_of_ours_in_a_probe_is_no_silence() -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        remotes[0].mood = "away"
        await ask_all(servers, 4)
        remotes[0].config = lambda name, version: 1 / 0  # type: ignore[method-assign]
        await asyncio.sleep(0.1)

    with pytest.raises(ZeroDivisionError):
        with_servers(work)


# --- statistics ---


def test_statistics_by_server(caplog: pytest.LogCaptureFixture) -> None:
    async def work(servers: Servers, remotes: list[Remote]) -> None:
        await ask_all(servers, 9, at_once=3)
        found = await servers.statistics()
        assert [(one.server, one.inferences) for one in found] == [(str(remote.endpoint), 3) for remote in remotes]
        lines = to_table(found).splitlines()
        assert lines[0].split()[:3] == ["server", "version", "requests"]
        assert [line.split()[:2] for line in lines[1:]] == [[str(remote.endpoint), "1"] for remote in remotes]
        assert to_table(found[:1]).startswith("version")
        remotes[1].mood = "away"
        assert [one.server for one in await servers.statistics()] == [str(remotes[i].endpoint) for i in (0, 2)]
        assert "away; its statistics are missing" in caplog.text
        for one in remotes:
            one.mood = "away"
        with pytest.raises(UnreachableError, match="no server answers"):
            await servers.statistics()

    with_servers(work)
