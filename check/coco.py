"""Average precision as COCO measures it, by pycocotools, of detections in labelled images."""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.check.ground_truth import GroundTruth
from darktrt.check.model import Model, detect_by_workers
from darktrt.parallel import Workers, in_groups
from darktrt.progress import progress
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector

_FIFTY, _SEVENTY_FIVE = 0, 5
"""Indices of IoU .50 and .75 among COCO's ten thresholds."""
_ALL_SIZES, _MOST = 0, -1
"""Indices among COCO's ranges of area, and among its limits of detections for each image."""


@dataclass(frozen=True)
class Accuracy:
    """COCO's numbers, means over the classes that occur; NaN where no object of such a size is labelled."""

    ap: float
    """Mean over IoU .50:.05:.95, which is called AP or mAP."""
    ap50: float
    ap75: float
    ap_small: float
    """Of objects below 32 x 32 pixels; large ones have 96 x 96 or more."""
    ap_medium: float
    ap_large: float


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy of one class; NaN where no object of it is labelled."""

    name: str
    objects: int
    """Number of labelled objects, without crowds."""
    ap: float
    ap50: float


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's metrics of detections."""

    accuracy: Accuracy
    classes: tuple[ClassAccuracy, ...]
    """Of every class of the network, in its order."""
    curves: dict[str, tuple[float, ...]]
    """Precision at the recalls 0, .01, ..., 1, mean over the classes that occur, by the IoU that matches need: ``0.50``,
    ``0.75``; empty where no object is labelled."""


def measure_accuracy(model: Model, ground_truth: GroundTruth, label: str = "", workers: Workers | None = None) -> Accuracy:
    """The accuracy of a network on all images.

    Args:
        label: describes the progress.
        workers: run it; by default threads of this process.

    Raises:
        DarktrtError: an image cannot be read or has another size than its labels, or the network cannot detect.
    """
    ground_truth.check_sizes()
    paths = [image.path for image in ground_truth.images]
    return coco_metrics(detect_by_workers(model, paths, label, workers), ground_truth).accuracy


def detect_here(detector: NetworkDetector, paths: Sequence[Path], label: str = "") -> list[Detections]:
    """The detections in image files, in order, by a network that only this process has.

    Raises:
        DarktrtError: an image cannot be read, or the network fails.
    """
    detections: list[Detections] = []
    results = detector.detect_batches(in_groups(paths, detector.info.batch[2]))
    with progress(len(paths), "images", label) as bar, contextlib.closing(results):
        for batch in results:
            detections += batch
            bar.update(len(batch))
    return detections


def coco_metrics(detections: Sequence[Detections], ground_truth: GroundTruth) -> CocoMetrics:
    """COCO's metrics of the detections of every image, in the order of the ground truth."""
    result = _coco_eval(detections, ground_truth)
    # (IoU thresholds, recalls, classes); -1 for classes without objects
    precision = result.eval["precision"][:, :, :, _ALL_SIZES, _MOST]
    objects = Counter(one.class_id for image in ground_truth.images for one in image.objects if not one.crowd)
    classes = tuple(
        ClassAccuracy(name, objects[i], _mean(precision[:, :, i]), _mean(precision[_FIFTY, :, i]))
        for i, name in enumerate(ground_truth.classes)
    )
    occur = [i for i in range(len(ground_truth.classes)) if objects[i]]
    points = (("0.50", _FIFTY), ("0.75", _SEVENTY_FIVE))
    curves = {name: tuple(precision[at][:, occur].mean(1).tolist()) for name, at in points} if occur else {}
    stats = (float(value) if value >= 0 else math.nan for value in result.stats[: len(fields(Accuracy))])
    return CocoMetrics(Accuracy(*stats), classes, curves)


def _mean(precision: NDArray[np.float64]) -> float:
    known = precision[precision >= 0]
    return float(known.mean()) if known.size else math.nan


def _coco_eval(detections: Sequence[Detections], ground_truth: GroundTruth) -> Any:
    """A COCOeval that has evaluated; images, classes and annotations are numbered afresh.

    COCOeval takes a detection matched to an annotation of id 0 for unmatched, so annotation ids begin at 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        labels, results = COCO(), COCO()
        labels.dataset = _dataset(ground_truth, _label_rows(ground_truth))
        results.dataset = _dataset(ground_truth, map(_detection_rows, range(len(detections)), detections))
        for dataset in (labels, results):
            dataset.createIndex()
        evaluation = COCOeval(labels, results, "bbox")
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    return evaluation


def _dataset(ground_truth: GroundTruth, rows: Iterable[list[dict[str, Any]]]) -> dict[str, Any]:
    """Labels or detections, as rows by image, in COCO's form."""
    return {
        "images": [{"id": i} for i in range(len(ground_truth.images))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(ground_truth.classes)],
        "annotations": [{"id": i, **row} for i, row in enumerate(chain.from_iterable(rows), 1)],
    }


def _label_rows(ground_truth: GroundTruth) -> list[list[dict[str, Any]]]:
    return [
        [
            {"image_id": i, "category_id": one.class_id, "bbox": list(one.box), "area": one.area, "iscrowd": int(one.crowd)}
            for one in image.objects
        ]
        for i, image in enumerate(ground_truth.images)
    ]


def _detection_rows(image: int, detections: Detections) -> list[dict[str, Any]]:
    corners = detections.boxes.astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([corners[:, :2], sizes], 1).tolist()
    values = zip(boxes, sizes.prod(1).tolist(), detections.scores.tolist(), detections.class_ids.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": class_id, "bbox": box, "area": area, "score": score, "iscrowd": 0}
        for box, area, score, class_id in values
    ]
