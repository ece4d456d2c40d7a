"""Average precision as COCO measures it: labelled images, detections in them, and pycocotools as the judge."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from darktrt.check.ground_truth import GroundTruth, LabelledImage
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import Detector, Run
from darktrt.vision.images import read_image

SCORE_THRESHOLD, IOU_THRESHOLD = 0.001, 0.45
"""darknet's own for mAP: nearly every detection counts, and NMS as in production."""

_FIFTY, _SEVENTY_FIVE = 0, 5
"""Among COCO's ten thresholds of overlap."""
_ALL_SIZES, _MOST = 0, -1
"""Among COCO's ranges of area, and its limits of detections an image."""


@dataclass(frozen=True)
class Accuracy:
    """COCO's numbers, means over the classes that occur; NaN where nothing of such a size is labelled."""

    ap: float
    """Mean over IoU .50:.05:.95, the number that is called AP or mAP."""
    ap50: float
    ap75: float
    ap_small: float
    """Of objects below 32 x 32 pixels; large ones have 96 x 96."""
    ap_medium: float
    ap_large: float


@dataclass(frozen=True)
class ClassAccuracy:
    """One class; NaN where nothing of it is labelled."""

    name: str
    objects: int
    """Labelled ones, without crowds."""
    ap: float
    ap50: float


@dataclass(frozen=True)
class CocoMetrics:
    """Everything that COCO's judge says of detections."""

    accuracy: Accuracy
    classes: tuple[ClassAccuracy, ...]
    """All that the network has, in its order."""
    curves: dict[str, tuple[float, ...]]
    """Precision at the recalls 0, .01, ..., 1, mean over the classes that occur, by the overlap wanted: ``0.50``, ``0.75``;
    empty where nothing is labelled."""


def evaluate(run: Run, info: DetectorInfo, ground_truth: GroundTruth, label: str = "") -> Accuracy:
    """The accuracy of a network, a session or an engine, on all images of ``ground_truth``; a bar on stderr.

    Raises:
        DarktrtError: an image cannot be read or has another size than its labels, or the network cannot detect.
    """
    return accuracy(detect_all(Detector(run, info, SCORE_THRESHOLD, IOU_THRESHOLD), ground_truth, label), ground_truth)


def detect_all(detector: Detector, ground_truth: GroundTruth, label: str = "") -> list[Detections]:
    """Detections in every image, in order, in pixels of the image."""
    found: list[Detections] = []
    images = iter(ground_truth.images)
    with progress_bar(len(ground_truth.images), "images", label) as bar:
        while group := list(islice(images, detector.info.batch[2])):
            found += detector.detect([_read(image, ground_truth) for image in group])
            bar.update(len(group))
    return found


def _read(labelled: LabelledImage, ground_truth: GroundTruth) -> NDArray[np.uint8]:
    image = read_image(labelled.path)
    height, width = image.shape[:2]
    if labelled.size not in (None, (width, height)):
        wanted = "x".join(map(str, labelled.size or ()))
        raise DarktrtError(
            f"{labelled.path}: is {width}x{height}, but {ground_truth.name} has labels for {wanted}; get the right file"
        )
    return image


def accuracy(found: Sequence[Detections], ground_truth: GroundTruth) -> Accuracy:
    """What COCO's judge says of these detections, one :class:`Detections` an image."""
    return judge(found, ground_truth).accuracy


def judge(found: Sequence[Detections], ground_truth: GroundTruth) -> CocoMetrics:
    """What COCO's judge says of these detections, one :class:`Detections` an image, class by class too."""
    judged = _coco_eval(found, ground_truth)
    precision = judged.eval["precision"][
        :, :, :, _ALL_SIZES, _MOST
    ]  # (overlaps, recalls, classes), -1 for classes without objects
    objects = Counter(one.class_id for image in ground_truth.images for one in image.objects if not one.crowd)
    classes = tuple(
        ClassAccuracy(name, objects[i], _mean(precision[:, :, i]), _mean(precision[_FIFTY, :, i]))
        for i, name in enumerate(ground_truth.classes)
    )
    occur = [i for i in range(len(ground_truth.classes)) if objects[i]]
    points = (("0.50", _FIFTY), ("0.75", _SEVENTY_FIVE))
    curves = {name: tuple(precision[at][:, occur].mean(1).tolist()) for name, at in points} if occur else {}
    stats = (float(value) if value >= 0 else math.nan for value in judged.stats[: len(fields(Accuracy))])
    return CocoMetrics(Accuracy(*stats), classes, curves)


def _mean(precision: NDArray[np.float64]) -> float:
    known = precision[precision >= 0]
    return float(known.mean()) if known.size else math.nan


def _coco_eval(found: Sequence[Detections], ground_truth: GroundTruth) -> Any:
    """A COCOeval that has judged; images, classes and annotations are numbered afresh.

    COCOeval takes a detection matched to an annotation of id 0 for unmatched, so those begin at 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        labels, results = COCO(), COCO()
        labels.dataset, results.dataset = _dataset(ground_truth), _dataset(ground_truth, found)
        for one in (labels, results):
            one.createIndex()
        judged = COCOeval(labels, results, "bbox")
        for step in (judged.evaluate, judged.accumulate, judged.summarize):
            step()
    return judged


def _dataset(ground_truth: GroundTruth, found: Sequence[Detections] | None = None) -> dict[str, Any]:
    """The labels in COCO's form; or the detections."""
    rows = chain.from_iterable(_label_rows(ground_truth) if found is None else map(_detection_rows, range(len(found)), found))
    return {
        "images": [{"id": i} for i in range(len(ground_truth.images))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(ground_truth.classes)],
        "annotations": [{"id": i, **row} for i, row in enumerate(rows, 1)],
    }


def _label_rows(ground_truth: GroundTruth) -> list[list[dict[str, Any]]]:
    return [
        [
            {"image_id": i, "category_id": one.class_id, "bbox": list(one.box), "area": one.area, "iscrowd": int(one.crowd)}
            for one in image.objects
        ]
        for i, image in enumerate(ground_truth.images)
    ]


def _detection_rows(image: int, found: Detections) -> list[dict[str, Any]]:
    corners = found.boxes.astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([corners[:, :2], sizes], 1).tolist()
    values = zip(boxes, sizes.prod(1).tolist(), found.scores.tolist(), found.class_ids.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": class_id, "bbox": box, "area": area, "score": score, "iscrowd": 0}
        for box, area, score, class_id in values
    ]


def progress_bar(total: int, unit: str, label: str = "") -> tqdm[Any]:
    """A bar on stderr that a terminal sees go away again; a log file gets a line every ten seconds."""
    terminal = sys.stderr.isatty()
    interval = 0.1 if terminal else 10
    return tqdm(total=total, unit=f" {unit}", desc=label or None, file=sys.stderr, mininterval=interval, leave=not terminal)
