"""Which layers lose most by INT8: every convolution quantized alone, ranked, as a table, an image and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from darktrt.calib.fp_layers import Cost, FpLayers
from darktrt.check.coco import Accuracy, evaluate, progress_bar
from darktrt.check.ground_truth import Truth, load_truth
from darktrt.check.simulate import (
    Change,
    Convolution,
    OnnxNetwork,
    Yardstick,
    chosen_fp_layers,
    convolutions,
    load_network,
    quantized,
    session,
)
from darktrt.files import atomic_output
from darktrt.surgery.qdq import Calibration
from darktrt.vision.charts import BLUE, GRAY, Bar, draw_bars
from darktrt.vision.sources import find_images

LIMIT = 16
"""Images that the changes of scores are measured on, unless told otherwise."""

MOST_GROUPS = 20
"""Single convolutions in the tiny networks, five at a time in yolov4."""


@dataclass(frozen=True)
class LayerCost:
    """What quantizing this convolution alone, its input and its weights, does to the network."""

    convolution: Convolution
    change: Change
    kept: bool
    """INT8 leaves it in floating point by default."""
    accuracy: Accuracy | None = None
    """Where it was asked for."""


@dataclass(frozen=True)
class Sensitivity:
    """Every convolution's cost, in graph order."""

    network: str
    images: int
    layers: tuple[LayerCost, ...]
    together: Change
    """Of INT8 as it is by default: all quantized but those kept."""
    accuracy: Accuracy | None = None
    """In float, where it was asked for."""

    def ranked(self) -> list[LayerCost]:
        """Worst first: by average precision where that was measured, else by the change of the scores."""
        return sorted(self.layers, key=lambda layer: (layer.accuracy.ap if layer.accuracy else 0.0, -layer.change.scores))

    def to_table(self) -> str:
        """A line a convolution, worst first."""
        width = max(len(layer.convolution.node) for layer in self.layers)
        judged = f"  {'AP':>7}  {'drop':>7}" if self.accuracy else ""
        lines = [f"rank  {'convolution':<{width}}  cfg line  {'scores':>8}  {'heads':>8}{judged}"]
        for rank, layer in enumerate(self.ranked(), 1):
            name, _, line = layer.convolution
            row = f"{rank:4}  {name:<{width}}  {line:8}  {layer.change.scores:8.5f}  {layer.change.heads:8.5f}"
            if self.accuracy and layer.accuracy:
                row += f"  {layer.accuracy.ap:7.4f}  {self.accuracy.ap - layer.accuracy.ap:7.4f}"
            lines.append(f"{row}{'  kept by default' if layer.kept else ''}")
        return "\n".join(lines)

    def summary(self) -> str:
        """How much INT8 changes as a whole, by the measures of the table."""
        kept = sum(layer.kept for layer in self.layers)
        return (
            f"{self.network}: all in INT8 but the {kept} kept by default change scores by {self.together.scores:.5f}, "
            f"heads by {self.together.heads:.5f}, on {self.images} images"
        )

    def to_json(self) -> str:
        """All numbers; those that do not exist are null."""
        layers = [
            {
                **layer.convolution._asdict(),
                **layer.change._asdict(),
                "kept": layer.kept,
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
    truth: str | None = None,
) -> Sensitivity:
    """Quantize every convolution alone and measure what that changes; a bar on stderr.

    Args:
        source: an ONNX file with decoded heads or NMS, not quantized.
        data: images as :func:`darktrt.vision.sources.find_images` takes them, of which ``limit`` are drawn.
        truth: a COCO file to measure the average precision on too, with each convolution quantized: slow.

    Raises:
        DarktrtError: a file cannot be used, or the calibration is of another network.
    """
    network = load_network(source)
    quantized(network, calibration, [])  # refuses the table of another network before the work begins
    labels = load_truth([truth], network.info.class_names) if truth else None
    yardstick = Yardstick(network, find_images(data, limit, seed))
    kept = chosen_fp_layers(network, calibration)
    changes = each_alone(yardstick, calibration)
    exact, judged = _accuracies(network, calibration, list(changes), labels) if labels else (None, {})
    layers = tuple(LayerCost(one, change, one.node in kept, judged.get(one)) for one, change in changes.items())
    together = yardstick.change(calibration, kept)
    return Sensitivity(network.info.name, len(yardstick.inputs), layers, together, exact)


def each_alone(yardstick: Yardstick, calibration: Calibration) -> dict[Convolution, Change]:
    """What every convolution changes when nothing else is quantized, in graph order."""
    all_ = convolutions(yardstick.network)
    changes = {}
    with progress_bar(len(all_), "convolutions") as bar:
        for one in all_:
            changes[one] = yardstick.change(calibration, _others(all_, one))
            bar.update()
    return changes


def find_fp_layers(source: str | Path, images: Sequence[Path], calibration: Calibration) -> FpLayers:
    """Measure which convolutions INT8 should leave in floating point; a bar on stderr.

    Costs of single convolutions add up: noises of different layers are not correlated. So do those of groups, and a deep
    network's convolutions are measured in :data:`MOST_GROUPS` groups of neighbours.

    Args:
        source: an ONNX file with decoded heads or NMS, not quantized.

    Raises:
        DarktrtError: a file cannot be used.
    """
    network = load_network(source)
    always = chosen_fp_layers(network)
    yardstick = Yardstick(network, images)
    operations = yardstick.operations()
    others = [name for name in operations if name not in always]
    groups = [part.tolist() for part in np.array_split(others, min(len(others), MOST_GROUPS))] if others else []
    powers = []
    with progress_bar(len(groups), "layers") as bar:
        for group in groups:
            fp_layers = [name for name in operations if name not in group]
            powers.append(yardstick.change(calibration, fp_layers).scores ** 2)
            bar.update()
    total = sum(powers) or 1
    shares = [sum(operations[name] for name in group) for group in groups]
    costs = [Cost(tuple(g), power / total, share) for g, power, share in zip(groups, powers, shares, strict=True)]
    return FpLayers(tuple(always), tuple(costs))


def _others(convolutions: Iterable[Convolution], one: Convolution) -> list[str]:
    return [other.node for other in convolutions if other != one]


def _accuracies(
    network: OnnxNetwork, calibration: Calibration, all_: list[Convolution], truth: Truth
) -> tuple[Accuracy, dict[Convolution, Accuracy]]:
    """The accuracy in float, and with each convolution quantized alone."""
    exact = evaluate(session(network.model), network.info, truth, "FP32")
    judged = {}
    for i, one in enumerate(all_, 1):
        run = session(quantized(network, calibration, _others(all_, one)))
        judged[one] = evaluate(run, network.info, truth, f"{i} of {len(all_)}")
    return exact, judged


def save_json(result: Sensitivity, path: str | Path) -> None:
    """Write :meth:`Sensitivity.to_json`.

    Raises:
        DarktrtError: the file cannot be written.
    """
    with atomic_output(path) as temporary:
        temporary.write_text(result.to_json(), encoding="utf-8")


# The image


def plot(result: Sensitivity, path: str | Path) -> None:
    """Draw a bar a convolution, in graph order, for the change of the scores; those kept by default are gray.

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
    return Bar(label, layer.change.scores, text, GRAY if layer.kept else BLUE)
