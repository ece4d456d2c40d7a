"""Detections' promises, and NMS against a scalar brute force written from darknet's box.c in double."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from darktrt.errors import DarktrtError
from darktrt.metadata import NmsKind
from darktrt.vision.boxes import Detections, nms, place_detections
from darktrt.vision.images import Placement

NAMES = ("person", "собака", "car")
KINDS: tuple[NmsKind, ...] = ("plain", "greedynms", "diounms")


def made(boxes: object = ((10, 20, 30, 40), (0, 0, 5, 5)), scores: object = (0.9, 0.5), ids: object = (1, 2)) -> Detections:
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(ids, np.int32), NAMES)


def test_detections_have_length_names_and_parts() -> None:
    found = made()
    assert len(found) == 2
    assert found.names == ["собака", "car"]
    best = found.select(found.scores > 0.6)
    assert best.names == ["собака"]
    np.testing.assert_array_equal(best.boxes, [[10, 20, 30, 40]])
    assert found.select(slice(1, None)).names == ["car"]
    assert found.select(np.array([1, 0])).names == ["car", "собака"]


def test_names_are_numbers_where_none_are_known() -> None:
    found = Detections(np.zeros((1, 4), np.float32), np.ones(1, np.float32), np.array([7], np.int32), ())
    assert found.names == ["7"]


def test_json_keeps_every_digit() -> None:
    found = made(boxes=(1.1, 2, 3.3, 4), scores=(0.1,), ids=(0,))
    record = json.loads(json.dumps(found.to_list()))[0]
    assert record == {"class": "person", "class_id": 0, "score": 0.1, "box": [1.1, 2.0, 3.3, 4.0]}
    np.testing.assert_array_equal(np.array(record["box"], np.float32), found.boxes[0])


def test_table() -> None:
    lines = made().to_table().splitlines()
    assert lines[0].split() == ["class", "score", "x1", "y1", "x2", "y2"]
    assert lines[1].split() == ["собака", "0.900", "10.0", "20.0", "30.0", "40.0"]
    assert len(set(map(len, lines))) == 1
    assert made(boxes=(), scores=(), ids=()).to_table() == "nothing found"


def test_no_detections_are_detections() -> None:
    empty = made(boxes=(), scores=(), ids=())
    assert len(empty) == 0
    assert empty.to_list() == []
    assert empty.names == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": np.zeros((3, 4), np.float32)}, r"boxes must be \(2, 4\) float32, not \(3, 4\) float32"),
        ({"boxes": np.zeros((2, 5), np.float32)}, r"boxes must be \(2, 4\) float32, not \(2, 5\) float32"),
        ({"boxes": np.zeros((2, 4))}, "float32, not .* float64"),
        ({"boxes": np.full((2, 4), np.nan, np.float32)}, "boxes must be finite, but 8 values are not"),
        ({"boxes": np.array([[0, 0, 5, np.inf]] * 2, np.float32)}, "finite, but 2 values"),
        ({"boxes": np.array([[0, 5, 5, 4]] * 2, np.float32)}, "ends before it begins"),
        ({"scores": np.zeros((2, 1), np.float32)}, r"scores must be \(2,\) float32"),
        ({"scores": np.array([1, np.nan], np.float32)}, "scores must be finite"),
        ({"class_ids": np.zeros(2, np.int64)}, r"class_ids must be \(2,\) int32, not \(2,\) int64"),
        ({"class_ids": np.zeros(3, np.int32)}, r"class_ids must be \(2,\) int32, not \(3,\)"),
        ({"class_ids": np.array([0, 3], np.int32)}, "class ids 0 to 3, but there are 3 class names"),
        ({"class_ids": np.array([-1, 0], np.int32)}, "class ids -1 to 0"),
    ],
)
def test_invalid_detections_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    good = made()
    arrays: dict[str, Any] = {"boxes": good.boxes, "scores": good.scores, "class_ids": good.class_ids, "class_names": NAMES}
    with pytest.raises(DarktrtError, match=message):
        Detections(**{**arrays, **change})


def test_placed_detections_are_clipped_to_the_image() -> None:
    placement = Placement(200, 100, scale_x=2, scale_y=1, offset_x=0, offset_y=10)
    boxes = np.array([[-5, 20, 50, 40], [90, 5, 120, 300], [-np.inf, -np.inf, np.inf, np.inf]], np.float32)
    found = place_detections(boxes, np.ones(3, np.float32), np.zeros(3, np.int32), placement, NAMES)
    np.testing.assert_array_equal(found.boxes, [[0, 10, 100, 30], [180, 0, 200, 100], [0, 0, 200, 100]])


# NMS


def scalar_overlap(a: list[float], b: list[float], kind: str, beta: float) -> float:
    """box_iou, box_diou, box_diounms of box.c: boxes as centre and size in relative coordinates."""
    left, right = max(a[0] - a[2] / 2, b[0] - b[2] / 2), min(a[0] + a[2] / 2, b[0] + b[2] / 2)
    top, bottom = max(a[1] - a[3] / 2, b[1] - b[3] / 2), min(a[1] + a[3] / 2, b[1] + b[3] / 2)
    shared = 0.0 if right < left or bottom < top else (right - left) * (bottom - top)
    union = a[2] * a[3] + b[2] * b[3] - shared
    iou = 0.0 if shared == 0 or union == 0 else shared / union
    wide = max(a[0] + a[2] / 2, b[0] + b[2] / 2) - min(a[0] - a[2] / 2, b[0] - b[2] / 2)
    high = max(a[1] + a[3] / 2, b[1] + b[3] / 2) - min(a[1] - a[3] / 2, b[1] - b[3] / 2)
    diagonal = wide * wide + high * high
    if kind == "plain" or diagonal == 0:
        return iou
    distance = (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    term: float = (distance / diagonal) ** (0.6 if kind == "greedynms" else beta)
    return iou - term


def scalar_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    score_threshold: float,
    iou_threshold: float,
    kind: str,
    beta: float,
    input_size: tuple[int, int],
    max_candidates: int | None = None,
    max_detections: int | None = None,
) -> list[tuple[int, int]]:
    """(anchor, class) of what stays: one list of candidates, one pass, every kept one looked at."""
    threshold = float(np.float32(score_threshold))
    rows = enumerate(scores.tolist())
    candidates = [(-s, anchor, c) for anchor, row in rows for c, s in enumerate(row) if s > threshold]
    relative = []
    for x1, y1, x2, y2 in boxes.astype(float).tolist():
        (w, h), size = (x2 - x1, y2 - y1), input_size
        relative.append([(x1 + x2) / 2 / size[0], (y1 + y2) / 2 / size[1], w / size[0], h / size[1]])
    kept: list[tuple[int, int]] = []
    for _, anchor, c in sorted(candidates)[:max_candidates]:
        others = [relative[other] for other, of_class in kept if of_class == c]
        if all(not scalar_overlap(candidate, relative[anchor], kind, beta) > iou_threshold for candidate in others):
            kept.append((anchor, c))
    return kept[:max_detections]


def made_candidates(seed: int, count: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping boxes on whole pixels, some without width or height or both, some twice; scores in steps, so with ties."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 40, (count, 2))
    size = rng.integers(0, 30, (count, 2)) * (rng.random((count, 2)) > 0.1)
    boxes = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    boxes[rng.integers(0, count, 12)] = boxes[rng.integers(0, count, 12)]
    scores = np.round(rng.random((count, classes)), 1).astype(np.float32)
    return boxes, scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limits", [(None, None), (50, None), (None, 7), (40, 5)])
def test_nms_is_the_sequential_definition(kind: NmsKind, seed: int, limits: tuple[int | None, int | None]) -> None:
    boxes, scores = made_candidates(seed)
    thresholds, beta, size = (0.3, (0.05, 0.23, 0.453)[seed % 3]), (0.35, 1.3)[seed % 2], (640, 160)
    expected = scalar_nms(boxes, scores, *thresholds, kind, beta, size, *limits)
    kept_boxes, kept_scores, kept_classes = nms(boxes, scores, *thresholds, kind, beta, size, *limits)
    anchors, classes = map(list, zip(*expected, strict=True))
    np.testing.assert_array_equal(kept_boxes, boxes[anchors])
    np.testing.assert_array_equal(kept_scores, scores[anchors, classes])
    np.testing.assert_array_equal(kept_classes, classes)
    assert [a.dtype.name for a in (kept_boxes, kept_scores, kept_classes)] == ["float32", "float32", "int32"]


def test_the_kinds_differ_on_such_boxes() -> None:
    """Else the comparison above would not tell them apart; the shape of the input must matter too."""
    boxes, scores = made_candidates(1)
    forms = [(kind, size) for kind in KINDS for size in ((640, 160), (160, 640))]
    counts = [len(nms(boxes, scores, 0.3, 0.23, kind, 0.35, size)[0]) for kind, size in forms]
    assert counts[0] == counts[1]
    assert len(set(counts)) == 5


def pair(
    first: tuple[float, ...], second: tuple[float, ...], iou_threshold: float, kind: NmsKind = "plain", beta: float = 1.0
) -> int:
    boxes = np.array([first, second], np.float32)
    scores = np.array([[0.9], [0.8]], np.float32)
    return len(nms(boxes, scores, 0.25, iou_threshold, kind, beta, (100, 100))[0])


def test_thresholds_are_strict() -> None:
    scores = np.array([[0.5], [0.25]], np.float32)
    boxes = np.array([[0, 0, 4, 4], [50, 50, 54, 54]], np.float32)
    assert len(nms(boxes, scores, 0.25, 0.5, "plain", 0.6, (100, 100))[0]) == 1
    assert pair((0, 0, 4, 4), (0, 0, 4, 2), 0.5) == 2  # an IoU of exactly 0.5
    assert pair((0, 0, 4, 4), (0, 0, 4, 2), 0.49) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_boxes_suppress_nothing(kind: NmsKind) -> None:
    """No area shared is an IoU of 0, also of a point with itself, where box.c would divide by 0."""
    assert pair((5, 5, 5, 5), (5, 5, 5, 5), 0.0, kind) == 2
    assert pair((5, 5, 5, 9), (5, 5, 5, 9), 0.0, kind) == 2
    assert pair((0, 0, 9, 9), (5, 5, 5, 5), 0.0, kind) == 2
    assert pair((0, 0, 9, 9), (9, 0, 18, 9), 0.0, kind) == 2


def test_the_distance_term_by_hand() -> None:
    """Boxes of 20 x 10, 10 apart: IoU 1/3, d = 100, c = 30*30 + 10*10 = 1000, so diounms leaves 1/3 - 0.1 at beta 1."""
    first, second = (0, 0, 20, 10), (10, 0, 30, 10)
    assert pair(first, second, 1 / 3 - 0.101, "diounms", 1.0) == 1
    assert pair(first, second, 1 / 3 - 0.099, "diounms", 1.0) == 2
    term = 0.1**0.6  # greedynms: the exponent is fixed, whatever beta says
    assert pair(first, second, 1 / 3 - term - 0.001, "greedynms", 1.0) == 1
    assert pair(first, second, 1 / 3 - term + 0.001, "greedynms", 1.0) == 2


def test_equal_boxes_have_no_distance() -> None:
    for kind in KINDS:
        assert pair((3, 3, 9, 9), (3, 3, 9, 9), 0.99, kind) == 1


def test_classes_do_not_suppress_each_other_and_a_box_may_have_several() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9]], np.float32)
    scores = np.array([[0.9, 0.7], [0.8, 0.95]], np.float32)
    _, kept, classes = nms(boxes, scores, 0.25, 0.45, "plain", 0.6, (100, 100))
    np.testing.assert_array_equal(kept, np.array([0.95, 0.9], np.float32))
    np.testing.assert_array_equal(classes, [1, 0])


def test_ties_go_to_the_lower_index() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    scores = np.full((3, 2), 0.5, np.float32)
    kept, _, classes = nms(boxes, scores, 0.25, 0.45, "plain", 0.6, (100, 100), max_detections=3)
    np.testing.assert_array_equal(kept, boxes[[0, 0, 2]])
    np.testing.assert_array_equal(classes, [0, 1, 0])


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (5, 3)])
def test_nothing_passes(shape: tuple[int, int]) -> None:
    boxes, scores, classes = nms(
        np.zeros((shape[0], 4), np.float32), np.zeros(shape, np.float32), 0.1, 0.45, "plain", 0.6, (9, 9)
    )
    assert (boxes.shape, scores.shape, classes.shape) == ((0, 4), (0,), (0,))


@pytest.mark.filterwarnings("error")
def test_infinite_boxes_and_nan_are_no_candidates() -> None:
    """exp() of an untrained network's width overflows."""
    for odd in (np.inf, -np.inf, np.nan):
        for i in range(4):
            box = [0.0, 0, 5, 5]
            box[i] = odd
            assert pair(box, box, 0.45) == 0
            assert pair(box, (0, 0, 5, 5), 0.45, "greedynms") == 1


@pytest.mark.filterwarnings("error")
def test_boxes_whose_area_overflows_suppress_nothing() -> None:
    wide = (-1e30, -1e30, 1e30, 1e30)
    assert pair(wide, wide, 0.45) == 2
    assert pair(wide, (0, 0, 5, 5), 0.45, "greedynms") == 2


def test_ten_thousand_candidates_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 400, (10000, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 80, (10000, 2))], axis=1).astype(np.float32)
    scores = np.zeros((10000, 80), np.float32)
    scores[np.arange(10000), rng.integers(0, 10, 10000)] = rng.random(10000)
    started = time.process_time()
    nms(boxes, scores, 0.0, 0.45, "greedynms", 0.6, (416, 416))
    assert time.process_time() - started < 1
