"""How far a network's outputs are from a reference's: tensors, detections, and the tolerance for each precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.vision.boxes import box_iou

MATCHING_IOU = 0.5
"""Least IoU of two detections of one class that are taken for the same object."""

_TINY = 1e-30


@dataclass(frozen=True)
class Tolerance:
    """How far results may be from the reference's."""

    worst: float
    """Largest error of a tensor's elements, relative to the largest absolute value of the reference."""
    cosine: float
    """Least cosine of the angle between a tensor and the reference's."""
    score: float
    """Largest difference of the scores of matched detections; unmatched ones that near to the threshold do not count."""
    unmatched: float
    """Share of detections that may be missing or extra."""
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.999999, 0.001, 0.0, "sums in another order, each rounded to 24 bits"),
    "tf32": Tolerance(0.03, 0.9998, 0.02, 0.02, "TensorRT multiplies FP32 as TF32, rounded to 11 bits"),
    "fp16": Tolerance(0.03, 0.9998, 0.02, 0.02, "weights and every layer's output rounded to 11 bits"),
    "int8": Tolerance(0.4, 0.97, 0.3, 0.25, "weights and inputs of convolutions rounded to 8 bits"),
}
"""By the coarser precision of the two, finest first. The worst layer of yolov4-tiny and yolov4-tiny-mish is 3e-6 off in FP32,
3e-3 in FP16 and 0.2 in INT8 (measured); above that is room for networks five times as deep."""


def tolerance_of(precisions: Sequence[str], changes: Mapping[str, float] = MappingProxyType({})) -> Tolerance:
    """The tolerance for results of these precisions, with some of its limits replaced."""
    usual = TOLERANCES[max(precisions, key=list(TOLERANCES).index)]
    return Tolerance(**{**asdict(usual), **changes, "reason": "as asked for"}) if changes else usual


def parse_tolerance(text: str) -> dict[str, float]:
    """Limits from ``worst=0.01,score=0.05``.

    Raises:
        DarktrtError: the text has another form.
    """
    names = [f.name for f in fields(Tolerance) if f.name != "reason"]
    limits = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name not in names or not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", number):
            raise DarktrtError(f"{text}: is no tolerance; write NAME=NUMBER,... with names of {', '.join(names)}", "tolerance")
        limits[name] = float(number)
    return limits


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from the reference's; over several images the worst, the mean and the least."""

    worst: float
    """Largest difference over the largest absolute value of the reference."""
    mean: float
    """Mean difference over the mean absolute value of the reference."""
    cosine: float

    def within(self, tolerance: Tolerance) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.worst <= tolerance.worst and self.cosine >= tolerance.cosine


@dataclass(frozen=True)
class Matches:
    """Detections matched to the reference's by class and overlap, best scores first."""

    expected: int
    score: float
    """Largest difference of matched scores."""
    iou: float
    """Least IoU of matched boxes."""
    missing: tuple[float, ...]
    """Score minus threshold of each unmatched detection of the reference."""
    extra: tuple[float, ...]
    """Score minus threshold of each detection that the reference lacks."""

    def unmatched(self, tolerance: Tolerance) -> int:
        """The number of unmatched detections, without those so near to the threshold that the other may lie below it."""
        return sum(not score <= tolerance.score for score in self.missing + self.extra)

    def within(self, tolerance: Tolerance) -> bool:
        """Whether scores and unmatched detections are within the tolerance."""
        return self.score <= tolerance.score and self.unmatched(tolerance) <= tolerance.unmatched * self.expected


def tensor_error(actual: NDArray[np.float32], expected: NDArray[np.float32], name: str) -> TensorError:
    """How far ``actual`` is from ``expected``, computed in float64.

    Raises:
        DarktrtError: their shapes differ.
    """
    if actual.shape != expected.shape:
        raise DarktrtError(f"'{name}' is {actual.shape}, but {expected.shape} of the reference; convert both from one cfg")
    with np.errstate(all="ignore"):  # infinite values give NaN, which no tolerance lets pass
        a, b = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
        error, size = np.abs(a - b), np.abs(b)
        lengths = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = float(a @ b / lengths) if lengths else float(np.array_equal(a, b))
        return TensorError(float(error.max() / max(size.max(), _TINY)), float(error.mean() / max(size.mean(), _TINY)), cosine)


def match(actual: NDArray[np.float32], expected: NDArray[np.float32], threshold: float) -> Matches:
    """Match the detections ``(n, 6)`` of an image to those expected, by :func:`pair`."""
    pairs = pair(actual, expected)
    matched = [(i, partner) for i, partner in enumerate(pairs) if partner]
    with np.errstate(over="ignore"):
        scores = [abs(float(actual[j, 4] - expected[i, 4])) for i, (j, _) in matched]
    missing = tuple(float(expected[i, 4]) - threshold for i, partner in enumerate(pairs) if partner is None)
    extra = tuple(float(actual[j, 4]) - threshold for j in unpaired(pairs, len(actual)))
    return Matches(len(expected), max([0.0, *scores]), min([1.0, *(iou for _, (_, iou) in matched)]), missing, extra)


def pair(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> list[tuple[int, float] | None]:
    """Pair each expected detection, best first, with the free one of its class that overlaps it most.

    Args:
        actual: ``(n, 6)``: x1 y1 x2 y2, score, class.
        expected: ``(m, 6)``, likewise.

    Returns:
        For each expected detection the partner's index and IoU; None where no IoU reaches :data:`MATCHING_IOU`.
    """
    free, pairs = np.ones(len(actual), bool), []
    for row in expected:
        with np.errstate(all="ignore"):  # NaN for two boxes without area
            overlap = np.nan_to_num(box_iou(row[:4, np.newaxis], actual[:, :4].T))
        iou = np.where(free & (actual[:, 5] == row[5]), overlap, 0)
        best = int(iou.argmax()) if len(iou) else -1
        matches = best >= 0 and iou[best] >= MATCHING_IOU
        pairs.append((best, float(iou[best])) if matches else None)
        if matches:
            free[best] = False
    return pairs


def unpaired(pairs: Sequence[tuple[int, float] | None], count: int) -> list[int]:
    """Indices of the detections, of ``count``, that are no partner in ``pairs``."""
    paired = {partner[0] for partner in pairs if partner}
    return [i for i in range(count) if i not in paired]
