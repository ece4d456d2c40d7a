"""The model that Triton's Python backend runs: an ONNX file or a plan behind requests of tensors or of encoded images.

It lies in the model repository and runs on the server's Python with numpy, and onnxruntime or tensorrt; encoded images need
pillow.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Driver
from darktrt.engine.runtime import OnnxRunner, PlanRunner, Tensors
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.serve.model_info import ENCODED_INPUT, ModelInfo
from darktrt.serve.rows import MOST_BYTES, EncodedRow, Result, Row, RowRunner, gather

if TYPE_CHECKING:
    from darktrt.vision.decode import Decoder

ONNX_NAME, PLAN_NAME, PLUGINS_NAME = "model.onnx", "model.plan", "libdarktrt_plugins.so"
"""Of the files in a version's folder."""

_Value = TypeVar("_Value")


def make_runner(folder: Path, threads: int = 0, gpu: int | None = None, cuda_graph: bool = False) -> OnnxRunner | PlanRunner:
    """The model of a version's folder, ready to run.

    Raises:
        DarktrtError: it does not run here.
    """
    if (folder / PLAN_NAME).is_file():
        library = folder / PLUGINS_NAME
        return PlanRunner(folder / PLAN_NAME, library if library.is_file() else None, cuda_graph, gpu or 0)
    return OnnxRunner(folder / ONNX_NAME, threads, gpu, trusted=True)


def make_decoder(runner: OnnxRunner | PlanRunner, threads: int, gpu: int | None) -> Decoder:
    """A decoder for the images that a runner accepts: where it fits them, on its GPU, if nvImageCodec is installed."""
    from darktrt.vision.decode import Decoder

    if not (isinstance(runner, PlanRunner) and runner.fits_frames):
        return Decoder(threads)
    driver = Driver(gpu or 0)
    try:
        with driver.current():
            return Decoder(threads, "auto")
    finally:
        driver.close()  # the runner keeps the context


class TritonPythonModel:
    """An instance of the model; Triton prescribes the names of the class and of its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; Triton reports an exception and leaves the model out."""
        self._triton = importlib.import_module("triton_python_backend_utils")  # exists only inside the server
        config = json.loads(args["model_config"])
        self._model = ModelInfo.from_config(config, "config.pbtxt")
        instances = sum(int(group["count"]) * max(1, len(group.get("gpus", ()))) for group in config["instance_group"])
        threads = max(1, (os.cpu_count() or 1) // max(1, instances))
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        folder = Path(args["model_repository"]) / args["model_version"]
        self._runner = make_runner(folder, threads, gpu, self._model.cuda_graph)
        self._decoder = make_decoder(self._runner, threads, gpu) if self._model.encoded else None
        self._rows = RowRunner(self._runner, self._decoder)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request; one that cannot be answered gets an error of its own, the others are answered."""
        parsed = [_or_error(self._parse, request) for request in requests]
        results = iter(
            self._rows.run([row for request in parsed if isinstance(request, DetectionRequest) for row in request.rows])
        )
        return [self._response(self._answer(request, results)) for request in parsed]

    def finalize(self) -> None:
        """Release the model."""
        if self._decoder:
            self._decoder.close()
        self._runner.__exit__(None, None, None)

    def _parse(self, request: Any) -> DetectionRequest:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        rows = encoded_rows(tensors, self._model) if self._model.encoded else tensor_rows(tensors, self._model)
        kind = EncodedRequest if self._model.encoded else DetectionRequest
        return kind(rows, frozenset(request.requested_output_names()))

    def _answer(
        self, request: DetectionRequest | DarktrtError, results: Iterator[Result | DarktrtError]
    ) -> Tensors | DarktrtError:
        """The outputs for one request, whose rows have the next results."""
        if isinstance(request, DarktrtError):
            return request
        own = [next(results) for _ in request.rows]
        error = next((one for one in own if isinstance(one, DarktrtError)), None)
        return error if error else _or_error(request.outputs, own, self._model.info)

    def _response(self, answer: Tensors | DarktrtError) -> Any:
        if isinstance(answer, DarktrtError):
            return self._triton.InferenceResponse(error=self._triton.TritonError(str(answer)))
        tensors = [self._triton.Tensor(name, array) for name, array in answer.items()]
        return self._triton.InferenceResponse(output_tensors=tensors)


def _or_error(function: Callable[..., _Value], *arguments: Any) -> _Value | DarktrtError:
    """The value of the function, or the user's error in it."""
    try:
        return function(*arguments)
    except DarktrtError as error:
        return error


@dataclass(frozen=True)
class DetectionRequest:
    """The images of one request, and the names of the outputs that it asks for."""

    rows: Sequence[Row | EncodedRow]
    wanted: frozenset[str]

    def outputs(self, results: Sequence[Result], info: DetectorInfo) -> Tensors:
        """The response's tensors: the model's outputs for the rows.

        Raises:
            DarktrtError: the model's results are no detections.
        """
        return {name: array for name, array in gather(results).items() if name in self.wanted}


@dataclass(frozen=True)
class EncodedRequest(DetectionRequest):
    """The encoded images of one request."""

    def outputs(self, results: Sequence[Result], info: DetectorInfo) -> Tensors:
        """The response's tensors: boxes in pixels of the images, as many rows as the image with the most detections has, and
        the detections as JSON."""
        placed = [result.placed(info) for result in results]
        most = max(map(len, placed))
        outputs = {
            "num_detections": np.array([[len(one)] for one in placed], np.int32),
            "boxes": np.zeros((len(placed), most, 4), np.float32),
            "scores": np.zeros((len(placed), most), np.float32),
            "classes": np.zeros((len(placed), most), np.int32),
        }
        for i, one in enumerate(placed):
            outputs["boxes"][i, : len(one)] = one.boxes
            outputs["scores"][i, : len(one)] = one.scores
            outputs["classes"][i, : len(one)] = one.class_ids
        if "detections" in self.wanted:
            texts = [[json.dumps(one.to_list(), ensure_ascii=False).encode()] for one in placed]
            outputs["detections"] = np.array(texts, object)
        return {name: array for name, array in outputs.items() if name in self.wanted}


def tensor_rows(tensors: Mapping[str, NDArray[Any]], model: ModelInfo) -> list[Row]:
    """The images of a request of tensors.

    Raises:
        DarktrtError: a threshold is not between 0 and 1, or the model accepts no images of this size.
    """
    images = tensors["images"]
    if model.info.input == "image":
        model.info.check_image(images.shape[2], images.shape[1])
    sizes = [(float(width), float(height)) for width, height in tensors.get("image_size", np.ones((len(images), 2)))]
    thresholds = _thresholds(tensors, model.thresholds, len(images))
    return [Row(*row) for row in zip(images, thresholds, sizes, strict=True)]


def encoded_rows(tensors: Mapping[str, NDArray[Any]], model: ModelInfo) -> list[EncodedRow]:
    """The images of a request of encoded images.

    Raises:
        DarktrtError: a threshold is not between 0 and 1, or an image has too many bytes.
    """
    files = tensors[ENCODED_INPUT].reshape(-1)
    if (most := max(map(len, files))) > MOST_BYTES:
        raise DarktrtError(f"the image has {most:,} bytes, more than {MOST_BYTES:,}; scale it down first")
    thresholds = _thresholds(tensors, model.thresholds, len(files))
    return [EncodedRow(file, f"image {i}", pair) for i, (file, pair) in enumerate(zip(files, thresholds, strict=True))]


def _thresholds(tensors: Mapping[str, NDArray[Any]], default: Thresholds, count: int) -> list[Thresholds]:
    """One record an image; thresholds that the request does not set have the model's defaults."""
    scores, overlaps = (
        tensors[name].reshape(-1).tolist() if name in tensors else [value] * count
        for name, value in (("score_threshold", default.score), ("iou_threshold", default.iou))
    )
    return [Thresholds(*pair) for pair in zip(scores, overlaps, strict=True)]
