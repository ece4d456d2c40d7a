"""What variants of one network find in labelled images: run here, or saved on another machine and loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darktrt.check.coco import IOU_THRESHOLD, SCORE_THRESHOLD, CocoMetrics, detect_all, judge
from darktrt.check.ground_truth import GroundTruth
from darktrt.check.runs import Variant
from darktrt.check.tolerance import TOLERANCES
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, sha256_of
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.records import record
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import Detector

THRESHOLDS = Thresholds(SCORE_THRESHOLD, IOU_THRESHOLD)

_FORMAT = "darktrt detections 1"


@dataclass(frozen=True, eq=False)
class VariantDetections:
    """What one variant found."""

    name: str
    info: DetectorInfo
    precision: str
    thresholds: Thresholds
    images: Mapping[str, Detections] = field(repr=False)
    """By the SHA-256 of the image's file; boxes in pixels of the image."""
    about: Mapping[str, str] = field(default_factory=dict)
    """As that of :class:`darktrt.check.runs.Variant`."""

    def in_order(self, digests: Sequence[str]) -> list[Detections]:
        """The detections of these images.

        Raises:
            DarktrtError: one of them was not looked at.
        """
        common = sum(digest in self.images for digest in digests)
        if common < len(digests):
            raise DarktrtError(
                f"{self.name}: knows {common} of the {len(digests)} images; make it from the same DATA with the same --limit "
                "and --seed"
            )
        return [self.images[digest] for digest in digests]


def digests_of(ground_truth: GroundTruth) -> list[str]:
    """The SHA-256 of every image, in order."""
    return [sha256_of(image.path) for image in ground_truth.images]


def find(variant: Variant, ground_truth: GroundTruth, digests: Sequence[str]) -> VariantDetections:
    """Run a variant over all images, as for COCO's AP; a bar on stderr.

    Raises:
        DarktrtError: an image cannot be read or has another size than its labels, or the network cannot detect.
    """
    detector = Detector(variant.run, variant.info, THRESHOLDS.score, THRESHOLDS.iou)
    found = detect_all(detector, ground_truth, variant.name)
    images = dict(zip(digests, found, strict=True))
    return VariantDetections(variant.name, variant.info, variant.precision, THRESHOLDS, images, variant.about)


# --- files ---


def save_detections(found: Sequence[VariantDetections], path: str | Path) -> None:
    """Write what variants found, as JSON; numbers keep every digit of their float32.

    Raises:
        DarktrtError: the file cannot be written.
    """
    variants = [
        {
            "name": one.name,
            "precision": one.precision,
            "thresholds": asdict(one.thresholds),
            "about": dict(one.about),
            "info": json.loads(one.info.to_json()),
            "images": {digest: _numbers(detections) for digest, detections in one.images.items()},
        }
        for one in found
    ]
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "variants": variants}) + "\n", encoding="utf-8")


def _numbers(found: Detections) -> dict[str, list[Any]]:
    boxes = [[float(str(value)) for value in box] for box in found.boxes]
    return {"boxes": boxes, "scores": [float(str(score)) for score in found.scores], "classes": found.class_ids.tolist()}


def load_detections(path: str | Path) -> list[VariantDetections]:
    """What :func:`save_detections` wrote, here or elsewhere.

    Raises:
        DarktrtError: the file cannot be read, or is something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ValueError(values["format"])
        return [_variant(one, str(path)) for one in values["variants"]]
    except OSError as error:
        raise DarktrtError(
            f"{path}: cannot read: {error.strerror}; make it with 'darktrt check map --save-detections'"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DarktrtError) as error:
        raise DarktrtError(f"{path}: holds no results of 'darktrt check map' or damaged ones; make it again") from error


def _variant(values: Mapping[str, Any], path: str) -> VariantDetections:
    if values["precision"] not in TOLERANCES:
        raise ValueError(values["precision"])
    info = DetectorInfo.from_json(json.dumps(values["info"]), path)
    images = {str(digest): _detections(one, info) for digest, one in values["images"].items()}
    about = {str(key): str(value) for key, value in values["about"].items()}
    thresholds = record(Thresholds, values["thresholds"])
    return VariantDetections(str(values["name"]), info, values["precision"], thresholds, images, about)


def _detections(values: Mapping[str, Any], info: DetectorInfo) -> Detections:
    boxes = np.array(values["boxes"], np.float32).reshape(-1, 4)
    return Detections(boxes, np.array(values["scores"], np.float32), np.array(values["classes"], np.int32), info.class_names)


# --- judging ---


@dataclass(frozen=True, eq=False)
class EvaluatedVariant:
    """A variant, and what COCO's judge says of it."""

    found: VariantDetections
    metrics: CocoMetrics


def judge_all(found: Sequence[VariantDetections], ground_truth: GroundTruth, digests: Sequence[str]) -> list[EvaluatedVariant]:
    """Every variant against the labels.

    Raises:
        DarktrtError: they are not variants of one network by one protocol, or did not look at the same images.
    """
    _check_comparable(found)
    return [EvaluatedVariant(one, judge(one.in_order(digests), ground_truth)) for one in found]


def _check_comparable(found: Sequence[VariantDetections]) -> None:
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DarktrtError(f"{twice[0]}: is given twice; name each variant once, or otherwise: NAME=FILE")
    first = found[0]
    for one in found[1:]:
        if one.info.class_names != first.info.class_names:
            raise DarktrtError(f"{one.name}: has other classes than {first.name}; compare variants of one network")
        if one.thresholds != first.thresholds:
            raise DarktrtError(f"{one.name}: was made with {one.thresholds}, not with {first.thresholds}; make it again")


def to_table(judged: Sequence[EvaluatedVariant]) -> str:
    """A line a variant: COCO's numbers, and what is lost against the first."""
    width = max(len(one.found.name) for one in judged)
    lines = [
        f"{'':{width}}  precision  {'AP':>6}  {'AP50':>6}  {'AP75':>6}  {'small':>6}  {'medium':>6}  {'large':>6}  {'drop':>7}"
    ]
    first = judged[0].metrics.accuracy.ap
    for one in judged:
        numbers = [*asdict(one.metrics.accuracy).values(), first - one.metrics.accuracy.ap]
        *cells, drop = ["-" if math.isnan(number) else f"{round(number, 4) + 0.0:.4f}" for number in numbers]
        row = "  ".join(f"{cell:>6}" for cell in cells)
        lines.append(f"{one.found.name:<{width}}  {one.found.precision:9}  {row}  {drop:>7}")
    return "\n".join(lines)
