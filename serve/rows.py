"""Rows, the images of requests: decoded ahead in threads, run in batches of the model's, their results in the rows' order."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Frame, host_pixels
from darktrt.engine.runtime import PlanRunner, Tensors
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds

if TYPE_CHECKING:
    from darktrt.vision.boxes import Detections
    from darktrt.vision.decode import Ahead, Decoder
    from darktrt.vision.images import Placement

MOST_BYTES = 32 << 20
MOST_PIXELS = 64_000_000
"""Of an encoded image, for a file of a few kilobytes may declare any number of pixels; and of a batch of images, unless it is
one image."""

OUTPUTS = ("num_detections", "boxes", "scores", "classes")


class Runner(Protocol):
    """A model that can be run: :class:`darktrt.engine.runtime.OnnxRunner` or :class:`darktrt.engine.runtime.PlanRunner`."""

    info: DetectorInfo

    def run(self, inputs: dict[str, NDArray[Any]]) -> Tensors: ...
    def buffer(self, batch: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Row:
    """One image, with the parameters of its NMS."""

    image: Frame | NDArray[Any]
    """The model's input, without the batch; or a decoded image where the runner fits it."""
    thresholds: Thresholds
    image_size: tuple[float, float] = (1.0, 1.0)
    """Width and height of the image inside the network's input, for models with the input ``image_size``."""
    placement: Placement | None = None
    """Of a decoded image."""


@dataclass(frozen=True)
class EncodedRow:
    """One encoded image, with the parameters of its NMS."""

    file: bytes
    name: str
    """Of the image in errors."""
    thresholds: Thresholds


@dataclass(frozen=True)
class Result:
    """The outputs of a row."""

    outputs: Tensors
    """Of all rows that ran together."""
    index: int
    """Of the row in them."""
    placement: Placement | None = None
    """Of a decoded image."""

    def placed(self, info: DetectorInfo) -> Detections:
        """The detections of a decoded image, in its pixels.

        Raises:
            DarktrtError: the results are no detections, but infinite or no numbers.
        """
        from darktrt.vision.boxes import place_detections

        assert self.placement
        count = int(self.outputs["num_detections"][self.index].item())
        boxes, scores, classes = (self.outputs[name][self.index, :count] for name in ("boxes", "scores", "classes"))
        return place_detections(boxes, scores, classes, self.placement, info.class_names)


@dataclass(frozen=True)
class _Indexed:
    index: int
    """Of the row among those that were given."""
    row: Row


class RowRunner:
    """Runs rows in batches of a model; while one runs, the images of the next are decoded and uploaded.

    Args:
        runner: the model.
        decoder: of encoded rows; its threads also fit the images into the network's input, where the runner does not.
    """

    def __init__(self, runner: Runner | PlanRunner, decoder: Decoder | None = None) -> None:
        self._info = runner.info
        self._buffer = runner.buffer
        self._runner = runner if isinstance(runner, PlanRunner) else _InTurn(runner)
        self._decoder = decoder

    def run(self, rows: Sequence[Row | EncodedRow]) -> list[Result | DarktrtError]:
        """The result of each row, in order, or what is wrong with its image or with the batch that it ran in.

        Rows of the same thresholds, and of images of any size those of one size, run together.
        """
        results: dict[int, Result | DarktrtError] = {}
        under_way: deque[list[_Indexed]] = deque()
        try:
            for batch in self._batches(self._ready(rows, results)):
                if len(under_way) == self._runner.depth:
                    results |= self._collect(under_way.popleft())
                if error := self._submit(batch):
                    results |= {one.index: error for one in batch}
                else:
                    under_way.append(batch)
        finally:  # also after an error, for the runner must be idle at the next call
            while under_way:
                results |= self._collect(under_way.popleft())
        return [results[i] for i in range(len(rows))]

    # --- images ---

    def _ready(self, rows: Sequence[Row | EncodedRow], results: dict[int, Result | DarktrtError]) -> Iterator[_Indexed]:
        """The rows with their images, by thresholds; those whose images are wrong have their results at once."""
        order = sorted(range(len(rows)), key=lambda i: _pair(rows[i]))
        for index, row in zip(order, self._decoded([rows[i] for i in order]), strict=True):
            if isinstance(row, DarktrtError):
                results[index] = row
            else:
                yield _Indexed(index, row)

    def _decoded(self, rows: Sequence[Row | EncodedRow]) -> Iterator[Row | DarktrtError]:
        """The rows; encoded ones are decoded, in the threads of the decoder and as far ahead as is allowed."""
        if self._decoder is None:
            yield from (row for row in rows if isinstance(row, Row))
            return
        from darktrt.vision.decode import MOST_IMAGES, Ahead

        with closing(Ahead(self._decoder, 3 * MOST_PIXELS)) as ahead:
            started = (_Decoding(self, ahead, row) for row in rows if isinstance(row, EncodedRow))
            waiting = deque(islice(started, MOST_IMAGES))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(islice(started, 1))

    def fitted(self, image: Frame, thresholds: Thresholds) -> Row:
        """An RGB image ``(H, W, 3)`` uint8 as the runner accepts it.

        Raises:
            DarktrtError: the model accepts no images of this size.
        """
        from darktrt.vision.detector import fit, placement_in

        if self._runner.fits_frames:
            placement = placement_in(image, self._info)
            return Row(image, thresholds, placement.inner_size, placement)
        fitted, placement = fit(host_pixels(image), self._info)
        return Row(fitted, thresholds, placement.inner_size, placement)

    # --- batches ---

    def _batches(self, rows: Iterable[_Indexed]) -> Iterator[list[_Indexed]]:
        """Rows that can run together, as many as the model accepts."""
        largest = self._info.batch[2]
        for _, same in groupby(rows, key=lambda one: _pair(one.row)):
            groups: dict[tuple[int, ...], list[_Indexed]] = {}
            for one in same:
                shape = one.row.image.shape if self._info.input == "image" else ()
                if self._pixels(group := groups.setdefault(shape, [])) + self._pixels([one]) > MOST_PIXELS and group:
                    yield groups.pop(shape)
                groups.setdefault(shape, []).append(one)
                if len(groups[shape]) == largest:
                    yield groups.pop(shape)
            yield from groups.values()

    def _pixels(self, batch: Sequence[_Indexed]) -> int:
        """The pixels of images that the runner fits; others are as large as the network's input."""
        shapes = [one.row.image.shape for one in batch if self._fits(one.row)]
        return sum(height * width for height, width, _ in shapes)

    def _fits(self, row: Row) -> bool:
        """Whether the runner fits the row's image into the network's input."""
        return self._info.input == "image" or (row.placement is not None and self._runner.fits_frames)

    def _submit(self, batch: Sequence[_Indexed]) -> DarktrtError | None:
        """Begin a batch; the error if it cannot begin."""
        rows = [one.row for one in batch]
        count = max(len(rows), self._info.batch[0])
        inputs = self._info.other_inputs(count, [row.image_size for row in rows], rows[0].thresholds)
        try:
            self._runner.submit(self._images(rows, count), inputs)
        except DarktrtError as error:
            return error
        return None

    def _images(self, rows: Sequence[Row], count: int) -> NDArray[Any] | list[Frame]:
        """What the runner accepts: images of any size, or the network's input, written into the runner's own memory."""
        if self._fits(rows[0]):
            return [row.image for row in rows] + [rows[0].image] * (count - len(rows))
        images = self._buffer(count)
        for i, row in enumerate(rows):
            images[i] = row.image
        images[len(rows) :] = 0
        return images

    def _collect(self, batch: Sequence[_Indexed]) -> dict[int, Result | DarktrtError]:
        """The results of the oldest batch under way."""
        try:
            outputs = self._runner.collect()
        except DarktrtError as error:
            return {one.index: error for one in batch}
        copies = {name: outputs[name].copy() for name in OUTPUTS}  # later batches are written into the same memory
        return {one.index: Result(copies, i, one.row.placement) for i, one in enumerate(batch)}


class _Decoding:
    """An encoded row whose image is being decoded and fitted."""

    def __init__(self, rows: RowRunner, ahead: Ahead, row: EncodedRow) -> None:
        self._rows, self._ahead, self._row = rows, ahead, row
        self._fitted: Future[Row] = Future()
        self._ticket = ahead.start(_image_bytes(row.file), row.name, _admit)
        self._ticket.future.add_done_callback(self._fit)

    def _fit(self, decoded: Future[Frame]) -> None:
        """In the thread that has decoded the image."""
        from darktrt.vision.decode import settle

        settle(self._fitted, lambda: self._rows.fitted(decoded.result(), self._row.thresholds))

    def result(self) -> Row | DarktrtError:
        try:
            self._ahead.finish([self._ticket])
        except DarktrtError as error:
            return error
        try:
            return self._fitted.result()
        except DarktrtError as error:
            return DarktrtError(f"{self._row.name}: {error}")


class _InTurn:
    """A runner of one batch at a time in the form of :class:`PlanRunner`."""

    depth = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.fits_frames = runner.info.input == "image"
        self._outputs: Tensors = {}

    def submit(self, images: NDArray[Any] | Sequence[Frame], inputs: dict[str, NDArray[Any]]) -> None:
        stacked = images if isinstance(images, np.ndarray) else np.stack([np.asarray(image) for image in images])
        self._outputs = self._runner.run({"images": stacked, **inputs})

    def collect(self) -> Tensors:
        return self._outputs


def _pair(row: Row | EncodedRow) -> tuple[float, float]:
    """The thresholds, to sort by."""
    return row.thresholds.score, row.thresholds.iou


def _image_bytes(file: bytes) -> bytes:
    """A file's bytes, also from base64 text, because JSON cannot carry bytes."""
    try:
        return base64.b64decode(file, validate=True)
    except ValueError:
        return file


def _admit(width: int, height: int) -> None:
    from darktrt.vision.images import check_pixels

    check_pixels(width, height, MOST_PIXELS)


def gather(results: Sequence[Result]) -> Tensors:
    """The outputs of rows, stacked: a view where the rows lie one behind the other."""
    outputs, first = results[0].outputs, results[0].index
    if all(result.outputs is outputs and result.index == first + i for i, result in enumerate(results)):
        return {name: array[first : first + len(results)] for name, array in outputs.items()}
    return {name: np.stack([result.outputs[name][result.index] for result in results]) for name in outputs}
