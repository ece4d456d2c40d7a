"""The model that Triton's Python backend runs: an ONNX file or a plan behind requests of tensors or of encoded images.

It lies in the model repository and runs on the server's Python with numpy, and onnxruntime or tensorrt; encoded images need
pillow.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from darktrt.engine.runtime import OnnxRunner, PlanRunner, Tensors
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.serve.model_info import ENCODED_INPUT, ModelInfo

ONNX_NAME, PLAN_NAME, PLUGINS_NAME = "model.onnx", "model.plan", "libdarktrt_plugins.so"
"""Of the files in a version's folder."""

MOST_BYTES = 32 << 20
MOST_PIXELS = 64_000_000
"""Of an encoded image; a file of a few kilobytes may declare any number of pixels."""

_OUTPUTS = ("num_detections", "boxes", "scores", "classes")

_Value = TypeVar("_Value")


class Runner(Protocol):
    """A model that can be run: :class:`darktrt.engine.runtime.OnnxRunner` or :class:`darktrt.engine.runtime.PlanRunner`."""

    info: DetectorInfo

    def run(self, inputs: dict[str, NDArray[Any]]) -> Tensors: ...
    def buffer(self, batch: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Row:
    """One image as the network's input, with the parameters of its NMS."""

    image: NDArray[Any]
    thresholds: Thresholds
    image_size: tuple[float, float] = (1.0, 1.0)
    """Width and height of the image inside the network's input, for models with the input ``image_size``."""

    @property
    def pair(self) -> tuple[float, float]:
        """The thresholds of score and IoU, to sort by."""
        return self.thresholds.score, self.thresholds.iou


@dataclass(frozen=True)
class Result:
    """The outputs of a row."""

    outputs: Tensors
    """Of all rows that ran together."""
    index: int
    """Of the row in them."""


def run_rows(runner: Runner, rows: Sequence[Row]) -> list[Result]:
    """The results of the rows, in order; rows of the same thresholds run together.

    Raises:
        DarktrtError: the model fails.
    """
    results: dict[int, Result] = {}
    for chunk in _chunks(rows, runner.info.batch[2]):
        outputs = _run_chunk(runner, [rows[i] for i in chunk])
        copies = {name: outputs[name].copy() for name in _OUTPUTS}  # the next run writes into the same memory
        results |= {i: Result(copies, index) for index, i in enumerate(chunk)}
    return [results[i] for i in range(len(rows))]


def gather(results: Sequence[Result]) -> Tensors:
    """The outputs of rows, stacked: a view where the rows lie one behind the other."""
    outputs, first = results[0].outputs, results[0].index
    if all(result.outputs is outputs and result.index == first + i for i, result in enumerate(results)):
        return {name: array[first : first + len(results)] for name, array in outputs.items()}
    return {name: np.stack([result.outputs[name][result.index] for result in results]) for name in outputs}


def _chunks(rows: Sequence[Row], largest: int) -> Iterator[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: rows[i].pair)
    for _, same in groupby(order, key=lambda i: rows[i].pair):
        group = list(same)
        yield from (group[begin : begin + largest] for begin in range(0, len(group), largest))


def _run_chunk(runner: Runner, rows: Sequence[Row]) -> Tensors:
    """Run rows of the same thresholds; the runner's own memory is the batch, so that nothing is copied twice."""
    images = runner.buffer(max(len(rows), runner.info.batch[0]))
    for i, row in enumerate(rows):
        images[i] = row.image
    images[len(rows) :] = 0
    return runner.run(runner.info.model_inputs(images, [row.image_size for row in rows], rows[0].thresholds))


def make_runner(folder: Path, threads: int = 0, gpu: int | None = None, cuda_graph: bool = False) -> OnnxRunner | PlanRunner:
    """The model of a version's folder, ready to run.

    Raises:
        DarktrtError: it does not run here.
    """
    if (folder / PLAN_NAME).is_file():
        library = folder / PLUGINS_NAME
        return PlanRunner(folder / PLAN_NAME, library if library.is_file() else None, cuda_graph, gpu or 0)
    return OnnxRunner(folder / ONNX_NAME, threads, gpu)


class TritonPythonModel:
    """An instance of the model; Triton prescribes the names of the class and of its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; Triton reports an exception and leaves the model out."""
        self._triton = importlib.import_module("triton_python_backend_utils")  # exists only inside the server
        config = json.loads(args["model_config"])
        self._model = ModelInfo.from_config(config, "config.pbtxt")
        instances = sum(int(group["count"]) for group in config["instance_group"])
        threads = max(1, (os.cpu_count() or 1) // max(1, instances))
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        folder = Path(args["model_repository"]) / args["model_version"]
        self._runner = make_runner(folder, threads, gpu, self._model.cuda_graph)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request; one that cannot be answered gets an error of its own, the others are answered."""
        parsed = [_or_error(self._parse, request) for request in requests]
        answers = self._answers(parsed)
        return [self._response(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def finalize(self) -> None:
        """Release the model."""
        self._runner.__exit__(None, None, None)

    def _parse(self, request: Any) -> DetectionRequest:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        return _parse_encoded(tensors, self._model) if self._model.encoded else _parse_tensors(tensors, self._model)

    def _answers(self, parsed: Sequence[DetectionRequest | DarktrtError]) -> list[Tensors | DarktrtError]:
        """Outputs by name for each request; the rows of all requests run together."""
        rows = [row for request in parsed if isinstance(request, DetectionRequest) for row in request.rows]
        results = _or_error(run_rows, self._runner, rows)
        if isinstance(results, DarktrtError):
            return [request if isinstance(request, DarktrtError) else results for request in parsed]
        rest = iter(results)
        return [self._answer(request, rest) for request in parsed]

    def _answer(self, request: DetectionRequest | DarktrtError, results: Iterator[Result]) -> Tensors | DarktrtError:
        """The outputs for one request, whose rows have the next results."""
        if isinstance(request, DarktrtError):
            return request
        outputs = gather([next(results) for _ in request.rows])
        return _or_error(request.outputs, outputs, self._model.info)

    def _response(self, request: Any, answer: Tensors | DarktrtError) -> Any:
        if isinstance(answer, DarktrtError):
            return self._triton.InferenceResponse(error=self._triton.TritonError(str(answer)))
        wanted = set(request.requested_output_names())
        tensors = [self._triton.Tensor(name, array) for name, array in answer.items() if name in wanted]
        return self._triton.InferenceResponse(output_tensors=tensors)


def _or_error(function: Callable[..., _Value], *arguments: Any) -> _Value | DarktrtError:
    """The value of the function, or the user's error in it."""
    try:
        return function(*arguments)
    except DarktrtError as error:
        return error


@dataclass(frozen=True)
class DetectionRequest:
    """The images of one request."""

    rows: list[Row]

    def outputs(self, outputs: Tensors, info: DetectorInfo) -> Tensors:
        """The response's tensors from the network's; here they are the same, with boxes in pixels of the network's input."""
        return outputs


@dataclass(frozen=True)
class EncodedRequest(DetectionRequest):
    """The encoded images of one request."""

    placements: list[Any] = field(default_factory=list)
    """Each image's :class:`darktrt.vision.images.Placement` in the network's input."""

    def outputs(self, outputs: Tensors, info: DetectorInfo) -> Tensors:
        """The response's tensors: boxes in pixels of the images, as many rows as the image with the most detections has, and
        the detections as JSON."""
        from darktrt.vision.boxes import place_detections

        boxes, texts = outputs["boxes"].copy(), []
        for i, (count, placement) in enumerate(zip(outputs["num_detections"][:, 0], self.placements, strict=True)):
            raw = boxes[i, :count], outputs["scores"][i, :count], outputs["classes"][i, :count]
            placed = place_detections(*raw, placement, info.class_names)
            boxes[i, :count] = placed.boxes
            texts.append([json.dumps(placed.to_list(), ensure_ascii=False).encode()])
        most = int(outputs["num_detections"].max())
        padded = {"boxes": boxes, "scores": outputs["scores"], "classes": outputs["classes"]}
        cut = {name: array[:, :most] for name, array in padded.items()}
        return {**cut, "num_detections": outputs["num_detections"], "detections": np.array(texts, object)}


def _parse_tensors(tensors: Mapping[str, NDArray[Any]], model: ModelInfo) -> DetectionRequest:
    images = tensors["images"]
    sizes = [(float(width), float(height)) for width, height in tensors.get("image_size", np.ones((len(images), 2)))]
    thresholds = _thresholds(tensors, model.thresholds, len(images))
    return DetectionRequest([Row(*row) for row in zip(images, thresholds, sizes, strict=True)])


def _parse_encoded(tensors: Mapping[str, NDArray[Any]], model: ModelInfo) -> EncodedRequest:
    from darktrt.vision.images import decode_image, preprocess

    info, files = model.info, tensors[ENCODED_INPUT].reshape(-1)
    rows, placements = [], []
    for i, (file, thresholds) in enumerate(zip(files, _thresholds(tensors, model.thresholds, len(files)), strict=True)):
        pixels = decode_image(_image_bytes(file), f"image {i}", MOST_PIXELS)
        image, placement = preprocess(pixels, info.width, info.height, info.channels, info.resize, info.input)
        rows.append(Row(image, thresholds, placement.inner_size))
        placements.append(placement)
    return EncodedRequest(rows, placements)


def _image_bytes(file: bytes) -> bytes:
    """A file's bytes, also from base64 text, because JSON cannot carry bytes."""
    if len(file) > MOST_BYTES:
        raise DarktrtError(f"the image has {len(file):,} bytes, more than {MOST_BYTES:,}; scale it down first")
    try:
        return base64.b64decode(file, validate=True)
    except ValueError:
        return file


def _thresholds(tensors: Mapping[str, NDArray[Any]], default: Thresholds, count: int) -> list[Thresholds]:
    """One record an image; thresholds that the request does not set have the model's defaults."""
    scores, overlaps = (
        tensors[name].reshape(-1).tolist() if name in tensors else [value] * count
        for name, value in (("score_threshold", default.score), ("iou_threshold", default.iou))
    )
    return [Thresholds(*pair) for pair in zip(scores, overlaps, strict=True)]
