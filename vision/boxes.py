"""Detections as validated arrays, and darknet's non-maximum suppression in NumPy, the reference of its other forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.metadata import NmsKind
from darktrt.vision.images import Placement

GREEDYNMS_EXPONENT = 0.6
"""The exponent of darknet's box_diou; diounms uses beta_nms of the cfg instead."""


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image; element i of every array belongs to detection i. Detectors sort them by score, best first.

    Raises:
        DarktrtError: the arrays differ in length, have a wrong shape or type, or hold values that no detection can have.
    """

    boxes: NDArray[np.float32]
    """``(n, 4)`` float32: x1 y1 x2 y2 in pixels of the original image."""
    scores: NDArray[np.float32]
    """``(n,)`` float32."""
    class_ids: NDArray[np.int32]
    """``(n,)`` int32."""
    class_names: tuple[str, ...]
    """The names of all classes of the network, by id; empty where they are not known."""

    def __post_init__(self) -> None:
        count = len(self.scores)
        _check("boxes", self.boxes, (count, 4), np.float32)
        _check("scores", self.scores, (count,), np.float32)
        _check("class_ids", self.class_ids, (count,), np.int32)
        if np.any(self.boxes[:, :2] > self.boxes[:, 2:]):
            raise DarktrtError("detections: a box ends before it begins; boxes are x1 y1 x2 y2")
        top = len(self.class_names) or np.inf
        if count and (self.class_ids.min() < 0 or self.class_ids.max() >= top):
            low, high = self.class_ids.min(), self.class_ids.max()
            raise DarktrtError(f"detections: class ids {low} to {high}, but there are {len(self.class_names)} class names")

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class name of every detection; its number where names are not known."""
        return [self.class_names[i] if self.class_names else str(i) for i in self.class_ids]

    def select(self, which: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Detections:
        """The detections that a mask, indices or a slice selects: ``detections.select(detections.scores > 0.5)``."""
        return replace(self, boxes=self.boxes[which], scores=self.scores[which], class_ids=self.class_ids[which])

    def to_rows(self) -> NDArray[np.float32]:
        """``(n, 6)`` float32: x1 y1 x2 y2, score, class id."""
        return detection_rows(self.boxes, self.scores, self.class_ids)

    def to_list(self) -> list[dict[str, Any]]:
        """A JSON-able record for each detection; numbers keep every digit of their float32."""
        rows = zip(self.names, self.class_ids, self.scores, self.boxes, strict=True)
        return [
            {"class": name, "class_id": int(class_id), "score": _shortest(score), "box": [_shortest(v) for v in box]}
            for name, class_id, score, box in rows
        ]

    def to_table(self) -> str:
        """A table with a line for each detection, or ``nothing found``."""
        if not len(self):
            return "nothing found"
        width = max(5, *map(len, self.names))
        lines = [f"{'class':<{width}}  score      x1      y1      x2      y2"]
        for name, score, box in zip(self.names, self.scores, self.boxes, strict=True):
            lines.append(f"{name:<{width}}  {score:5.3f}" + "".join(f"{v:8.1f}" for v in box))
        return "\n".join(lines)


def _check(name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if array.shape != shape or array.dtype != dtype:
        expected, actual = f"{shape} {np.dtype(dtype)}", f"{array.shape} {array.dtype}"
        raise DarktrtError(f"detections: {name} must be {expected}, not {actual}")
    if not np.isfinite(array).all():
        raise DarktrtError(f"detections: {name} must be finite, but {int((~np.isfinite(array)).sum())} values are not")


def detection_rows(boxes: NDArray[Any], scores: NDArray[Any], class_ids: NDArray[Any]) -> NDArray[np.float32]:
    """Boxes ``(n, 4)``, scores ``(n,)`` and class ids ``(n,)`` as one array ``(n, 6)`` float32."""
    return np.column_stack([boxes, scores, class_ids]).astype(np.float32)


def _shortest(value: np.float32) -> float:
    return float(str(value))


def place_detections(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    class_ids: NDArray[np.int32],
    placement: Placement,
    class_names: tuple[str, ...],
) -> Detections:
    """The detections of one image from boxes ``(n, 4)`` in pixels of the network input, clipped to the image."""
    edges = np.array([placement.image_width, placement.image_height] * 2, np.float32)
    clipped = np.clip(placement.to_image(boxes), np.float32(0), edges)
    return Detections(clipped, scores, class_ids, class_names)


def nms(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    score_threshold: float,
    iou_threshold: float,
    kind: NmsKind,
    beta: float,
    image_size: tuple[float, float],
    max_candidates: int | None = None,
    max_detections: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
    """Non-maximum suppression per class of one image, as darknet's do_nms_sort and diounms_sort (box.c) do it.

    A pair of box and class is a candidate when its score exceeds ``score_threshold`` and the box is finite; of these the
    ``max_candidates`` best are processed. In order of score, equal ones in order of box and then class, a candidate is kept
    unless a kept one of its class overlaps it by more than ``iou_threshold``. The ``max_detections`` best are returned.

    Args:
        boxes: ``(A, 4)`` x1 y1 x2 y2 in pixels of the network input.
        scores: ``(A, classes)``.
        kind: overlap is IoU for ``plain``; ``greedynms`` and ``diounms`` subtract (d / c) ** exponent, with d the squared
            distance of the centres and c the squared diagonal of the box around both, in coordinates relative to
            ``image_size``; the exponent is 0.6 for the one and ``beta`` for the other.
        image_size: width and height of the image inside the network input; only their ratio matters.

    Returns:
        Boxes ``(n, 4)``, scores ``(n,)`` and class ids ``(n,)`` int32, best first.
    """
    flat = scores.reshape(-1)
    candidates = np.flatnonzero((scores > np.float32(score_threshold)) & np.isfinite(boxes).all(axis=1, keepdims=True))
    candidates = candidates[np.argsort(-flat[candidates], kind="stable")][:max_candidates]
    anchors, class_ids = np.divmod(candidates, scores.shape[1])
    exponent = {"plain": None, "greedynms": GREEDYNMS_EXPONENT, "diounms": beta}[kind]
    kept = []
    for class_id in np.unique(class_ids):
        ranks = np.flatnonzero(class_ids == class_id)
        corners = np.ascontiguousarray(boxes[anchors[ranks]].T)
        with np.errstate(all="ignore"):  # boxes without area and huge ones give NaN, which suppresses nothing, as in C
            kept.append(ranks[_suppress(corners, np.float32(iou_threshold), exponent, image_size, max_detections)])
    best = np.sort(np.concatenate([np.empty(0, np.intp), *kept]))[:max_detections]
    return boxes[anchors[best]], flat[candidates[best]], class_ids[best].astype(np.int32)


def _suppress(
    corners: NDArray[np.float32],
    iou_threshold: np.float32,
    exponent: float | None,
    image_size: tuple[float, float],
    limit: int | None,
) -> list[int]:
    """Indices of the boxes ``(4, n)`` of one class, best first, that are not suppressed; ``limit`` of them at most."""
    kept: list[int] = []
    alive = np.arange(corners.shape[1])
    while alive.size and len(kept) != limit:
        kept.append(int(alive[0]))
        best, corners, alive = corners[:, :1], corners[:, 1:], alive[1:]
        over = box_iou(best, corners)
        suppressed = over > iou_threshold
        if exponent is not None and suppressed.any():
            # The distance term is never negative, so only these can stay above the threshold.
            close = np.flatnonzero(suppressed)
            suppressed[close] = over[close] - _distance(best, corners[:, close], exponent, image_size) > iou_threshold
        if suppressed.any():
            corners, alive = corners[:, ~suppressed], alive[~suppressed]
    return kept


def box_iou(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU of one box ``(4, 1)``, x1 y1 x2 y2, with others ``(4, n)``: ``(n,)``, as darknet's box_iou computes it.

    It is NaN where neither has an area, for darknet's 0; both exceed no threshold.
    """
    width = np.minimum(box[2], others[2]) - np.maximum(box[0], others[0])
    height = np.minimum(box[3], others[3]) - np.maximum(box[1], others[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    union = (box[2] - box[0]) * (box[3] - box[1]) + (others[2] - others[0]) * (others[3] - others[1]) - shared
    iou: NDArray[np.float32] = shared / union
    return iou


def _distance(
    best: NDArray[np.float32], others: NDArray[np.float32], exponent: float, image_size: tuple[float, float]
) -> NDArray[np.float32]:
    """The distance term that box_diou and box_diounms subtract; the power is computed in double as in C."""
    size = np.array([*image_size, *image_size], np.float32)[:, np.newaxis]
    a, b = best / size, others / size
    wide = np.maximum(a[2], b[2]) - np.minimum(a[0], b[0])
    high = np.maximum(a[3], b[3]) - np.minimum(a[1], b[1])
    diagonal = wide * wide + high * high
    x, y = ((a[i] + a[i + 2]) / np.float32(2) - (b[i] + b[i + 2]) / np.float32(2) for i in (0, 1))
    ratio = (x * x + y * y) / diagonal
    term: NDArray[np.float32] = np.power(ratio.astype(np.float64), exponent).astype(np.float32)
    return term
