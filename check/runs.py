"""A network's outputs for images, computed by Polygraphy's Comparator, saved and loaded in Polygraphy's format.

Every variant of a network gets the same input, pixels in bytes, and has the same outputs: the raw heads, boxes and scores
where the model outputs them, and detections. So results of different machines and Python versions can be compared.

A model that takes images of any size gets these pixels as an image that fits already. On a letterboxed network, the distance
term of its NMS is then relative to the whole input.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from darktrt.archives import parse_array
from darktrt.check.tolerance import TOLERANCES
from darktrt.engine.callbacks import deferred_interrupt
from darktrt.engine.manifest import Manifest, read_plan_manifest
from darktrt.engine.target import gpu_name
from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output, sha256_of
from darktrt.metadata import METADATA_KEY, DetectorInfo, Thresholds
from darktrt.records import Excerpt, parse_json, read_record, record
from darktrt.vision.boxes import detection_rows
from darktrt.vision.detector import Arrays, Network, Run, checked_outputs, read_outputs
from darktrt.vision.images import preprocess, read_image

if TYPE_CHECKING:
    from darktrt.check.model import Model, OnnxModel
    from darktrt.engine.runtime import PlanRunner
    from darktrt.surgery.qdq import Calibration

DETECTIONS = "detections"
"""``(n, 6)`` float32, best first: x1 y1 x2 y2 in pixels of the network input and clipped to it, score, class."""

MOST_BYTES = 4 << 30
"""The largest file of results that is read; it has the tensors of every image in base64."""

_ADVICE = "make it by saving outputs"


@dataclass(frozen=True)
class Variant:
    """One way to run the network: ``run`` has the inputs that ``info`` describes, and inner tensors among its outputs."""

    name: str
    info: DetectorInfo
    precision: str
    """fp32, tf32, fp16 or int8."""
    run: Run
    about: Mapping[str, str] = field(default_factory=dict)
    """What else is known: the file's SHA-256, what built it, the GPU it runs on."""
    network: Network | None = None
    """The same for images of any size, several batches at once; for an engine."""
    model: Model | None = None
    """The same for other processes to open; None where only this one can run it."""
    here: bool = True
    """Whether ``run`` works; else only ``model`` does."""


@dataclass(frozen=True, eq=False)
class InputImage:
    """An image fitted into the network's input."""

    name: str
    pixels: NDArray[np.uint8]
    """``(H, W, C)``."""
    inner_size: tuple[int, int]
    """Width and height of the image inside the input."""

    @property
    def digest(self) -> str:
        """SHA-256 of the network input."""
        return hashlib.sha256(repr((self.pixels.shape, self.inner_size)).encode() + self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """The model and image of a result; stored with the outputs as JSON in bytes, under the name :data:`METADATA_KEY`."""

    info: DetectorInfo
    precision: str
    image: str
    digest: str
    """Of the image."""
    score_threshold: float
    iou_threshold: float

    def __post_init__(self) -> None:
        if self.precision not in TOLERANCES:
            raise ValueError(f"the precision is {quote(self.precision, 40)!r}")
        Thresholds(self.score_threshold, self.iou_threshold)  # refuses what no thresholds can be

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(self.score_threshold, self.iou_threshold)

    def to_array(self) -> NDArray[np.uint8]:
        """The bytes that :meth:`from_array` reads."""
        return np.frombuffer(json.dumps(asdict(self), sort_keys=True).encode(), np.uint8)

    @staticmethod
    def from_array(array: NDArray[np.uint8], where: str) -> Origin:
        """Read what :meth:`to_array` wrote; ``where`` names the file in errors.

        Raises:
            DarktrtError: the bytes are no JSON.
            ValueError: they are something else.
        """
        return record(Origin, parse_json(array.tobytes().decode(), where, _ADVICE))


@dataclass(frozen=True, eq=False)
class VariantResults:
    """All results of one variant."""

    name: str
    origin: Origin
    """Of its first image."""
    iterations: dict[str, Any] = field(repr=False)
    """Polygraphy's IterationResult of every image, by the image's digest."""

    @property
    def info(self) -> DetectorInfo:
        return self.origin.info

    @property
    def precision(self) -> str:
        return self.origin.precision

    @property
    def thresholds(self) -> Thresholds:
        return self.origin.thresholds


def load_image(path: Path, info: DetectorInfo) -> InputImage:
    """An image file as the input of a network.

    Raises:
        DarktrtError: it cannot be read.
    """
    pixels, placement = preprocess(read_image(path), info.width, info.height, info.channels, info.resize, "uint8")
    return InputImage(path.name, pixels, placement.inner_size)


def onnx_variant(path: str | Path, layers: bool = False, name: str = "") -> Variant:
    """An ONNX file in ONNX Runtime on the CPU; its outputs include its raw heads, with ``layers`` those of all cfg sections.

    Raises:
        DarktrtError: it is no ONNX file of darktrt.
    """
    from darktrt.check.model import OnnxModel
    from darktrt.onnx_cost import limit_batch
    from darktrt.onnx_file import load_model
    from darktrt.surgery.outputs import add_outputs

    model, info = load_model(path)
    info = limit_batch(model, info, str(path))
    add_outputs(model, inner_tensors(info, layers))
    precision = "int8" if info.int8_convolutions else "fp32"
    about = {"runs in": "ONNX Runtime", "sha256": sha256_of(path)}
    return _by_onnx_runtime(name or str(path), OnnxModel.of(model, info), precision, about)


def _by_onnx_runtime(name: str, model: OnnxModel, precision: str, about: Mapping[str, str]) -> Variant:
    """A variant that opens its model when it is first run here."""
    opened = functools.cache(model.open)

    def run(inputs: Arrays) -> Arrays:
        return opened()(inputs)

    return Variant(name, model.info, precision, run, about, model=model)


def plan_variant(runner: PlanRunner, name: str = "") -> Variant:
    """An engine that is ready to run; outputs that have a tensor's name are compared."""
    precision, about = _engine_facts(runner.manifest, gpu_name())
    return Variant(name or runner.path, runner.info, precision, runner.run, about, runner)


def engine_variant(path: str | Path, plugins: str | Path | None, name: str, stack: ExitStack | None) -> Variant:
    """An engine: opened here until ``stack`` closes it, or without one for workers on a GPU.

    This process may have no GPU then; it reads the engine's manifest alone.

    Raises:
        DarktrtError: the plan or its manifest cannot be read, they do not belong together, or the engine does not run here.
    """
    from darktrt.check.model import EngineModel
    from darktrt.engine.runtime import PlanRunner

    if stack:
        return plan_variant(stack.enter_context(PlanRunner(path, plugins)), name)
    manifest = read_plan_manifest(path)
    precision, about = _engine_facts(manifest, manifest.gpu)
    model = EngineModel(manifest.info, Path(path), plugins)
    return Variant(name or str(path), manifest.info, precision, _elsewhere, about, model=model, here=False)


def _elsewhere(_: Arrays) -> Arrays:
    raise RuntimeError("this engine was not opened here")


def _engine_facts(manifest: Manifest, gpu: str | None) -> tuple[str, dict[str, str]]:
    """The precision of an engine, and what else is known."""
    precision = "tf32" if manifest.precision == "fp32" and manifest.tf32 else manifest.precision
    about = {"sha256": manifest.plan_sha256, "runs in": manifest.target, "on": gpu or ""}
    if manifest.other_convolutions:
        about["not in INT8"] = ", ".join(manifest.other_convolutions)
    if manifest.int8_warning:
        about["INT8"] = manifest.int8_warning
    elif manifest.force_int8:
        about["INT8"] = "INT8 is forced, also where TensorRT would have found FP16 faster"
    return precision, about


def simulated_variant(
    path: str | Path, precision: str, calibration: Calibration | None, layers: bool = False, name: str = ""
) -> Variant:
    """An ONNX file with the rounding of an engine's ``precision``, fp16 or int8, in ONNX Runtime on the CPU.

    Raises:
        DarktrtError: the file cannot be used, or there is no calibration for INT8, or it is of another network.
    """
    from darktrt.check.model import OnnxModel
    from darktrt.check.simulate import chosen_fp_layers, halved, load_network, quantized
    from darktrt.surgery.outputs import add_outputs

    network = load_network(path)
    about = {"runs in": f"ONNX Runtime, rounding as {precision.upper()}"}
    if precision == "int8" and calibration is None:
        raise DarktrtError("simulating INT8 needs a calibration", "calibration")
    if precision == "int8" and calibration:
        fp_layers = chosen_fp_layers(network, calibration)
        about["not in INT8"] = ", ".join(fp_layers)
        model = quantized(network, calibration, fp_layers)
    else:
        model = halved(network)
    add_outputs(model, inner_tensors(network.info, layers))
    return _by_onnx_runtime(f"{name or path} as {precision.upper()}", OnnxModel.of(model, network.info), precision, about)


def inner_tensors(info: DetectorInfo, layers: bool) -> set[str]:
    """The raw heads; with ``layers`` the outputs of all cfg sections."""
    return {head.tensor for head in info.heads} | ({layer.tensor for layer in info.layers} if layers else set())


# --- running ---


def run(variants: Sequence[Variant], image: InputImage, thresholds: Thresholds, layers: bool) -> list[Any]:
    """Polygraphy's IterationResult of every variant for one image.

    Raises:
        DarktrtError: a variant fails, or its scores are not numbers.
    """
    from polygraphy.comparator import Comparator

    feed = {"images": image.pixels[np.newaxis], "image_size": np.array([image.inner_size], np.float32)}
    with quiet():
        results = Comparator.run([_runner(variant, thresholds, layers) for variant in variants], data_loader=[feed])
    for variant, (_, iterations) in zip(variants, results, strict=True):
        origin = Origin(variant.info, variant.precision, image.name, image.digest, thresholds.score, thresholds.iou)
        iterations[0][METADATA_KEY] = origin.to_array()
    return [iterations[0] for _, iterations in results]


def _runner(variant: Variant, thresholds: Thresholds, layers: bool) -> Any:
    """A Polygraphy runner with the inputs ``images (1, H, W, C)`` uint8 and ``image_size (1, 2)``."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    info = variant.info

    class Runner(BaseRunner):  # type: ignore[misc]  # Polygraphy publishes no types
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata().add("images", np.uint8, (1, info.height, info.width, info.channels))
            return metadata.add("image_size", np.float32, (1, 2))

        def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> Arrays:
            width, height = feed_dict["image_size"][0].tolist()
            inputs = info.model_inputs(info.images_of_bytes(feed_dict["images"]), [(width, height)], thresholds)
            started = time.perf_counter()
            outputs = variant.run(inputs)
            self.inference_time = time.perf_counter() - started
            if info.head != "raw":
                checked_outputs(outputs, info, len(inputs["images"]))
            first = {name: values[0] for name, values in outputs.items()}  # a static batch repeats the image
            return _named_outputs(variant, first, (width, height), thresholds, layers)

    return Runner(variant.name)


def _named_outputs(
    variant: Variant, outputs: Arrays, inner_size: tuple[float, float], thresholds: Thresholds, layers: bool
) -> Arrays:
    """One image's outputs, float32, by names that do not depend on the model's own outputs; copies.

    Heads and layers have their tensors' names; ``boxes (A, 4)`` and ``scores (A, C)`` are those before NMS.
    """
    info, inner = variant.info, inner_tensors(variant.info, layers)
    named = {name: np.array(values, np.float32) for name, values in outputs.items() if name in inner}
    if info.head == "raw":
        return named
    if info.head != "nms":
        decoded = {name: np.array(outputs[name], np.float32) for name in ("boxes", "scores")}
        named, outputs = {**named, **decoded}, decoded
    boxes, scores, classes = read_outputs(outputs, info, thresholds, inner_size, variant.name)
    inside = np.clip(boxes, np.float32(0), np.array([info.width, info.height] * 2, np.float32))  # as an image model has them
    return {**named, DETECTIONS: detection_rows(inside, scores, classes)}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Polygraphy's log in the block; its errors are raised."""
    from polygraphy.logger import G_LOGGER

    _import_whole()
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


@functools.cache
def _import_whole() -> None:
    """Let Polygraphy import what it looks for, PyTorch among it, and hold Ctrl-C back until that is done.

    It does so inside a bare ``except``, which would swallow the interrupt and go on with half a library.
    """
    from polygraphy.json import to_json

    with deferred_interrupt(Event()):
        to_json([])


# --- files ---


def save_results(results: Mapping[str, Sequence[Any]], path: str | Path) -> None:
    """Write the results of variants in Polygraphy's JSON, which ``polygraphy inspect data`` reads too.

    Raises:
        DarktrtError: the file cannot be written.
    """
    from polygraphy.comparator import RunResults

    with quiet(), atomic_output(path) as temporary:
        RunResults([(name, list(iterations)) for name, iterations in results.items()]).save(str(temporary))


@dataclass(frozen=True)
class _SavedArray:
    array: str
    """A ``.npy`` file in base64."""
    polygraphy_class: Literal["ndarray"]

    def to_array(self) -> NDArray[Any]:
        return parse_array(base64.b64decode(self.array, validate=True))


@dataclass(frozen=True)
class _SavedOutput(Excerpt):
    values: _SavedArray


@dataclass(frozen=True)
class _SavedIteration(Excerpt):
    outputs: dict[str, _SavedOutput]


@dataclass(frozen=True)
class _SavedResults(Excerpt):
    """Polygraphy's RunResults. Its own reader would also unpack archives and load pickles of PyTorch."""

    lst: tuple[tuple[str, tuple[_SavedIteration, ...]], ...]


def load_results(path: str | Path) -> list[VariantResults]:
    """Read what :func:`save_results` wrote, on this machine or another.

    Raises:
        DarktrtError: the file cannot be read, is damaged, or is something else.
    """
    saved = read_record(_SavedResults, path, _ADVICE, MOST_BYTES)
    if not saved.lst:
        raise DarktrtError(f"{path}: has no results; {_ADVICE}")
    try:
        return [_variant_results(f"{name} in {path}", iterations, str(path)) for name, iterations in saved.lst]
    except (ValueError, TypeError, DarktrtError) as error:
        raise DarktrtError(f"{path}: is damaged ({error}); {_ADVICE}") from error


def _variant_results(name: str, iterations: Sequence[_SavedIteration], where: str) -> VariantResults:
    from polygraphy.comparator import IterationResult

    outputs = [_outputs(one) for one in iterations]
    if not all(METADATA_KEY in one for one in outputs):
        raise ValueError(f"its tensor '{METADATA_KEY}' is missing")
    origins = [Origin.from_array(one[METADATA_KEY], where) for one in outputs]
    if not origins:
        raise ValueError(f"{quote(name)} has no images")
    results = {origin.digest: IterationResult(one) for origin, one in zip(origins, outputs, strict=True)}
    return VariantResults(name, origins[0], results)


def _outputs(iteration: _SavedIteration) -> dict[str, NDArray[Any]]:
    """The tensors of one image, by name.

    Raises:
        ValueError: one is not of the form that :func:`run` gives it.
    """
    outputs = {name: output.values.to_array() for name, output in iteration.outputs.items()}
    for name, array in outputs.items():
        if array.dtype != (np.uint8 if name == METADATA_KEY else np.float32) or not (array.size or name == DETECTIONS):
            raise ValueError(f"'{quote(name)}' is {array.shape} {array.dtype}")
    rows = outputs.get(DETECTIONS)
    if rows is not None and not (rows.ndim == 2 and rows.shape[1] == 6 and np.isfinite(rows).all()):
        raise ValueError(f"'{DETECTIONS}' are {rows.shape}, or not finite")
    return outputs
