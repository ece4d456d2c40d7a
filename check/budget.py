"""INT8 within a budget: the layers that lose most stay in floating point until the rest loses no more than allowed."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from darktrt.check.coco import Accuracy, measure_accuracy
from darktrt.check.ground_truth import GroundTruth, has_labels, load_ground_truth
from darktrt.check.model import OnnxModel
from darktrt.check.sensitivity import LIMIT, measure_each
from darktrt.check.simulate import (
    Change,
    Convolution,
    FloatReference,
    OnnxNetwork,
    chosen_fp_layers,
    convolutions,
    load_network,
    quantized,
)
from darktrt.engine.manifest import Int8Cost
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.progress import LOGGER
from darktrt.surgery.qdq import Calibration
from darktrt.vision.sources import find_images


@dataclass(frozen=True)
class EvaluationData:
    """The images that INT8 is evaluated on."""

    data: Sequence[str]
    """A COCO file with labels, images with darknet's label files, or images without labels, as
    :func:`darktrt.vision.sources.find_images` accepts them."""
    limit: int | None = None
    """The size of a sample; None for all that have labels, else :data:`darktrt.check.sensitivity.LIMIT` of them."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DarktrtError(f"the limit is {self.limit}; evaluate on at least 1 image")


@dataclass(frozen=True)
class Trial:
    """INT8 with these convolutions in floating point, and its cost."""

    fp_layers: tuple[str, ...]
    drop: float
    """Of the average precision, against FP32; without labels the change of the scores
    (:class:`darktrt.check.simulate.Change`)."""
    accuracy: Accuracy | None = None
    """None without labels."""


@dataclass(frozen=True)
class Trade:
    """All trials, in order; the last one is within the budget."""

    budget: float
    trials: tuple[Trial, ...]

    @property
    def chosen(self) -> Trial:
        return self.trials[-1]

    def cost(self, data: str) -> Int8Cost:
        """The cost of the chosen trial, for the manifest; ``data`` names the images that it was measured on."""
        drop, accuracy = self.chosen.drop, self.chosen.accuracy
        if accuracy is None:
            return Int8Cost("scores", drop, self.budget, data)
        return Int8Cost("AP", drop, self.budget, data, accuracy.ap, accuracy.ap50)

    def __str__(self) -> str:
        what = "AP drop" if self.chosen.accuracy else "change of the scores"
        return (
            f"{len(self.chosen.fp_layers)} convolutions stay in FP16, {what} {self.chosen.drop:.4f} (at most {self.budget:g})"
        )


def check_budget(budget: float) -> None:
    """Refuse what cannot be a largest drop.

    Raises:
        DarktrtError: it is negative, infinite or NaN.
    """
    if not (math.isfinite(budget) and budget >= 0):
        raise DarktrtError(f"the largest drop is {budget:g}; it must be 0 or more, such as 0.005 for half a point of mAP")


def within_budget(
    source: str | Path,
    calibration: Calibration,
    budget: float,
    evaluation: EvaluationData,
    show: Callable[[str], None] = LOGGER.info,
) -> Trade:
    """Find how many more convolutions must stay in floating point for INT8 to lose no more than ``budget``.

    The first trial has ``calibration.fp_layers``; the next ones add 1, 2, 3, 4, 6, 8, 12, ... other convolutions, first those
    that lose most when they are the only one quantized. ONNX Runtime runs the network with the engine's own Q/DQ nodes, so
    the arithmetic is the engine's up to rounding. (TensorRT up to 10, which uses the scales themselves, may put layers other
    than convolutions into INT8 too.)

    Args:
        source: an ONNX file with decoded heads or NMS, not quantized.
        calibration: the scales, and the convolutions that stay in floating point anyway; images of the evaluation that it was
            made of are warned of.
        budget: the largest drop of AP, or without labels the largest change of the scores.
        evaluation: the images to measure that on.
        show: is called with each line of the table of trials.

    Raises:
        DarktrtError: the budget is invalid, or no less than the whole AP in float, or a file cannot be used.
    """
    check_budget(budget)
    network = load_network(source)
    ground_truth = _labels(network, evaluation)
    images = _images(ground_truth, evaluation)
    _warn_of_overlap([image.path for image in ground_truth.images] if ground_truth else images, calibration)
    fp_layers = tuple(chosen_fp_layers(network, calibration))
    quantized(network, calibration, fp_layers)  # refuses the calibration of another network before the work begins
    measure: _Measure = (
        _AccuracyMeasure(network, calibration, ground_truth) if ground_truth else _ScoreMeasure(network, images, calibration)
    )
    for line in measure.header(budget):
        show(line)
    trials: list[Trial] = []
    for names, added in _candidates(fp_layers, partial(measure_each, network, images, calibration)):
        trials.append(measure.trial(names))
        show(measure.row(trials[-1], added))
        if trials[-1].drop <= budget:
            break
    if len(trials[-1].fp_layers) == len(convolutions(network)):
        LOGGER.warning("no convolution is left in INT8; precision fp16 makes the same engine")
    return Trade(budget, tuple(trials))


def _candidates(
    fp_layers: tuple[str, ...], measure: Callable[[], dict[Convolution, Change]]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """More and more layers in floating point, and the added ones; layers are ranked only if the first trial fails."""
    yield fp_layers, "the first trial" if fp_layers else "none"
    changes = measure()
    worst = [one.node for one in sorted(changes, key=lambda one: -changes[one].scores) if one.node not in fp_layers]
    before = 0
    for count in _counts(len(worst)):
        yield (*fp_layers, *worst[:count]), ", ".join(worst[before:count])
        before = count


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ... below ``most``, and ``most``."""
    steps = sorted({factor << i for factor in (1, 3) for i in range(most.bit_length())})
    return [step for step in steps if step < most] + [most] * (most > 0)


class _Measure(ABC):
    """Measures the cost of INT8, and formats it as a table."""

    @abstractmethod
    def header(self, budget: float) -> list[str]:
        """The lines above the trials."""

    @abstractmethod
    def trial(self, fp_layers: tuple[str, ...]) -> Trial:
        """Measure INT8 with these convolutions in floating point."""

    @abstractmethod
    def row(self, trial: Trial, added: str) -> str:
        """The line of a trial."""


class _AccuracyMeasure(_Measure):
    """The drop of the average precision."""

    def __init__(self, network: OnnxNetwork, calibration: Calibration, ground_truth: GroundTruth) -> None:
        self.network, self.calibration, self.ground_truth = network, calibration, ground_truth

    def header(self, budget: float) -> list[str]:
        self.exact = exact = measure_accuracy(OnnxModel.of(self.network.model, self.network.info), self.ground_truth, "FP32")
        images = f"{len(self.ground_truth.images)} images of {self.ground_truth.name}"
        if exact.ap <= budget:
            raise DarktrtError(
                f"FP32 has AP {exact.ap:.4f} on {images}, so any INT8 would pass a largest drop of {budget:g}; "
                "are these the labels of the network's classes, and is the drop a fraction of 1?"
            )
        title = f"FP32: AP {exact.ap:.4f}, AP50 {exact.ap50:.4f} on {images}"
        return [title, f"{'in FP16':>7}  {'AP':>6}  {'drop':>7}  {'AP50':>6}  {'drop':>7}  added"]

    def trial(self, fp_layers: tuple[str, ...]) -> Trial:
        model = OnnxModel.of(quantized(self.network, self.calibration, fp_layers), self.network.info)
        accuracy = measure_accuracy(model, self.ground_truth, f"INT8, {len(fp_layers)} in FP16")
        return Trial(fp_layers, self.exact.ap - accuracy.ap, accuracy)

    def row(self, trial: Trial, added: str) -> str:
        accuracy, exact = trial.accuracy or self.exact, self.exact
        drops = f"{accuracy.ap:6.4f}  {trial.drop:7.4f}  {accuracy.ap50:6.4f}  {exact.ap50 - accuracy.ap50:7.4f}"
        return f"{len(trial.fp_layers):7}  {drops}  {added}"


class _ScoreMeasure(_Measure):
    """The change of the scores, which needs no labels."""

    def __init__(self, network: OnnxNetwork, images: Sequence[Path], calibration: Calibration) -> None:
        self.reference, self.calibration = FloatReference(network, images), calibration

    def header(self, budget: float) -> list[str]:
        LOGGER.warning(
            "there are no labels to measure mAP on, so the budget of %g limits the change of the scores: the RMS difference "
            "between scores (0 to 1) and those of FP32, weighted by the latter; it is often ten times the drop of mAP, which "
            "needs a COCO json with annotations",
            budget,
        )
        return [f"{'in FP16':>7}  {'scores':>7}  {'heads':>7}  added"]

    def trial(self, fp_layers: tuple[str, ...]) -> Trial:
        self.change = self.reference.change(self.calibration, fp_layers)
        return Trial(fp_layers, self.change.scores)

    def row(self, trial: Trial, added: str) -> str:
        return f"{len(trial.fp_layers):7}  {trial.drop:7.4f}  {self.change.heads:7.4f}  {added}"


def _labels(network: OnnxNetwork, evaluation: EvaluationData) -> GroundTruth | None:
    labelled = [entry for entry in evaluation.data if has_labels(entry)]
    if not labelled:
        return None
    return load_ground_truth(labelled, network.info.class_names, evaluation.limit, evaluation.seed)


def _images(ground_truth: GroundTruth | None, evaluation: EvaluationData) -> list[Path]:
    """The images that changes of scores are measured on."""
    if ground_truth is None:
        return find_images(evaluation.data, LIMIT if evaluation.limit is None else evaluation.limit, evaluation.seed)
    paths = sorted(image.path for image in ground_truth.images)
    return paths if len(paths) <= LIMIT else random.Random(evaluation.seed).sample(paths, LIMIT)


def _warn_of_overlap(images: Sequence[Path], calibration: Calibration) -> None:
    """Warn of images that calibration used too; a TensorRT cache does not name its own."""
    overlap = sum(sha256_of(path) in calibration.images for path in images) if calibration.images else 0
    if overlap:
        LOGGER.warning(
            "INT8 was calibrated on %d of the %d images of the evaluation; on others it may lose more", overlap, len(images)
        )
