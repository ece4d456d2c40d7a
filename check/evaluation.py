"""The average precision of a network's variants on one ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from darktrt.check.coco import CocoMetrics, coco_metrics
from darktrt.check.detections import VariantDetections, detect_variant, detector_of
from darktrt.check.ground_truth import GroundTruth
from darktrt.check.model import THRESHOLDS
from darktrt.check.runs import Variant
from darktrt.errors import DarktrtError
from darktrt.parallel import Workers


@dataclass(frozen=True, eq=False)
class EvaluatedVariant:
    """A variant's detections and their metrics."""

    detections: VariantDetections
    metrics: CocoMetrics


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The average precision of variants."""

    ground_truth: str
    """Its name."""
    images: int
    objects: int
    """Labelled ones, without crowds."""
    variants: tuple[EvaluatedVariant, ...]

    def to_table(self) -> str:
        """A line for each variant: COCO's numbers, and the drop of AP against the first."""
        width = max(len(one.detections.name) for one in self.variants)
        numbers = "  ".join(f"{title:>6}" for title in ("AP", "AP50", "AP75", "small", "medium", "large"))
        first = self.variants[0].metrics.accuracy.ap
        rows = [_row(one, first, width) for one in self.variants]
        return "\n".join([f"{'':{width}}  precision  {numbers}  {'drop':>7}", *rows])


def _row(variant: EvaluatedVariant, reference_ap: float, width: int) -> str:
    accuracy, detections = variant.metrics.accuracy, variant.detections
    numbers = [*asdict(accuracy).values(), reference_ap - accuracy.ap]
    *cells, drop = ["-" if math.isnan(number) else f"{round(number, 4) + 0.0:.4f}" for number in numbers]
    return f"{detections.name:<{width}}  {detections.precision:9}  {'  '.join(f'{c:>6}' for c in cells)}  {drop:>7}"


def evaluate(
    variants: Sequence[Variant],
    ground_truth: GroundTruth,
    loaded: Sequence[VariantDetections] = (),
    workers: Workers | None = None,
) -> Evaluation:
    """Run variants over labelled images and measure their average precision, and that of loaded detections.

    Args:
        variants: to run.
        ground_truth: the labelled images.
        loaded: detections of other variants.
        workers: run the variants; by default threads of this process.

    Raises:
        DarktrtError: as :func:`check_comparable`, before the first image; an image cannot be read, or a variant fails.
    """
    check_comparable(variants, ground_truth, loaded)
    return evaluate_detections([*(detect_variant(one, ground_truth, workers) for one in variants), *loaded], ground_truth)


def evaluate_detections(detections: Sequence[VariantDetections], ground_truth: GroundTruth) -> Evaluation:
    """Measure the average precision of detections.

    Raises:
        DarktrtError: as :func:`check_comparable`.
    """
    check_comparable([], ground_truth, detections)
    evaluated = [EvaluatedVariant(one, coco_metrics(one.in_order(ground_truth.digests), ground_truth)) for one in detections]
    return Evaluation(ground_truth.name, len(ground_truth.images), ground_truth.count, tuple(evaluated))


def check_comparable(variants: Sequence[Variant], ground_truth: GroundTruth, loaded: Sequence[VariantDetections] = ()) -> None:
    """See, before any image is run, that variants and loaded detections can be evaluated together.

    Raises:
        DarktrtError: there are none, two have one name, a variant cannot detect, or they differ in their classes, their
            thresholds or their images, or an image has another size than its labels.
    """
    everyone: list[Variant | VariantDetections] = [*variants, *loaded]
    if not everyone:
        raise DarktrtError("there is no variant to evaluate")
    names = [one.name for one in everyone]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DarktrtError(f"{twice[0]}: is given twice; name each variant once, or give it another name: NAME=FILE")
    first = everyone[0]
    for other in everyone[1:]:
        if other.info.class_names != first.info.class_names:
            raise DarktrtError(f"{other.name}: has other classes than {first.name}; compare variants of one network")
    thresholds = THRESHOLDS if variants else loaded[0].thresholds
    for detections in loaded:
        if detections.thresholds != thresholds:
            made_with = f"was made with {detections.thresholds}, not with {thresholds}"
            raise DarktrtError(f"{detections.name}: {made_with}; make it again")
        detections.check_images(ground_truth.digests)
    for variant in variants:
        detector_of(variant)
    ground_truth.check_sizes()
