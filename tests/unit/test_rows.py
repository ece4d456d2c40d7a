"""Rows of requests: decoded ahead, batched by thresholds and size, and run on a GPU's runner, for which a stand-in is here."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import MADE_CFG, make
from numpy.typing import NDArray
from PIL import Image

from darktrt.engine.runtime import PlanRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import IMAGE_SIZES, DetectorInfo, Thresholds
from darktrt.serve import rows as rows_module
from darktrt.serve.rows import EncodedRow, Result, Row, RowRunner
from darktrt.vision.decode import Ahead, Decoder

LOW, HIGH = Thresholds(0.1), Thresholds(0.3)


class Standing(PlanRunner):
    """Stands for an engine that fits images: an image's score is its first pixel; overlapping batches end in order."""

    depth = 2
    fits_frames = True

    def __init__(self, info: DetectorInfo) -> None:
        self.info = info
        self.batches: list[tuple[float, list[int]]] = []
        self.under_way: deque[dict[str, NDArray[Any]]] = deque()
        self.fail: dict[str, Exception] = {}

    def submit(self, images: Any, inputs: Any) -> None:
        assert len(self.under_way) < self.depth, "more batches under way than the engine has memory for"
        assert isinstance(images, list), "images were fitted on the CPU"
        marks = [int(image[0, 0, 0]) for image in images]
        if self.info.input == "image":
            assert len({image.shape for image in images}) == 1
        if "submit" in self.fail:
            raise self.fail.pop("submit")
        self.batches.append((float(inputs["score_threshold"].item()), marks))
        ones = np.ones((len(images), 1), np.int32)
        boxes = np.tile(np.array([[[0, 0, *self.corner]]], np.float32), (len(images), 1, 1))
        scores = np.array(marks, np.float32)[:, None] / 255
        self.under_way.append({"num_detections": ones, "boxes": boxes, "scores": scores, "classes": 0 * ones})

    @property
    def corner(self) -> tuple[int, int]:
        return (5, 4) if self.info.input == "image" else (self.info.width, self.info.height)

    def collect(self) -> Any:
        outputs = self.under_way.popleft()
        if "collect" in self.fail:
            raise self.fail.pop("collect")
        return outputs


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> DetectorInfo:
    """Of a uint8 model that ends in NMS, 96 x 64, batch 1 to 3."""
    plain = make(tmp_path_factory.mktemp("info"), MADE_CFG, batch=(1, 3, 3)).info
    return replace(plain, input="uint8", head="nms", max_detections=1)


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    with Decoder(2) as decoder:
        yield decoder


def pixels(mark: int, width: int = 50, height: int = 40) -> NDArray[np.uint8]:
    return np.full((height, width, 3), mark, np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def encoded(images: Sequence[NDArray[np.uint8] | bytes], thresholds: Sequence[Thresholds] = ()) -> list[EncodedRow]:
    pairs = thresholds or [LOW] * len(images)
    files = [image if isinstance(image, bytes) else png(image) for image in images]
    return [EncodedRow(file, f"image {i}", pair) for i, (file, pair) in enumerate(zip(files, pairs, strict=True))]


def marks(results: Sequence[Result | DarktrtError]) -> list[int | str]:
    return [
        str(one) if isinstance(one, DarktrtError) else round(255 * float(one.outputs["scores"][one.index].item()))
        for one in results
    ]


def image_form(info: DetectorInfo) -> DetectorInfo:
    return replace(info, input="image", image_sizes=IMAGE_SIZES)


def test_images_reach_the_engine_unfitted_and_results_keep_their_order(info: DetectorInfo, decoder: Decoder) -> None:
    runner = Standing(info)
    images = [pixels(i, 40 + i, 50 - i) for i in range(10)]
    results = RowRunner(runner, decoder).run(encoded(images, [LOW, HIGH] * 5))
    assert marks(results) == list(range(10))
    assert [(round(score, 1), batch) for score, batch in runner.batches] == [
        (0.1, [0, 2, 4]),
        (0.1, [6, 8]),
        (0.3, [1, 3, 5]),
        (0.3, [7, 9]),
    ]
    for image, result in zip(images, results, strict=True):  # a box as large as the network's input is one around the image
        assert isinstance(result, Result)
        assert result.placed(info).boxes.tolist() == [[0, 0, image.shape[1], image.shape[0]]]


def test_images_of_one_size_run_together_where_the_model_fits_them(info: DetectorInfo, decoder: Decoder) -> None:
    runner = Standing(image_form(info))
    images = [pixels(i, *((60, 40) if i % 2 else (40, 60))) for i in range(8)]
    results = RowRunner(runner, decoder).run(encoded(images))
    assert marks(results) == list(range(8))
    assert [batch for _, batch in runner.batches] == [[0, 2, 4], [1, 3, 5], [6], [7]]
    assert isinstance(results[0], Result) and results[0].placed(runner.info).boxes.tolist() == [[0, 0, 5, 4]], "placed again"
    tensors = [Row(image, LOW) for image in images]
    assert marks(RowRunner(runner).run(tensors)) == list(range(8))


def test_a_static_batch_of_images_is_filled_up(info: DetectorInfo, decoder: Decoder) -> None:
    runner = Standing(replace(image_form(info), batch=(4, 4, 4)))
    assert marks(RowRunner(runner, decoder).run(encoded([pixels(7), pixels(8)]))) == [7, 8]
    assert [batch for _, batch in runner.batches] == [[7, 8, 7, 7]]


def test_an_image_that_is_wrong_has_its_own_error(info: DetectorInfo, decoder: Decoder) -> None:
    runner = Standing(image_form(info))
    images = [pixels(1), b"no image", pixels(2), pixels(3, 20, 20), pixels(4)]
    results = marks(RowRunner(runner, decoder).run(encoded(images)))
    assert [results[i] for i in (0, 2, 4)] == [1, 2, 4]
    assert str(results[1]).startswith("image 1: is not an image in a format read here")
    assert str(results[3]).startswith("image 3: made: an image is 20x20, but the model accepts 32x32 to 4096x4096")
    assert [batch for _, batch in runner.batches] == [[1, 2, 4]]


@pytest.mark.parametrize("where", ["submit", "collect"])
def test_a_batch_that_fails_is_the_error_of_its_rows(info: DetectorInfo, decoder: Decoder, where: str) -> None:
    runner = Standing(info)
    runner.fail[where] = DarktrtError("the GPU is gone")
    results = RowRunner(runner, decoder).run(encoded([pixels(i) for i in range(5)]))
    assert marks(results) == ["the GPU is gone"] * 3 + [3, 4]


def test_after_a_bug_nothing_is_under_way(info: DetectorInfo, decoder: Decoder) -> None:
    """The next call would get the answers of this one."""
    runner = Standing(info)
    submit = runner.submit

    def break_third(images: Any, inputs: Any) -> None:
        if len(runner.batches) == 1:
            raise ZeroDivisionError
        submit(images, inputs)

    runner.submit = break_third  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        RowRunner(runner, decoder).run(encoded([pixels(i) for i in range(9)]))
    assert not runner.under_way


def test_huge_images_run_in_smaller_batches(info: DetectorInfo, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MOST_PIXELS", 100 * 100)
    runner = Standing(info)
    images = [pixels(0, 90, 60), pixels(1, 60, 70), pixels(2, 90, 60), pixels(3, 20, 20), pixels(4, 20, 20), pixels(5, 20, 20)]
    assert marks(RowRunner(runner, decoder).run(encoded(images))) == list(range(6))
    assert [batch for _, batch in runner.batches] == [[0, 1], [2, 3, 4], [5]]


def test_a_batch_may_have_as_many_pixels_as_the_largest_image(
    info: DetectorInfo, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an image runs, by itself; where the model fits images too."""
    monkeypatch.setattr(rows_module, "MOST_PIXELS", 100 * 100)
    for one in (info, image_form(info)):
        runner = Standing(one)
        images = [pixels(0, 100, 50), pixels(1, 100, 50), pixels(2, 100, 100), pixels(3, 100, 50)]
        assert marks(RowRunner(runner, decoder).run(encoded(images))) == list(range(4))
        assert sorted(batch for _, batch in runner.batches) == [[0, 1], [2], [3]]
    large = "image 0: has 101x100 pixels, more than 10,000; scale it down first"
    assert marks(RowRunner(runner, decoder).run(encoded([pixels(0, 101, 100)]))) == [large]


def test_few_images_are_decoded_ahead(info: DetectorInfo, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may have any number of them; their pixels may be as many as those of one batch."""
    under_way, most, bytes_ahead = 0, 0, []

    class Counted(Ahead):
        def __init__(self, decoder: Decoder, most_bytes: int) -> None:
            bytes_ahead.append(most_bytes)
            super().__init__(decoder, most_bytes)

        def start(self, *arguments: Any) -> Any:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            return super().start(*arguments)

        def finish(self, tickets: Any) -> Any:
            nonlocal under_way
            under_way -= len(tickets)
            return super().finish(tickets)

    monkeypatch.setattr("darktrt.vision.decode.Ahead", Counted)
    monkeypatch.setattr("darktrt.vision.decode.MOST_IMAGES", 4)
    assert marks(RowRunner(Standing(info), decoder).run(encoded([pixels(i) for i in range(12)]))) == list(range(12))
    assert (most, under_way, bytes_ahead) == (4, 0, [3 * 64_000_000])


def test_images_are_decoded_while_a_batch_runs(info: DetectorInfo) -> None:
    """The first batch ends only when an image of the second is decoded."""
    decoded = {i: threading.Event() for i in range(6)}
    waited = []

    class Watched(RowRunner):
        def fitted(self, image: Any, thresholds: Thresholds) -> Row:
            decoded[int(image[0, 0, 0])].set()
            return super().fitted(image, thresholds)

    class Slow(Standing):
        def submit(self, images: Any, inputs: Any) -> None:
            if not self.batches:
                waited.append(decoded[4].wait(10))
            super().submit(images, inputs)

    runner = Slow(info)
    with Decoder(1) as decoder:
        assert marks(Watched(runner, decoder).run(encoded([pixels(i) for i in range(6)]))) == list(range(6))
    assert waited == [True]
