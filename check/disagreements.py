"""The images on which a variant finds something else than the reference: which, what, and drawn side by side."""

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
"""Detections are held against each other, and shown, above this: as in production, not as for AP."""
MOVED = 0.1
"""Change of a score that is worth telling."""

_SIDE, _QUALITY = 480, 80
"""Of embedded images: pixels of the longer side, and JPEG's quality."""


@dataclass(frozen=True)
class Disagreement:
    """What a variant makes otherwise of one image."""

    image: str
    variant: str
    amount: float
    """How much: by how far scores of unmatched detections exceed the threshold, and scores of matched ones moved by
    :data:`MOVED` or more; summed."""
    missing: tuple[str, ...]
    """What the reference has alone: ``dog 0.81``."""
    extra: tuple[str, ...]
    """What the variant has alone."""
    moved: tuple[str, ...]
    """What both have with scores far apart: ``dog 0.81 → 0.60``."""


def disagreement(image: str, variant: str, found: Detections, expected: Detections) -> Disagreement:
    """What ``found`` has that ``expected`` has not and the other way round, above :data:`SHOWN_SCORE`."""
    found, expected = shown(found), shown(expected)
    pairs = pair(_rows(found), _rows(expected))
    changes = [(i, one[0], abs(float(found.scores[one[0]] - expected.scores[i]))) for i, one in enumerate(pairs) if one]
    moved = [one for one in changes if one[2] >= MOVED]
    missing, extra = [i for i, one in enumerate(pairs) if one is None], unpaired(pairs, len(found))
    lone = [*expected.scores[missing], *found.scores[extra]]
    return Disagreement(
        image,
        variant,
        sum(float(score) - SHOWN_SCORE for score in lone) + sum(change for _, _, change in moved),
        tuple(_named(expected, i) for i in missing),
        tuple(_named(found, j) for j in extra),
        tuple(f"{_named(expected, i)} → {found.scores[j]:.2f}" for i, j, _ in moved),
    )


def shown(found: Detections) -> Detections:
    """Those above :data:`SHOWN_SCORE`."""
    return found.select(found.scores > SHOWN_SCORE)


def _rows(found: Detections) -> NDArray[np.float32]:
    return np.column_stack([found.boxes, found.scores, found.class_ids]).astype(np.float32)


def _named(found: Detections, i: int) -> str:
    return f"{found.names[i]} {found.scores[i]:.2f}"


def panels(labelled: LabelledImage, variants: Sequence[Detections]) -> list[str]:
    """The image with the labels, and with what each variant found, drawn in: JPEG files as ``data:`` addresses."""
    image = read_image(labelled.path)
    ground_truth = labels_of(labelled, variants[0].class_names)
    return [_embedded(image, ground_truth, scores=False), *(_embedded(image, shown(found), scores=True) for found in variants)]


def labels_of(image: LabelledImage, class_names: tuple[str, ...]) -> Detections:
    """What people labelled, as detections with the score 1."""
    corners = np.array([one.box for one in image.objects], np.float32).reshape(-1, 4)
    corners[:, 2:] = np.maximum(corners[:, :2] + corners[:, 2:], corners[:, :2])
    ids = np.array([one.class_id for one in image.objects], np.int32)
    return Detections(corners, np.ones(len(ids), np.float32), ids, class_names)


def _embedded(image: NDArray[np.uint8], found: Detections, scores: bool) -> str:
    scale = min(_SIDE / max(image.shape[:2]), 1.0)
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1)
    small = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    drawn = draw(small, replace(found, boxes=(found.boxes * np.float32(scale)).astype(np.float32)), scores)
    buffer = io.BytesIO()
    Image.fromarray(drawn).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
