"""The detections of a network's variants in labelled images: made here, or saved on another machine and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.check.coco import detect_here
from darktrt.check.ground_truth import GroundTruth
from darktrt.check.model import THRESHOLDS, detect_by_workers
from darktrt.check.runs import Variant
from darktrt.check.tolerance import TOLERANCES
from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.parallel import Workers
from darktrt.records import read_record
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector, warn_at_limit

_FORMAT = "darktrt detections 2"
_ADVICE = "make it by saving detections"

MOST_BYTES = 1 << 30
"""The largest file of detections that is read; those of one variant in COCO's 5,000 images take about 50 MB."""


@dataclass(frozen=True, eq=False)
class VariantDetections:
    """The detections of one variant."""

    name: str
    info: DetectorInfo
    precision: str
    thresholds: Thresholds
    images: Mapping[str, Detections] = field(repr=False)
    """By the SHA-256 of the image's file; boxes in pixels of the image."""
    about: Mapping[str, str] = field(default_factory=dict)
    """As that of :class:`darktrt.check.runs.Variant`."""

    def check_images(self, digests: Sequence[str]) -> None:
        """See that there are detections of these images.

        Raises:
            DarktrtError: an image is missing.
        """
        common = sum(digest in self.images for digest in digests)
        if common < len(digests):
            raise DarktrtError(
                f"{self.name}: has detections of {common} of the {len(digests)} images; make it from the same images, with the "
                "same limit and seed"
            )

    def in_order(self, digests: Sequence[str]) -> list[Detections]:
        """The detections of these images.

        Raises:
            DarktrtError: an image is missing.
        """
        self.check_images(digests)
        return [self.images[digest] for digest in digests]


def detect_variant(variant: Variant, ground_truth: GroundTruth, workers: Workers | None = None) -> VariantDetections:
    """Run a variant over all images, with the thresholds for AP.

    Args:
        variant: one that this process alone can run, such as a server's model, is run here.
        ground_truth: the images.
        workers: run the other ones; by default threads of this process.

    Raises:
        DarktrtError: an image cannot be read or has another size than its labels, or the network cannot detect.
    """
    ground_truth.check_sizes()
    paths = [image.path for image in ground_truth.images]
    if variant.model and (workers or not variant.model.gpu):
        detections = detect_by_workers(variant.model, paths, variant.name, workers)
    else:
        with detector_of(variant) as detector:
            detections = detect_here(detector, paths, variant.name)
    # under the name that detectors warn under: those of other machines have warned only there
    warn_at_limit(max(map(len, detections), default=0), variant.info, variant.info.name)
    images = dict(zip(ground_truth.digests, detections, strict=True))
    return VariantDetections(variant.name, variant.info, variant.precision, THRESHOLDS, images, variant.about)


def detector_of(variant: Variant) -> NetworkDetector:
    """The variant with the thresholds for AP.

    Raises:
        DarktrtError: it cannot detect, or its thresholds are fixed at others.
    """
    return NetworkDetector(variant.network or variant.run, variant.info, THRESHOLDS.score, THRESHOLDS.iou)


# --- files ---


def save_detections(variants: Sequence[VariantDetections], path: str | Path) -> None:
    """Write the detections of variants as JSON; numbers keep every digit of their float32.

    Raises:
        DarktrtError: the file cannot be written.
    """
    values = [
        {
            "name": variant.name,
            "precision": variant.precision,
            "thresholds": asdict(variant.thresholds),
            "about": dict(variant.about),
            "info": json.loads(variant.info.to_json()),
            "images": {digest: _numbers(detections) for digest, detections in variant.images.items()},
        }
        for variant in variants
    ]
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "variants": values}) + "\n", encoding="utf-8")


def _numbers(detections: Detections) -> dict[str, list[Any]]:
    return {
        "boxes": [[float(str(value)) for value in box] for box in detections.boxes],
        "scores": [float(str(score)) for score in detections.scores],
        "classes": detections.class_ids.tolist(),
    }


@dataclass(frozen=True)
class _SavedVariant:
    name: str
    precision: str
    thresholds: Thresholds
    about: dict[str, str]
    info: DetectorInfo
    images: dict[str, _SavedImage]


@dataclass(frozen=True)
class _SavedImage:
    """Its rows are many, so NumPy checks them at once, in :func:`_detections`."""

    boxes: Any
    scores: Any
    classes: Any


@dataclass(frozen=True)
class _Saved:
    format: str
    variants: tuple[_SavedVariant, ...]


def load_detections(path: str | Path) -> list[VariantDetections]:
    """Read what :func:`save_detections` wrote.

    Raises:
        DarktrtError: the file cannot be read, is damaged or is no such file.
    """
    saved = read_record(_Saved, path, _ADVICE, MOST_BYTES, _FORMAT)
    try:
        return [_variant(one) for one in saved.variants]
    except (ValueError, DarktrtError) as error:
        raise DarktrtError(f"{path}: is damaged ({error}); {_ADVICE}") from error


def _variant(saved: _SavedVariant) -> VariantDetections:
    if saved.precision not in TOLERANCES:
        raise ValueError(f"'precision' is {quote(repr(saved.precision), 40)}")
    images = {digest: _detections(one, saved.info) for digest, one in saved.images.items()}
    return VariantDetections(saved.name, saved.info, saved.precision, saved.thresholds, images, saved.about)


def _detections(saved: _SavedImage, info: DetectorInfo) -> Detections:
    boxes, scores, classes = (np.array(rows) for rows in (saved.boxes, saved.scores, saved.classes))
    if any(rows.size and rows.dtype.kind not in kinds for rows, kinds in ((boxes, "if"), (scores, "if"), (classes, "i"))):
        raise ValueError("boxes, scores or classes are no numbers")
    if classes.size and not 0 <= classes.min() <= classes.max() < len(info.class_names):
        raise ValueError(f"classes are {classes.min()} to {classes.max()}, and there are {len(info.class_names)}")
    with np.errstate(over="ignore"):  # Detections refuses infinite ones
        return Detections(_as(boxes, np.float32, (-1, 4)), _as(scores, np.float32), _as(classes, np.int32), info.class_names)


def _as(rows: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...] = (-1,)) -> NDArray[Any]:
    return rows.reshape(shape).astype(dtype)
