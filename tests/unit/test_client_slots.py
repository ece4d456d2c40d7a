"""Requests and answers as Triton's different kinds of models want them, by a transport that stands in for the server."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import MADE_CFG, make
from test_load import remote_model

from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.serve.client.shared_memory import FOLDER, prefix_of
from darktrt.serve.client.slots import SharedMemory, Slot
from darktrt.serve.client.transport import MemorySlice, RegionLostError, TimedOutError, UnreachableError
from darktrt.serve.model_info import ModelInfo, TensorInfo
from darktrt.vision.detector import Arrays


class Standing:
    """Stands for the transport and the server behind it, which sees shared memory as the kernel shows it."""

    endpoint = f"grpc://slots-{os.getpid()}:1"

    def __init__(self, answer: Callable[[Arrays], Arrays]) -> None:
        self.answer = answer
        self.registered: list[str] = []
        self.asked: Arrays = {}
        self.fail: list[Exception] = []
        self.sent: list[Any] = []
        self.away = self.truncate = False

    def input(
        self, name: str, array: np.ndarray, place: MemorySlice | None = None
    ) -> tuple[str, np.ndarray, MemorySlice | None]:
        return name, np.empty_like(array) if place else array, place

    def output(self, name: str, place: MemorySlice | None = None) -> tuple[str, MemorySlice | None]:
        return name, place

    async def infer(self, model: str, version: str, inputs: Any, outputs: Any) -> Arrays:
        if self.fail:
            raise self.fail.pop(0)
        if any(place and place.region not in self.registered for *_, place in [*inputs, *outputs]):
            raise RegionLostError("lost")
        self.sent = list(inputs)
        self.asked = {name: self.read(array, place) if place else array for name, array, place in inputs}
        found = self.answer(self.asked)
        for name, place in outputs:
            if place:
                self.write(found.pop(name), place)
                if self.truncate:
                    os.truncate(FOLDER / place.region, 0)
        return found

    def read(self, like: np.ndarray, place: MemorySlice) -> np.ndarray:
        assert place.region in self.registered
        content = (FOLDER / place.region).read_bytes()[place.offset : place.offset + place.size]
        return np.frombuffer(content, like.dtype).reshape(like.shape)

    def write(self, array: np.ndarray, place: MemorySlice) -> None:
        assert array.nbytes == place.size
        with (FOLDER / place.region).open("r+b") as file:
            file.seek(place.offset)
            file.write(array.tobytes())

    async def register_system(self, name: str, size: int) -> None:
        if self.away:
            raise UnreachableError("cannot be reached")
        self.registered.append(name)

    async def regions(self, kind: str) -> set[str]:
        if self.away:
            raise UnreachableError("cannot be reached")
        return set(self.registered)

    async def unregister(self, kind: str, name: str) -> None:
        self.registered.remove(name)


def boxes_of(inputs: Arrays) -> Arrays:
    """Outputs that identify their image."""
    marks = inputs["images"].reshape(len(inputs["images"]), -1)[:, :1].astype(np.float32)
    return {"boxes": np.repeat(marks, 1200, 1).reshape(-1, 300, 4), "scores": np.repeat(marks, 300, 1)}


def inputs(batch: int, first: int = 1) -> Arrays:
    images = np.zeros((batch, 128, 160, 3), np.uint8)
    images += np.arange(first, first + batch, dtype=np.uint8)[:, None, None, None]
    return {"images": images, "score_threshold": np.array([0.3], np.float32), "iou_threshold": np.array([0.4], np.float32)}


def slot(server: Standing, model: ModelInfo, kind: SharedMemory, batch: int = 2) -> Slot:
    made = Slot(model, batch, kind)
    asyncio.run(made.allocate(server))  # type: ignore[arg-type]
    return made


def run(made: Slot, server: Standing, given: Arrays) -> Arrays:
    return asyncio.run(made.run(server, given))  # type: ignore[arg-type]


def close(made: Slot, server: Standing) -> None:
    asyncio.run(made.close(server))  # type: ignore[arg-type]
    assert server.registered == []
    assert not list(FOLDER.glob(f"{prefix_of(Standing.endpoint)}*"))


@pytest.mark.parametrize("kind", ["none", "system"])
@pytest.mark.parametrize(("max_batch", "thresholds"), [(8, (2, 1)), (0, (1,))])
@pytest.mark.parametrize("batch", [2, 3])
def test_shapes(kind: SharedMemory, max_batch: int, thresholds: tuple[int, ...], batch: int) -> None:
    """With a batch everything has it in front, else thresholds have none; a batch too large for the memory goes without."""
    server = Standing(boxes_of)
    made = slot(server, remote_model(max_batch=max_batch), kind)
    for first in (1, 7):
        found = run(made, server, inputs(batch, first))
        assert server.asked["score_threshold"].shape == ((batch, 1) if max_batch else thresholds)
        assert server.asked["iou_threshold"].ravel().tolist() == pytest.approx([0.4] * (batch if max_batch else 1))
        assert found["boxes"].shape == (batch, 300, 4)
        assert found["scores"][:, 0].tolist() == list(range(first, first + batch))
        assert found["boxes"][:, 299, 3].tolist() == list(range(first, first + batch))
    close(made, server)


def any_size() -> ModelInfo:
    """The usual image of a batch of 2 takes 1200 bytes each."""
    model = remote_model()
    info = replace(model.info, input="image", image_sizes=((4, 4), (20, 20), (400, 400)))
    images = TensorInfo("images", np.dtype(np.uint8), (-1, -1, 3))
    return replace(model, info=info, inputs={**model.inputs, "images": images})


@pytest.mark.parametrize("kind", ["none", "system"])
def test_memory_for_images_of_any_size_grows(kind: SharedMemory) -> None:
    server = Standing(boxes_of)
    made = slot(server, any_size(), kind)
    regions = []
    for size, first in ((10, 1), (20, 3), (40, 5), (30, 7), (60, 9)):
        images = np.arange(first, first + 2, dtype=np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)
        found = run(made, server, {**inputs(2), "images": images})
        np.testing.assert_array_equal(server.asked["images"], images)
        assert found["scores"][:, 0].tolist() == [first, first + 1]
        regions.append(tuple(server.registered))
    shared = kind == "system"
    assert all(len(one) == shared for one in regions)
    assert len(set(regions)) == (3 if shared else 1), "a region for 20, 40 and 60 pixels"
    close(made, server)


def test_without_room_for_larger_images_requests_go_on_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Standing(boxes_of)
    made = slot(server, any_size(), "system")
    large, small = ({**inputs(2), "images": np.full((2, size, size, 3), size, np.uint8)} for size in (40, 10))
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", Mock(side_effect=OSError(28, "No space left on device")))
        with pytest.raises(DarktrtError, match="bytes of shared memory: No space left on device"):
            run(made, server, large)
    assert run(made, server, small)["scores"][:, 0].tolist() == [10, 10]
    close(made, server)


def test_inputs_that_the_model_does_not_have_stay_here() -> None:
    server = Standing(boxes_of)
    made = slot(server, remote_model(), "none")
    run(made, server, {**inputs(1), "image_size": np.zeros((1, 2), np.float32)})
    assert set(server.asked) == {"images", "score_threshold", "iou_threshold"}


def test_a_region_that_was_lost_is_registered_again() -> None:
    server = Standing(boxes_of)
    made = slot(server, remote_model(), "system")
    server.registered.clear()
    server.fail = [RegionLostError("lost")]
    assert run(made, server, inputs(2))["scores"][:, 0].tolist() == [1, 2]
    close(made, server)


@pytest.mark.parametrize("again", [None, DarktrtError("shared memory is disabled")])
def test_memory_that_is_taken_away_again_costs_no_answer(monkeypatch: pytest.MonkeyPatch, again: DarktrtError | None) -> None:
    """Any client can make the server forget all regions: such a request goes without, and the next one tries again."""
    server = Standing(boxes_of)
    made = slot(server, remote_model(), "system")
    server.registered.clear()
    server.fail = [] if again else 2 * [RegionLostError("lost")]
    with monkeypatch.context() as patch:
        if again:
            patch.setattr(server, "register_system", Mock(side_effect=again))
        assert run(made, server, inputs(2))["scores"][:, 0].tolist() == [1, 2]
    assert all(place is None for _, _, place in server.sent)
    assert run(made, server, inputs(2, 5))["scores"][:, 0].tolist() == [5, 6]
    assert any(place for _, _, place in server.sent)
    close(made, server)


def test_a_server_that_goes_while_memory_is_registered_again_is_said_to_be_away() -> None:
    server = Standing(boxes_of)
    made = slot(server, remote_model(), "system")
    server.registered.clear()
    server.away = True
    with pytest.raises(DarktrtError, match="cannot be reached"):
        run(made, server, inputs(2))
    server.away = False
    assert run(made, server, inputs(2))["scores"][:, 0].tolist() == [1, 2]
    close(made, server)


def test_memory_that_becomes_smaller_costs_no_answer() -> None:
    """Whoever has this user's rights can do it, before a request or during one; it would end a process that maps the file."""
    server = Standing(boxes_of)
    made = slot(server, remote_model(), "system")
    (region,) = server.registered
    size = (FOLDER / region).stat().st_size
    os.truncate(FOLDER / region, 0)
    assert run(made, server, inputs(2))["scores"][:, 0].tolist() == [1, 2]
    assert (FOLDER / region).stat().st_size == size
    assert any(place for _, _, place in server.sent)
    server.truncate = True
    assert run(made, server, inputs(2, 3))["scores"][:, 0].tolist() == [3, 4]
    assert all(place is None for _, _, place in server.sent)
    close(made, server)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"boxes": np.zeros((2, 300, 4), np.float32)}, "it has no output 'scores', not float32 [2, 300]"),
        (
            {"boxes": np.zeros((2, 299, 4), np.float32), "scores": np.zeros((2, 300), np.float32)},
            "it has float32 [2, 299, 4] as output 'boxes', not float32 [2, 300, 4]",
        ),
        (
            {"boxes": np.zeros((2, 300, 4), np.float64), "scores": np.zeros((2, 300), np.float32)},
            "it has float64 [2, 300, 4] as output 'boxes', not float32 [2, 300, 4]",
        ),
    ],
)
def test_answers_of_other_shapes(outputs: Arrays, said: str) -> None:
    server = Standing(lambda _: outputs)
    made = slot(server, remote_model(), "none")
    with pytest.raises(DarktrtError, match=re.escape(said)):
        run(made, server, inputs(2))


def test_sizes_that_a_model_leaves_open_may_be_any() -> None:
    model = remote_model()
    boxes = TensorInfo("boxes", np.dtype(np.float32), (-1, 4))
    for rows in (0, 7):
        server = Standing(lambda _, rows=rows: {"boxes": np.zeros((2, rows, 4), np.float32)})  # type: ignore[misc]
        made = slot(server, replace(model, outputs={"boxes": boxes}), "none")
        assert run(made, server, inputs(2))["boxes"].shape == (2, rows, 4)


def test_memory_that_a_late_answer_may_reach_is_used_no_more() -> None:
    server = Standing(boxes_of)
    made = slot(server, remote_model(), "system")
    server.fail = [TimedOutError("late")]
    with pytest.raises(TimedOutError):
        run(made, server, inputs(2))
    assert run(made, server, inputs(2, 5))["scores"][:, 0].tolist() == [5, 6]
    first, second = server.registered
    assert not any((FOLDER / first).read_bytes()[-1200:]), "nobody wrote there"
    assert any((FOLDER / second).read_bytes())
    close(made, server)


def config(info: DetectorInfo, **changes: Any) -> dict[str, Any]:
    """In gRPC's form: numbers as text, zeros left out."""
    entry = {"name": "images", "data_type": "TYPE_UINT8", "dims": ["64", "96", "3"]}
    made = {"name": "m", "backend": "python", "max_batch_size": 3, "input": [entry], "output": []}
    return {**made, "parameters": {METADATA_KEY: {"string_value": info.to_json()}}, **changes}


def test_what_the_server_says_of_a_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    info = make(tmp_path_factory.mktemp("info"), MADE_CFG).info
    model = ModelInfo.from_config(config(info), "grpc://a:1", "2")
    assert (model.name, model.version, model.max_batch, model.encoded) == ("m", "2", 3, False)
    assert model.info == info
    assert model.shape(model.inputs["images"], 2) == (2, 64, 96, 3)
    assert model.size(model.inputs["images"], 2) == 2 * 64 * 96 * 3
    plain = replace(model, max_batch=0)  # its dims have the batch
    for dims, shape in (((-1, 64, 96, 3), (5, 64, 96, 3)), ((2, -1, 96, 3), (2, -1, 96, 3)), ((-1,), (5,)), ((2,), (2,))):
        assert plain.shape(replace(model.inputs["images"], dims=dims), 5) == shape
    with pytest.raises(DarktrtError, match="a:1: model 'm' has no darktrt metadata; make it with 'darktrt serve repository'"):
        ModelInfo.from_config(config(info, parameters={}), "grpc://a:1")
    with pytest.raises(DarktrtError, match="model 'm': the darktrt metadata is damaged"):
        ModelInfo.from_config(config(info, parameters={METADATA_KEY: {"string_value": "{}"}}), "grpc://a:1")
    odd = [{"name": "x", "data_type": "TYPE_BF16", "dims": ["1"]}]
    with pytest.raises(DarktrtError, match="'x' is TYPE_BF16"):
        ModelInfo.from_config(config(info, output=odd), "grpc://a:1")
