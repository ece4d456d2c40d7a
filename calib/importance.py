"""The importance of each position of an image for the detections of a network, as weights of its activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.metadata import HeadInfo, box_channels

WEIGHT_OF_ONE = 20
"""The weight of a position with score 1. Weights are whole numbers, so that their sums do not depend on an order; and they
are small, so that the background, with scores below 1/40, has weight 0 and costs no time."""

Weights = NDArray[np.uint8]
"""``(N, rows, columns)``."""


def weights_of(raws: Mapping[str, NDArray[Any]], heads: Sequence[HeadInfo]) -> Weights:
    """The best score (objectness times class) of any anchor at each position, on the finest head's grid, in twentieths.

    Args:
        raws: the heads' raw tensors by name, ``(N, channels, rows, columns)``.
    """
    maps = [_best_scores(raws[head.tensor], head) for head in heads]
    rows, columns = (max(m.shape[axis] for m in maps) for axis in (1, 2))
    best: NDArray[np.float32] = np.max([resampled(m, rows, columns) for m in maps], axis=0)
    return np.rint(best * WEIGHT_OF_ONE).astype(np.uint8)


def _best_scores(raw: NDArray[Any], head: HeadInfo) -> NDArray[np.float32]:
    batch, _, rows, columns = raw.shape
    boxes = raw.reshape(batch, len(head.anchors), -1, rows, columns)
    first = box_channels(head.kind)
    best = boxes[:, :, first + 1 :].max(axis=2)
    logits = np.stack([boxes[:, :, first], best])
    objectness, classes = logits if head.new_coords else _logistic(logits)
    if head.kind == "region":  # the best probability of a softmax is 1 / sum(exp(logit - best logit))
        classes = 1 / np.exp(boxes[:, :, first + 1 :] - best[:, :, np.newaxis]).sum(axis=2)
    elif head.kind == "Gaussian_yolo":
        objectness = objectness * (1 - _logistic(boxes[:, :, 1:first:2]).mean(axis=2))
    scores: NDArray[np.float32] = np.clip((objectness * classes).max(axis=1), 0, 1)
    return np.nan_to_num(scores)


def _logistic(x: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = 1 / (1 + np.exp(-np.clip(x, -80, 80)))
    return result


def resampled(maps: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """Maps ``(N, R, C)`` on another grid ``(N, rows, columns)``: the maximum of joined cells, copies of split cells."""
    return _resampled(_resampled(maps, rows, 1), columns, 2)


def _resampled(maps: NDArray[Any], size: int, axis: int) -> NDArray[Any]:
    starts = np.arange(size) * maps.shape[axis] // size
    if size >= maps.shape[axis]:
        split: NDArray[Any] = np.take(maps, starts, axis)
        return split
    joined: NDArray[Any] = np.maximum.reduceat(maps, starts, axis)
    return joined
