"""What a network makes of images, run by Polygraphy's Comparator, saved and loaded in Polygraphy's format.

Whatever runs the network gets the same input, pixels in bytes, and gives the same outputs: the raw heads, boxes and scores
where they come out of it, and detections. So results made on different machines and Python versions can be held against
each other.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from darktrt.check.tolerance import TOLERANCES
from darktrt.engine.target import gpu_name
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, sha256_of
from darktrt.metadata import METADATA_KEY, DetectorInfo, Thresholds
from darktrt.records import record
from darktrt.vision.boxes import nms
from darktrt.vision.detector import Arrays, Run
from darktrt.vision.images import preprocess, read_image

if TYPE_CHECKING:
    from darktrt.engine.runtime import PlanRunner
    from darktrt.surgery.qdq import Calibration

DETECTIONS = "detections"
"""``(n, 6)`` float32, best first: x1 y1 x2 y2 in pixels of the network input, score, class."""


@dataclass(frozen=True)
class Variant:
    """Something that runs the network: ``run`` takes the inputs that ``info`` describes, and gives inner tensors too."""

    name: str
    info: DetectorInfo
    precision: str
    """fp32, tf32, fp16 or int8."""
    run: Run
    about: Mapping[str, str] = field(default_factory=dict)
    """What else is known of it: the file's SHA-256, what built it, the GPU it runs on."""


@dataclass(frozen=True, eq=False)
class InputImage:
    """An image fitted into the network's input."""

    name: str
    pixels: NDArray[np.uint8]
    """``(H, W, C)``."""
    inner_size: tuple[int, int]
    """Width and height that the image takes of the input."""

    @property
    def digest(self) -> str:
        """SHA-256 of what the network sees."""
        return hashlib.sha256(repr((self.pixels.shape, self.inner_size)).encode() + self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """What a result is of; it travels with the outputs as JSON in bytes, an array named :data:`darktrt.METADATA_KEY`."""

    info: DetectorInfo
    precision: str
    image: str
    digest: str
    """Of the image."""
    score_threshold: float
    iou_threshold: float

    def __post_init__(self) -> None:
        if self.precision not in TOLERANCES:
            raise ValueError(f"the precision is {self.precision!r}")

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(self.score_threshold, self.iou_threshold)

    def to_array(self) -> NDArray[np.uint8]:
        """As :meth:`from_array` reads it."""
        return np.frombuffer(json.dumps(asdict(self), sort_keys=True).encode(), np.uint8)

    @staticmethod
    def from_array(array: NDArray[np.uint8]) -> Origin:
        """What :meth:`to_array` wrote.

        Raises:
            ValueError, TypeError: it did not write that.
        """
        return record(Origin, json.loads(array.tobytes()))


@dataclass(frozen=True, eq=False)
class Results:
    """All results of one subject."""

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


def load_image(path: Path, info: DetectorInfo) -> InputImage:
    """An image file as the input of a network.

    Raises:
        DarktrtError: it cannot be read.
    """
    pixels, placement = preprocess(read_image(path), info.width, info.height, info.channels, info.resize, "uint8")
    return InputImage(path.name, pixels, placement.inner_size)


def onnx_variant(path: str | Path, layers: bool = False, name: str = "") -> Variant:
    """An ONNX file in ONNX Runtime on the CPU, its raw heads outputs too; with ``layers`` the tensors of all cfg sections.

    Raises:
        DarktrtError: it is no ONNX file of darktrt.
    """
    from darktrt.check.simulate import session
    from darktrt.onnx_file import load_model
    from darktrt.surgery.outputs import add_outputs

    model, info = load_model(path)
    add_outputs(model, inner_tensors(info, layers))
    precision = "int8" if info.int8_convolutions else "fp32"
    about = {"runs in": "ONNX Runtime", "sha256": sha256_of(path)}
    return Variant(name or str(path), info, precision, session(model), about)


def plan_variant(runner: PlanRunner, name: str = "") -> Variant:
    """An engine that is ready to run; of its outputs those count that have a tensor's name."""
    manifest = runner.manifest
    precision = "tf32" if manifest.precision == "fp32" and manifest.tf32 else manifest.precision
    about = {"sha256": manifest.plan_sha256, "runs in": manifest.target, "on": gpu_name() or ""}
    if manifest.other_convolutions:
        about["not in INT8"] = ", ".join(manifest.other_convolutions)
    return Variant(name or runner.path, runner.info, precision, runner.run, about)


def simulated_variant(
    path: str | Path, precision: str, calibration: Calibration | None, layers: bool = False, name: str = ""
) -> Variant:
    """What ``precision``, fp16 or int8, makes of an ONNX file, by rounding as an engine does, in ONNX Runtime on the CPU.

    Raises:
        DarktrtError: the file cannot be used, or INT8 has no calibration or one of another network.
    """
    from darktrt.check.simulate import chosen_fp_layers, halved, load_network, quantized, session
    from darktrt.surgery.outputs import add_outputs

    network = load_network(path)
    about = {"runs in": f"ONNX Runtime, rounding as {precision.upper()}"}
    if precision == "int8" and calibration is None:
        raise DarktrtError("--simulate int8 needs the scales: --table TABLE, which 'darktrt calib run' writes")
    if precision == "int8" and calibration:
        fp_layers = chosen_fp_layers(network, calibration)
        about["not in INT8"] = ", ".join(fp_layers)
        model = quantized(network, calibration, fp_layers)
    else:
        model = halved(network)
    add_outputs(model, inner_tensors(network.info, layers))
    return Variant(f"{name or path} as {precision.upper()}", network.info, precision, session(model), about)


def inner_tensors(info: DetectorInfo, layers: bool) -> set[str]:
    """The raw heads; with ``layers`` the outputs of all cfg sections."""
    return {head.tensor for head in info.heads} | ({layer.tensor for layer in info.layers} if layers else set())


# --- running ---


def run(variants: Sequence[Variant], image: InputImage, thresholds: Thresholds, layers: bool) -> list[Any]:
    """Polygraphy's IterationResult of every subject for one image.

    Raises:
        DarktrtError: a subject fails, or gives scores that are not numbers.
    """
    from polygraphy.comparator import Comparator

    feed = {"images": image.pixels[np.newaxis], "image_size": np.array([image.inner_size], np.float32)}
    with quiet():
        found = Comparator.run([_runner(one, thresholds, layers) for one in variants], data_loader=[feed])
    for variant, (_, iterations) in zip(variants, found, strict=True):
        origin = Origin(variant.info, variant.precision, image.name, image.digest, thresholds.score, thresholds.iou)
        iterations[0][METADATA_KEY] = origin.to_array()
    return [iterations[0] for _, iterations in found]


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
            inputs = _inputs(info, feed_dict, thresholds)
            started = time.perf_counter()
            outputs = variant.run(inputs)
            self.inference_time = time.perf_counter() - started
            first = {name: values[0] for name, values in outputs.items()}  # the rest of a static batch is the same again
            return _named(variant, first, feed_dict["image_size"][0], thresholds, layers)

    return Runner(variant.name)


def _inputs(info: DetectorInfo, feed: Mapping[str, NDArray[Any]], thresholds: Thresholds) -> Arrays:
    """As the model wants them; a float input is what the graph of a uint8 input computes first."""
    images = feed["images"]
    if info.input == "float":
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    info.check_thresholds(thresholds)
    inputs = {"images": images.repeat(info.batch[0], 0)}
    if info.takes_image_size:
        inputs["image_size"] = feed["image_size"].repeat(info.batch[0], 0)
    if info.takes_thresholds:
        inputs["score_threshold"] = np.array([thresholds.score], np.float32)
        inputs["iou_threshold"] = np.array([thresholds.iou], np.float32)
    return inputs


def _named(variant: Variant, outputs: Arrays, inner_size: NDArray[np.float32], thresholds: Thresholds, layers: bool) -> Arrays:
    """One image's outputs, float32, by names that mean the same whatever the model's own outputs are; copies.

    Heads are ``head0_raw``, ..., layers ``layer0``, ...; ``boxes (A, 4)`` and ``scores (A, C)`` are those before NMS.
    """
    info, inner = variant.info, inner_tensors(variant.info, layers)
    found = {name: np.array(values, np.float32) for name, values in outputs.items() if name in inner}
    if info.head == "nms":
        count = int(outputs["num_detections"].item())
        kept = [outputs[name][:count] for name in ("boxes", "scores", "classes")]
        return {**found, DETECTIONS: _rows(*kept)}
    if info.head == "raw":
        return found
    decoded = {name: np.array(outputs[name], np.float32) for name in ("boxes", "scores")}
    if np.isnan(decoded["scores"]).any():  # would pass for "nothing found"
        raise DarktrtError(f"{variant.name}: its scores are not numbers; are the weights damaged?")
    width, height = inner_size.tolist()
    limit, rule = info.max_detections or None, info.nms
    boxes, scores = decoded.values()
    best = nms(boxes, scores, thresholds.score, thresholds.iou, rule.kind, rule.beta, (width, height), max_detections=limit)
    return {**found, **decoded, DETECTIONS: _rows(*best)}


def _rows(boxes: NDArray[Any], scores: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.float32]:
    return np.concatenate([boxes, scores[:, np.newaxis], classes[:, np.newaxis]], 1).astype(np.float32)


@contextmanager
def quiet() -> Iterator[None]:
    """Polygraphy logs nothing meanwhile; what goes wrong comes as an exception."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


# --- files ---


def save_results(results: Mapping[str, Sequence[Any]], path: str | Path) -> None:
    """Write results, one an image, by subject in Polygraphy's JSON, which ``polygraphy inspect data`` reads too.

    Raises:
        DarktrtError: the file cannot be written.
    """
    from polygraphy.comparator import RunResults

    with quiet(), atomic_output(path) as temporary:
        RunResults([(name, list(iterations)) for name, iterations in results.items()]).save(str(temporary))


def load_results(path: str | Path) -> list[Results]:
    """What :func:`save_results` wrote, on this machine or another.

    Raises:
        DarktrtError: the file cannot be read, or is something else.
    """
    from polygraphy.comparator import RunResults

    if not Path(path).is_file():
        raise DarktrtError(f"{path}: cannot read: no such file; make it with 'darktrt check compare --save-outputs'")
    try:
        with quiet():
            found = [_checked(f"{name} in {path}", iterations) for name, iterations in RunResults.load(str(path)).items()]
    except Exception as error:  # Polygraphy's, JSON's and NumPy's exceptions share no base class
        raise DarktrtError(f"{path}: holds no results of 'darktrt check compare' or damaged ones; make it again") from error
    if not found:
        raise DarktrtError(f"{path}: holds no results; make it again with 'darktrt check compare --save-outputs'")
    return found


def _checked(name: str, iterations: Sequence[Any]) -> Results:
    origins = [Origin.from_array(one[METADATA_KEY]) for one in iterations]
    by_digest = {origin.digest: one for origin, one in zip(origins, iterations, strict=True)}
    return Results(name, origins[0], by_digest)
