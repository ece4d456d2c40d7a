"""The sensitivity of a network to INT8: the cost of quantizing each convolution separately, ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.fp_layers import NoiseSums
from darktrt.check.coco import Accuracy, coco_metrics
from darktrt.check.ground_truth import GroundTruth, load_ground_truth
from darktrt.check.model import OnnxModel, detect_by_models
from darktrt.check.simulate import (
    Change,
    Convolution,
    FloatReference,
    OnnxNetwork,
    chosen_fp_layers,
    convolutions,
    load_network,
    operations,
    quantized,
)
from darktrt.files import atomic_output
from darktrt.onnx_cost import cost_of
from darktrt.parallel import Threads, Worker, Workers, in_groups
from darktrt.progress import progress
from darktrt.surgery.qdq import Calibration
from darktrt.vision.charts import BLUE, GRAY, Bar, draw_bars
from darktrt.vision.sources import find_images

LIMIT = 16
"""Default number of images that changes of scores are measured on."""

MOST_GROUPS = 96
"""Makes groups of one convolution in most networks, and of two in yolov4. The noise of a convolution must not hide among the
operations of its neighbours: in networks of depthwise convolutions one of 80 has most of it."""

_VARIANTS = 8
"""Groups that one run measures. It depends on nothing, for the values of a row may depend on the number of rows in their last
bits."""


@dataclass(frozen=True)
class LayerCost:
    """The cost of quantizing only this convolution, its input and its weights."""

    convolution: Convolution
    change: Change
    in_fp: bool
    """Whether INT8 leaves it in floating point by default."""
    accuracy: Accuracy | None = None
    """Where it was measured."""


@dataclass(frozen=True)
class Sensitivity:
    """Every convolution's cost, in graph order."""

    network: str
    images: int
    layers: tuple[LayerCost, ...]
    together: Change
    """With all convolutions quantized but those that stay in floating point by default."""
    accuracy: Accuracy | None = None
    """In float, where it was measured."""

    def ranked(self) -> list[LayerCost]:
        """The layers, worst first: by average precision where that was measured, else by the change of the scores."""
        return sorted(self.layers, key=lambda layer: (layer.accuracy.ap if layer.accuracy else 0.0, -layer.change.scores))

    def to_table(self) -> str:
        """A line for each convolution, worst first."""
        width = max(len(layer.convolution.node) for layer in self.layers)
        accuracy = f"  {'AP':>7}  {'drop':>7}" if self.accuracy else ""
        lines = [f"rank  {'convolution':<{width}}  cfg line  {'scores':>8}  {'heads':>8}{accuracy}"]
        for rank, layer in enumerate(self.ranked(), 1):
            name, _, line = layer.convolution
            row = f"{rank:4}  {name:<{width}}  {line:8}  {layer.change.scores:8.5f}  {layer.change.heads:8.5f}"
            if self.accuracy and layer.accuracy:
                row += f"  {layer.accuracy.ap:7.4f}  {self.accuracy.ap - layer.accuracy.ap:7.4f}"
            lines.append(f"{row}{'  in FP by default' if layer.in_fp else ''}")
        return "\n".join(lines)

    def summary(self) -> str:
        """The change by INT8 as a whole."""
        count = sum(layer.in_fp for layer in self.layers)
        return (
            f"{self.network}: INT8 with {count} convolutions in floating point changes scores by {self.together.scores:.5f}, "
            f"heads by {self.together.heads:.5f}, on {self.images} images"
        )

    def to_json(self) -> str:
        """All numbers; those that do not exist are null."""
        layers = [
            {
                **layer.convolution._asdict(),
                **layer.change._asdict(),
                "in_fp": layer.in_fp,
                "accuracy": _numbers(layer.accuracy),
            }
            for layer in self.ranked()
        ]
        head = {"network": self.network, "images": self.images, "together": self.together._asdict()}
        return json.dumps({**head, "accuracy": _numbers(self.accuracy), "layers": layers}, indent=2, allow_nan=False) + "\n"


def _numbers(accuracy: Accuracy | None) -> dict[str, float | None] | None:
    if accuracy is None:
        return None
    return {name: None if math.isnan(value) else value for name, value in asdict(accuracy).items()}


def sensitivity(
    source: str | Path,
    data: Sequence[str],
    calibration: Calibration,
    limit: int = LIMIT,
    seed: int = 0,
    ground_truth: str | None = None,
    workers: Workers | None = None,
) -> Sensitivity:
    """Quantize each convolution separately and measure the change.

    Args:
        source: an ONNX file with decoded heads or NMS, not quantized.
        data: images as :func:`darktrt.vision.sources.find_images` accepts them.
        calibration: the scales.
        limit: the size of a sample of the images.
        seed: of that sample.
        ground_truth: a COCO file to measure the average precision on too, with each convolution quantized; this is slow.
        workers: by default threads of this process.

    Raises:
        DarktrtError: a file cannot be used, or the calibration is of another network.
    """
    network = load_network(source)
    quantized(network, calibration, [])  # refuses the calibration of another network before the work begins
    labels = load_ground_truth([ground_truth], network.info.class_names) if ground_truth else None
    images, every, fp_layers = find_images(data, limit, seed), convolutions(network), chosen_fp_layers(network, calibration)
    groups = [*([one.node] for one in every), [one.node for one in every if one.node not in fp_layers]]
    sums = _measured(_NoiseMeter(network, tuple(images), calibration), groups, workers, "networks")
    *changes, together = map(Change.of, sums)
    exact, accuracies = _accuracies(network, calibration, every, labels, workers) if labels else (None, {})
    each = zip(every, changes, strict=True)
    layers = tuple(LayerCost(one, change, one.node in fp_layers, accuracies.get(one)) for one, change in each)
    return Sensitivity(network.info.name, len(images), layers, together, exact)


def measure_each(network: OnnxNetwork, images: Sequence[Path], calibration: Calibration) -> dict[Convolution, Change]:
    """The change by each convolution when only it is quantized, in graph order.

    Raises:
        DarktrtError: an image cannot be read, or an output of the float network is NaN.
    """
    every = convolutions(network)
    meter = _NoiseMeter(network, tuple(images), calibration)
    sums = _measured(meter, [[one.node] for one in every], None, "convolutions")
    return dict(zip(every, map(Change.of, sums), strict=True))


def measure_noise(
    source: str | Path, images: Mapping[str, Path], calibration: Calibration, workers: Workers | None = None
) -> NoiseSums:
    """Measure what the floating-point layers are chosen by.

    Costs of single convolutions add up, for noises of different layers are not correlated. So do those of groups: the
    convolutions of a network that has more than :data:`MOST_GROUPS` are measured in groups of neighbours.

    Args:
        source: an ONNX file with decoded heads or NMS, not quantized.
        images: to measure on, by their SHA-256.
        calibration: the scales, and how biases are corrected.
        workers: by default threads of this process.

    Raises:
        DarktrtError: a file cannot be used.
    """
    network = load_network(source)
    always, shares = chosen_fp_layers(network), operations(network)
    others = [name for name in shares if name not in always]
    groups = list(in_groups(others, -(-len(others) // MOST_GROUPS) or 1))
    sums = _measured(_NoiseMeter(network, tuple(images.values()), calibration), groups, workers, "layers")
    return NoiseSums(
        tuple(always),
        tuple(map(tuple, groups)),
        tuple(sum(shares[name] for name in group) for group in groups),
        dict(zip(images, sums.swapaxes(0, 1), strict=True)),
    )


@dataclass(frozen=True)
class _NoiseMeter:
    """Makes a worker that quantizes groups of convolutions and measures the sums of :meth:`FloatReference.sums`."""

    network: OnnxNetwork
    images: tuple[Path, ...]
    calibration: Calibration

    def __call__(self) -> Worker[Sequence[str], NDArray[np.float64]]:
        reference = FloatReference(self.network, self.images, threads=1)
        return partial(reference.sums, self.calibration)

    @property
    def bytes_each(self) -> int:
        cost = cost_of(self.network.model, self.network.info)
        return 4 * cost.weights + 2 * _VARIANTS * cost.tensors


def _measured(meter: _NoiseMeter, groups: Sequence[Sequence[str]], workers: Workers | None, unit: str) -> NDArray[np.float64]:
    """What quantizing each group of convolutions does: the sums of :meth:`FloatReference.sums`, ``(groups, images, 5)``."""
    parts = list(in_groups(groups, _VARIANTS))
    found: dict[int, NDArray[np.float64]] = {}
    results = (workers or Threads()).results(meter, parts, bytes_each=meter.bytes_each, files=meter.images)
    with progress(len(groups), unit) as bar, closing(results):
        for done in results:
            found[id(done.group)] = done.result
            bar.update(len(done.group), done.node)
    none = np.zeros((len(meter.images), 0, 5))
    by_group: NDArray[np.float64] = np.concatenate([none, *(found[id(part)] for part in parts)], 1).swapaxes(0, 1)
    return by_group


def _others(every: Iterable[Convolution], convolution: Convolution) -> list[str]:
    return [other.node for other in every if other != convolution]


def _accuracies(
    network: OnnxNetwork,
    calibration: Calibration,
    every: list[Convolution],
    ground_truth: GroundTruth,
    workers: Workers | None,
) -> tuple[Accuracy, dict[Convolution, Accuracy]]:
    """The accuracy in float, and with only each convolution quantized."""
    ground_truth.check_sizes()
    models = [partial(OnnxModel.of, network.model, network.info)]
    models += [partial(_with_one, network, calibration, _others(every, convolution)) for convolution in every]
    paths = [image.path for image in ground_truth.images]
    found = {
        model: coco_metrics(detections, ground_truth).accuracy for model, detections in detect_by_models(models, paths, workers)
    }
    return found[0], {convolution: found[i] for i, convolution in enumerate(every, 1)}


def _with_one(network: OnnxNetwork, calibration: Calibration, others: list[str]) -> OnnxModel:
    """The network with all convolutions but ``others`` quantized."""
    return OnnxModel.of(quantized(network, calibration, others), network.info)


def save_json(result: Sensitivity, path: str | Path) -> None:
    """Write :meth:`Sensitivity.to_json`.

    Raises:
        DarktrtError: the file cannot be written.
    """
    with atomic_output(path) as temporary:
        temporary.write_text(result.to_json(), encoding="utf-8")


# --- the chart ---


def plot(result: Sensitivity, path: str | Path) -> None:
    """Draw a bar for each convolution, in graph order, for the change of the scores; gray for those in floating point.

    Raises:
        DarktrtError: the file cannot be written, or its suffix is no image format.
    """
    title = f"{result.network}: change of the scores with one convolution in INT8, {result.images} images"
    draw_bars(title, [_bar(layer, result.accuracy) for layer in result.layers], path)


def _bar(layer: LayerCost, exact: Accuracy | None) -> Bar:
    text = f"{layer.change.scores:.4f}"
    if exact and layer.accuracy:
        text += f", AP -{exact.ap - layer.accuracy.ap:.4f}".replace("--", "+")
    label = f"{layer.convolution.node}, cfg line {layer.convolution.line}"
    return Bar(label, layer.change.scores, text, GRAY if layer.in_fp else BLUE)
