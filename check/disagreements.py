"""Images in which a variant's detections differ from the reference's: a measure, a description, and drawings."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darktrt.check.ground_truth import LabelledImage
from darktrt.check.tolerance import pair, unpaired
from darktrt.vision.boxes import Detections
from darktrt.vision.draw import draw
from darktrt.vision.images import read_image

SHOWN_SCORE = 0.25
"""Detections above this score are compared and shown: that of production, not that of AP."""
MOVED = 0.1
"""Change of a score from which on it counts."""

_SIZE, _QUALITY = 480, 80
"""Of embedded images: the larger of width and height in pixels, and JPEG's quality."""


@dataclass(frozen=True)
class Disagreement:
    """The differences between a variant's and the reference's detections in one image."""

    image: str
    variant: str
    amount: float
    """The sum of the scores of unmatched detections above the threshold, and of the changes of matched ones by :data:`MOVED` or
    more."""
    missing: tuple[str, ...]
    """Detections of only the reference: ``dog 0.81``."""
    extra: tuple[str, ...]
    """Detections of only the variant."""
    moved: tuple[str, ...]
    """Detections of both with scores far apart: ``dog 0.81 → 0.60``."""


def disagreement(image: str, variant: str, actual: Detections, expected: Detections) -> Disagreement:
    """The differences between the detections of a variant and those of the reference, above :data:`SHOWN_SCORE`."""
    actual, expected = shown(actual), shown(expected)
    pairs = pair(actual.to_rows(), expected.to_rows())
    changes = [(i, p[0], abs(float(actual.scores[p[0]] - expected.scores[i]))) for i, p in enumerate(pairs) if p]
    moved = [change for change in changes if change[2] >= MOVED]
    missing, extra = [i for i, partner in enumerate(pairs) if partner is None], unpaired(pairs, len(actual))
    unmatched = [*expected.scores[missing], *actual.scores[extra]]
    return Disagreement(
        image,
        variant,
        sum(float(score) - SHOWN_SCORE for score in unmatched) + sum(change for _, _, change in moved),
        tuple(_named(expected, i) for i in missing),
        tuple(_named(actual, j) for j in extra),
        tuple(f"{_named(expected, i)} → {actual.scores[j]:.2f}" for i, j, _ in moved),
    )


def shown(detections: Detections) -> Detections:
    """The detections above :data:`SHOWN_SCORE`."""
    return detections.select(detections.scores > SHOWN_SCORE)


def _named(detections: Detections, i: int) -> str:
    return f"{detections.names[i]} {detections.scores[i]:.2f}"


def panels(labelled: LabelledImage, variants: Sequence[Detections]) -> list[str]:
    """The image with its labels, and with each variant's detections, drawn in: JPEG files as ``data:`` addresses."""
    image = read_image(labelled.path)
    labels = labels_of(labelled, variants[0].class_names)
    return [_embedded(image, labels, scores=False), *(_embedded(image, shown(one), scores=True) for one in variants)]


def labels_of(image: LabelledImage, class_names: tuple[str, ...]) -> Detections:
    """The labels as detections with score 1."""
    corners = np.array([one.box for one in image.objects], np.float32).reshape(-1, 4)
    corners[:, 2:] = np.maximum(corners[:, :2] + corners[:, 2:], corners[:, :2])
    ids = np.array([one.class_id for one in image.objects], np.int32)
    return Detections(corners, np.ones(len(ids), np.float32), ids, class_names)


def _embedded(image: NDArray[np.uint8], detections: Detections, scores: bool) -> str:
    scale = min(_SIZE / max(image.shape[:2]), 1.0)
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    small = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    scaled = replace(detections, boxes=(detections.boxes * np.float32(scale)).astype(np.float32))
    drawn = draw(small, scaled, scores)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
