"""The detections of a network's variants in labelled images: made here, or saved on another machine and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from darktrt.check.coco import THRESHOLDS, detect_all
from darktrt.check.ground_truth import GroundTruth
from darktrt.check.runs import Variant
from darktrt.check.tolerance import TOLERANCES
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.records import record
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector

_FORMAT = "darktrt detections 2"


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


def detect_variant(variant: Variant, ground_truth: GroundTruth) -> VariantDetections:
    """Run a variant over all images, with the thresholds for AP.

    Raises:
        DarktrtError: an image cannot be read or has another size than its labels, or the network cannot detect.
    """
    with detector_of(variant) as detector:
        detections = detect_all(detector, ground_truth, variant.name)
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


def load_detections(path: str | Path) -> list[VariantDetections]:
    """Read what :func:`save_detections` wrote.

    Raises:
        DarktrtError: the file cannot be read, or is no such file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ValueError(values["format"])
        return [_variant(one, str(path)) for one in values["variants"]]
    except OSError as error:
        raise DarktrtError(f"{path}: cannot read: {error.strerror}; make it by saving detections") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DarktrtError) as error:
        raise DarktrtError(f"{path}: has no saved detections, or damaged ones; make it again") from error


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
