"""What Triton's Python backend runs: an ONNX file or a plan behind requests of tensors or of encoded images.

It travels inside the model repository and runs on the server's Python: numpy, and onnxruntime or tensorrt; pillow for encoded
images.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from darktrt.engine.runtime import OnnxRunner, PlanRunner, Tensors
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo

ONNX_NAME, PLAN_NAME, PLUGINS_NAME = "model.onnx", "model.plan", "libdarktrt_plugins.so"
"""Of the files in a version's folder."""

MOST_BYTES = 32 << 20
MOST_PIXELS = 64_000_000
"""Of an encoded image; a file of a few kilobytes may declare any number of pixels."""

_OUTPUTS = ("num_detections", "boxes", "scores", "classes")


class Runner(Protocol):
    """A model that can be run: :class:`darktrt.engine.runtime.OnnxRunner` or :class:`darktrt.engine.runtime.PlanRunner`."""

    info: DetectorInfo

    def run(self, inputs: dict[str, NDArray[Any]]) -> Tensors: ...
    def buffer(self, batch: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Row:
    """One image as the network takes it, with what NMS is to do with it."""

    image: NDArray[Any]
    score_threshold: float
    iou_threshold: float
    image_size: tuple[float, float] | None = None
    """For models that take it: width and height of the image inside the network's input."""

    @property
    def thresholds(self) -> tuple[float, float]:
        return self.score_threshold, self.iou_threshold


@dataclass(frozen=True)
class Result:
    """Where a row's outputs are."""

    outputs: Tensors
    """Of all that ran together."""
    place: int


def run_rows(runner: Runner, rows: Sequence[Row]) -> list[Result]:
    """The results of the rows, in order; rows of the same thresholds run together.

    Raises:
        DarktrtError: the model fails.
    """
    results: dict[int, Result] = {}
    for chunk in _chunks(rows, runner.info.batch[2]):
        outputs = _run_chunk(runner, [rows[i] for i in chunk])
        copies = {name: outputs[name].copy() for name in _OUTPUTS}  # the next run writes into the same memory
        results |= {i: Result(copies, place) for place, i in enumerate(chunk)}
    return [results[i] for i in range(len(rows))]


def gather(results: Sequence[Result]) -> Tensors:
    """The outputs of rows, one behind the other: a view where they ran so."""
    outputs, first = results[0].outputs, results[0].place
    if all(one.outputs is outputs and one.place == first + i for i, one in enumerate(results)):
        return {name: array[first : first + len(results)] for name, array in outputs.items()}
    return {name: np.stack([one.outputs[name][one.place] for one in results]) for name in outputs}


def _chunks(rows: Sequence[Row], largest: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: rows[i].thresholds)
    for _, same in groupby(order, key=lambda i: rows[i].thresholds):
        group = list(same)
        yield from (group[begin : begin + largest] for begin in range(0, len(group), largest))


def _run_chunk(runner: Runner, rows: Sequence[Row]) -> Tensors:
    batch = max(len(rows), runner.info.batch[0])
    images = runner.buffer(batch)
    for i, row in enumerate(rows):
        images[i] = row.image
    images[len(rows) :] = 0
    inputs = {"images": images}
    if runner.info.takes_thresholds:
        thresholds = np.array(rows[0].thresholds, np.float32)
        inputs |= {"score_threshold": thresholds[:1], "iou_threshold": thresholds[1:]}
    if runner.info.takes_image_size:
        sizes = [row.image_size or (1.0, 1.0) for row in rows]
        inputs["image_size"] = np.array(sizes + sizes[:1] * (batch - len(rows)), np.float32)
    return runner.run(inputs)


@dataclass(frozen=True)
class Settings:
    """What config.pbtxt says to the backend."""

    info: DetectorInfo
    takes_files: bool
    """Encoded images instead of tensors."""
    score_threshold: float
    iou_threshold: float
    cuda_graph: bool

    @staticmethod
    def of(config: dict[str, Any]) -> Settings:
        """From Triton's JSON of it."""
        values = {name: value["string_value"] for name, value in config["parameters"].items()}
        return Settings(
            DetectorInfo.from_json(values[METADATA_KEY], "config.pbtxt"),
            values["input"] == "jpeg",
            float(values["score_threshold"]),
            float(values["iou_threshold"]),
            values["cuda_graph"] == "true",
        )


def make_runner(folder: Path, settings: Settings, threads: int, gpu: int | None) -> OnnxRunner | PlanRunner:
    """The model of a version's folder, ready to run.

    Raises:
        DarktrtError: it does not run here.
    """
    if (folder / PLAN_NAME).is_file():
        library = folder / PLUGINS_NAME
        return PlanRunner(folder / PLAN_NAME, library if library.is_file() else None, settings.cuda_graph, gpu or 0)
    return OnnxRunner(folder / ONNX_NAME, threads, gpu)


class TritonPythonModel:
    """An instance of the model; the names of the class and of its methods are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; an exception makes Triton report it and leave the model out."""
        self._triton = importlib.import_module("triton_python_backend_utils")  # inside the server alone
        config = json.loads(args["model_config"])
        self._settings = Settings.of(config)
        instances = sum(int(group["count"]) for group in config["instance_group"])
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        folder = Path(args["model_repository"]) / args["model_version"]
        threads = max(1, (os.cpu_count() or 1) // max(1, instances))
        self._runner = make_runner(folder, self._settings, threads, gpu)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request, which is an error where the request cannot be served; the others are served."""
        read = [self._read(request) for request in requests]
        rows = [row for one in read if isinstance(one, _Images) for row in one.rows]
        try:
            results = iter(run_rows(self._runner, rows))
        except DarktrtError as error:
            read, results = [one if isinstance(one, DarktrtError) else error for one in read], iter(())
        return [self._respond(request, one, results) for request, one in zip(requests, read, strict=True)]

    def finalize(self) -> None:
        """Give everything back."""
        self._runner.__exit__(None, None, None)

    def _read(self, request: Any) -> _Images | DarktrtError:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        read = _read_files if self._settings.takes_files else _read_tensors
        try:
            return read(tensors, self._settings)
        except DarktrtError as error:
            return error

    def _respond(self, request: Any, read: _Images | DarktrtError, results: Iterator[Result]) -> Any:
        """The response to a request, for which the next of the results are."""
        try:
            if isinstance(read, DarktrtError):
                raise read
            outputs = read.outputs(gather([next(results) for _ in read.rows]), self._settings.info)
        except DarktrtError as error:
            return self._triton.InferenceResponse(error=self._triton.TritonError(str(error)))
        wanted = set(request.requested_output_names())
        tensors = [self._triton.Tensor(name, array) for name, array in outputs.items() if name in wanted]
        return self._triton.InferenceResponse(output_tensors=tensors)


@dataclass(frozen=True)
class _Images:
    """Of one request."""

    rows: list[Row]

    def outputs(self, found: Tensors, info: DetectorInfo) -> Tensors:
        """The response's tensors from the network's, boxes in pixels of the network's input."""
        return found


@dataclass(frozen=True)
class _Files(_Images):
    placements: list[Any]
    """Where each image lies in the network's input, as :class:`darktrt.vision.images.Placement`."""

    def outputs(self, found: Tensors, info: DetectorInfo) -> Tensors:
        """With boxes in pixels of the images, no more rows than the largest number found, and the detections as JSON."""
        from darktrt.vision.boxes import place_detections

        boxes, texts = found["boxes"].copy(), []
        for i, (count, placement) in enumerate(zip(found["num_detections"][:, 0], self.placements, strict=True)):
            raw = boxes[i, :count], found["scores"][i, :count], found["classes"][i, :count]
            placed = place_detections(*raw, placement, info.class_names)
            boxes[i, :count] = placed.boxes
            texts.append([json.dumps(placed.to_list(), ensure_ascii=False).encode()])
        most = int(found["num_detections"].max())
        padded = {"boxes": boxes, "scores": found["scores"], "classes": found["classes"]}
        cut = {name: array[:, :most] for name, array in padded.items()}
        return {**cut, "num_detections": found["num_detections"], "detections": np.array(texts, object)}


def _read_tensors(tensors: dict[str, NDArray[Any]], settings: Settings) -> _Images:
    images = tensors["images"]
    sizes = tensors.get("image_size")
    scores, ious = _thresholds(tensors, settings, len(images))
    return _Images(
        [
            Row(image, score, iou, None if sizes is None else (float(sizes[i][0]), float(sizes[i][1])))
            for i, (image, score, iou) in enumerate(zip(images, scores, ious, strict=True))
        ]
    )


def _read_files(tensors: dict[str, NDArray[Any]], settings: Settings) -> _Files:
    from darktrt.vision.images import decode_image, preprocess

    info, files = settings.info, tensors["image"].reshape(-1)
    scores, ious = _thresholds(tensors, settings, len(files))
    rows, placements = [], []
    for i, (file, score, iou) in enumerate(zip(files, scores, ious, strict=True)):
        pixels = decode_image(_image_bytes(file), f"image {i}", MOST_PIXELS)
        image, placement = preprocess(pixels, info.width, info.height, info.channels, info.resize, info.input)
        rows.append(Row(image, score, iou, placement.inner_size))
        placements.append(placement)
    return _Files(rows, placements)


def _image_bytes(file: bytes) -> bytes:
    """A file's bytes, also from base64 text, for JSON cannot carry bytes."""
    if len(file) > MOST_BYTES:
        raise DarktrtError(f"the image has {len(file):,} bytes, more than {MOST_BYTES:,}; scale it down first")
    try:
        return base64.b64decode(file, validate=True)
    except ValueError:
        return file


def _thresholds(tensors: dict[str, NDArray[Any]], settings: Settings, count: int) -> tuple[list[float], list[float]]:
    """Score and IoU thresholds, one an image."""
    defaults = {"score_threshold": settings.score_threshold, "iou_threshold": settings.iou_threshold}
    found = []
    for name, default in defaults.items():
        values = tensors[name].reshape(-1).tolist() if name in tensors else [default] * count
        if wrong := [value for value in values if not 0 <= value <= 1]:
            raise DarktrtError(f"{name} is {wrong[0]:g}; it must be between 0 and 1")
        found.append(values)
    return found[0], found[1]
