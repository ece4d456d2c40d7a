"""Weights of an image's positions: the best score of any anchor, against a loop over the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import Array, Made

from darktrt.calib.importance import WEIGHT_OF_ONE, resampled, weights_of
from darktrt.metadata import HeadInfo


def score(raw: Array, head: HeadInfo, anchor: int, row: int, column: int) -> float:
    own = head.channels // len(head.anchors)
    of_anchor = [float(value) for value in raw[anchor * own : (anchor + 1) * own, row, column]]
    values = of_anchor[-1 - head.classes :]
    if head.kind == "region":
        powers = [math.exp(value) for value in values[1:]]
        return max(powers) / sum(powers) / (1 + math.exp(-values[0]))
    if not head.new_coords:
        values = [1 / (1 + math.exp(-value)) for value in values]
    uncertainties = [1 / (1 + math.exp(-value)) for value in of_anchor[1:8:2]] if head.kind == "Gaussian_yolo" else []
    return values[0] * max(values[1:]) * (1 - sum(uncertainties) / 4)


@pytest.mark.parametrize(("new_coords", "kind"), [(False, "yolo"), (True, "yolo"), (False, "region"), (False, "Gaussian_yolo")])
def test_weights_are_the_best_scores(made: Made, new_coords: bool, kind: Any) -> None:
    random = np.random.default_rng(1)
    heads = [replace(head, new_coords=new_coords, kind=kind) for head in made.info.heads]
    shapes = [(2, head.channels, head.rows, head.columns) for head in heads]
    draw = random.random if new_coords else random.normal
    raws = {head.tensor: draw(size=shape).astype(np.float32) for head, shape in zip(heads, shapes, strict=True)}
    result = weights_of(raws, heads)
    rows, columns = max(head.rows for head in heads), max(head.columns for head in heads)
    assert result.shape == (2, rows, columns)
    assert result.dtype == np.uint8
    for n, row, column in np.ndindex(*result.shape):
        best = max(
            score(raws[head.tensor][n], head, anchor, row * head.rows // rows, column * head.columns // columns)
            for head in heads
            for anchor in range(len(head.anchors))
        )
        assert abs(result[n, row, column] - WEIGHT_OF_ONE * best) <= 0.5 + 1e-3


def test_huge_and_damaged_raw_values_stay_weights(made: Made) -> None:
    raws = {
        head.tensor: np.full((1, len(head.anchors) * (5 + head.classes), head.rows, head.columns), value, np.float32)
        for head, value in zip(made.info.heads, (1e30, np.nan), strict=True)
    }
    assert (weights_of(raws, made.info.heads) == WEIGHT_OF_ONE).all()
    regions = [replace(head, kind="region") for head in made.info.heads]
    assert (weights_of(raws, regions) == round(WEIGHT_OF_ONE / regions[0].classes)).all()


def test_weights_are_twentieths_of_a_score(made: Made) -> None:
    """The background, with scores below 1/40, has weight 0."""
    (head,) = [replace(made.info.heads[0], new_coords=True, rows=1, columns=4, tensor="raw")]
    raw = np.zeros((1, len(head.anchors) * (5 + head.classes), 1, 4), np.float32)
    raw[0, 4, 0], raw[0, 5, 0] = 1, [0.024, 0.026, 0.5, 1]
    assert weights_of({"raw": raw}, [head]).tolist() == [[[0, 1, 10, 20]]]
    raw[0, 4, 0] = 0.5
    assert weights_of({"raw": raw}, [head]).tolist() == [[[0, 0, 5, 10]]]
    raw[0, 4:6, 0] = [[2, -1, 0, 1], [2, 1, 1, -1]]  # no probabilities
    assert weights_of({"raw": raw}, [head]).tolist() == [[[20, 0, 0, 0]]]


def test_cells_join_by_their_largest_and_split_into_copies() -> None:
    maps = np.arange(24).reshape(1, 4, 6)
    assert resampled(maps, 2, 3).tolist() == [[[7, 9, 11], [19, 21, 23]]]
    assert resampled(maps, 4, 12)[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert resampled(maps, 3, 6)[0, :, 0].tolist() == [0, 6, 18]
    assert resampled(maps, 1, 1).item() == 23
    assert resampled(maps, 4, 6).tolist() == maps.tolist()
