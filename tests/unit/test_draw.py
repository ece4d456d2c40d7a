"""Drawn images: boxes at their coordinates, labels inside the image, a colour for each class."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from darktrt.vision.boxes import Detections
from darktrt.vision.draw import _ink, colour, draw

GRAY = 128


def canvas(height: int = 200, width: int = 300) -> np.ndarray:
    return np.full((height, width, 3), GRAY, np.uint8)


def found(*boxes: tuple[float, ...], name: str = "dog", scores: tuple[float, ...] | None = None) -> Detections:
    count = len(boxes)
    values = np.array(scores or [0.5] * count, np.float32)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), values, np.zeros(count, np.int32), (name,))


def changed(image: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return np.asarray((image != drawn).any(axis=2))


def test_edges_are_drawn_and_the_inside_is_left() -> None:
    image = canvas()
    drawn = draw(image, found((100, 80, 200, 160)))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    for edge in (drawn[80, 100:201], drawn[160, 100:201], drawn[80:161, 100], drawn[80:161, 200]):
        np.testing.assert_array_equal(edge, np.broadcast_to(colour(0), edge.shape))
    mask = changed(image, drawn)
    assert not mask[84:157, 104:197].any()
    assert not mask[162:].any()
    assert not mask[:, 205:].any()
    assert not mask[:, :99].any()


def test_the_label_is_above_the_box() -> None:
    mask = changed(canvas(), draw(canvas(), found((100, 80, 200, 160))))
    rows = np.nonzero(mask[:80].any(axis=1))[0]
    assert rows.size >= 10
    assert rows.max() == 79
    np.testing.assert_array_equal(rows, np.arange(rows.min(), 80))
    assert mask[70, 100]


def test_the_label_goes_into_a_box_without_room_above() -> None:
    mask = changed(canvas(), draw(canvas(), found((100, 4, 200, 160))))
    assert not mask[:4].any()
    assert mask[5:14, 101:110].all(axis=1).any()


@pytest.mark.parametrize(
    ("box", "first_rows", "second_rows"), [((100, 60, 250, 120), (45, 58), (123, 135)), ((0, 0, 300, 200), (3, 13), (186, 197))]
)
def test_labels_of_equal_boxes_are_all_shown(
    box: tuple[float, ...], first_rows: tuple[int, int], second_rows: tuple[int, int]
) -> None:
    boxes, ids = np.array([box] * 2, np.float32), np.array([1, 2], np.int32)
    drawn = draw(canvas(), Detections(boxes, np.array([0.9, 0.3], np.float32), ids, ("a", "b", "c")))
    for class_id, (top, bottom) in ((1, first_rows), (2, second_rows)):
        filled = (drawn[top:bottom, int(box[0]) + 3 : int(box[0]) + 23] == colour(class_id)).all(axis=2)
        assert filled.any(axis=1).all()


@pytest.mark.parametrize("box", [(0, 0, 40, 40), (280, 0, 300, 30), (290, 190, 300, 200), (0, 195, 5, 200), (0, 0, 300, 200)])
def test_labels_stay_inside_the_image(box: tuple[float, ...]) -> None:
    """A label cut at the border would show fewer pixels than one in the middle."""

    def filled(place: tuple[float, ...]) -> int:
        boxes_only = draw(canvas(), found(place, name=""))
        return int(changed(boxes_only, draw(canvas(), found(place, name="a longer name"))).sum())

    assert filled(box) > 0.5 * filled((150, 100, 151, 101))


def test_the_input_image_is_not_changed() -> None:
    image = canvas()
    draw(image, found((10, 10, 50, 50)))
    np.testing.assert_array_equal(image, canvas())


def test_no_detections_change_nothing() -> None:
    np.testing.assert_array_equal(draw(canvas(), found()), canvas())


def test_lines_and_letters_grow_with_the_image() -> None:
    small = changed(canvas(), draw(canvas(), found((100, 80, 200, 160))))
    large = changed(canvas(1600, 2400), draw(canvas(1600, 2400), found((800, 640, 1600, 1280))))
    assert small[120, 90:150].sum() < large[960, 720:1200].sum() >= 6
    assert small[:80].any(axis=1).sum() * 4 < large[:640].any(axis=1).sum()


def test_the_best_detection_is_on_top() -> None:
    boxes = np.array([[100, 80, 200, 160]] * 2, np.float32)
    scores, ids = np.array([0.9, 0.3], np.float32), np.array([1, 2], np.int32)
    drawn = draw(canvas(), Detections(boxes, scores, ids, ("a", "b", "c")))
    assert tuple(drawn[160, 150]) == colour(1)


def test_colours_are_stable_and_distinct() -> None:
    colours = [colour(i) for i in range(80)]
    assert colours == [colour(i) for i in range(80)]
    assert len(set(colours)) == 80
    nearest = min(sum(abs(a - b) for a, b in zip(*two, strict=True)) for two in combinations(colours[:20], 2))
    assert nearest > 40


def test_colours_of_classes_are_those_of_every_version() -> None:
    """Of images that were drawn before, and of reports."""
    known = {0: (242, 50, 24), 1: (24, 242, 114), 7: (60, 24, 242), 8: (255, 165, 89), 16: (199, 163, 30), 79: (205, 242, 24)}
    assert {i: colour(i) for i in known} == known


@pytest.mark.parametrize(("height", "width", "line"), [(100, 100, 1), (1000, 1500, 5), (1600, 2400, 8), (2400, 1600, 8)])
def test_lines_are_a_two_hundred_and_fiftieth_of_the_image(height: int, width: int, line: int) -> None:
    """Of its mean side; a label has room for a line of a fortieth, and ten pixels at least."""
    left, top, right, bottom = (round(part * side) for part, side in ((0.3, width), (0.5, height), (0.7, width), (0.9, height)))
    image = canvas(height, width)
    mask = changed(image, draw(image, found((left, top, right, bottom))))
    assert np.flatnonzero(mask[round(0.7 * height)]).tolist() == [
        *range(left, left + line),
        *range(right - line + 1, right + 1),
    ]
    letters = max(10, 0.024 * (height + width) / 2)
    assert 1.1 * letters < mask[:top].any(axis=1).sum() <= 1.6 * letters


def test_a_box_around_the_image_is_drawn_at_its_border() -> None:
    mask = changed(canvas(), draw(canvas(), found((-20, -20, 400, 400))))
    for border in (mask[199], mask[:, 0], mask[:, 299]):
        assert border.all()
    assert not mask[25:198, 1:299].any()


def test_scores_may_be_left_out() -> None:
    """The label is shorter then."""
    detections = found((20, 80, 200, 160))
    with_scores, without = (changed(canvas(), draw(canvas(), detections, scores)) for scores in (True, False))
    np.testing.assert_array_equal(draw(canvas(), detections), draw(canvas(), detections, True))
    assert without[70].sum() < 0.7 * with_scores[70].sum()


def test_letters_are_black_or_white_whichever_stands_out_more() -> None:
    """By the contrast of WCAG 2, for every class of COCO."""

    def luminance(rgb: tuple[int, ...]) -> float:
        return sum(part * ((v / 255 + 0.055) / 1.055) ** 2.4 for part, v in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))

    for i in range(80):
        fill = luminance(colour(i))
        white, black = 1.05 / (fill + 0.05), (fill + 0.05) / 0.05
        if max(white, black) / min(white, black) > 1.02:
            assert _ink(colour(i)) == ((255, 255, 255) if white > black else (0, 0, 0))


def test_a_label_has_a_margin_around_its_letters() -> None:
    """A fifth of their height on every side, and as high for every name."""
    images = [draw(canvas(400, 600), found((100, 200, 500, 350), name=name), False) for name in ("a", "g", "MMM")]
    tops = {int(np.flatnonzero(changed(canvas(400, 600), image)[:200].any(axis=1))[0]) for image in images}
    assert len(tops) == 1
    label = images[2][tops.pop() : 200, 100:]
    label = label[:, : int(np.flatnonzero((label[0] == colour(0)).all(axis=1)).size)]
    rows, columns = np.nonzero((label != colour(0)).any(axis=2))
    margins = rows.min(), columns.min(), label.shape[1] - 1 - columns.max()
    letters = label.shape[0] / 1.4
    assert all(0.1 * letters < margin < 0.35 * letters for margin in margins), margins


@pytest.mark.parametrize("class_id", range(0, 80, 7))
def test_text_stands_out_from_its_label(class_id: int) -> None:
    def luminance(pixel: tuple[int, ...]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (p / 255 for p in pixel)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    names = tuple("WWWWWW" for _ in range(80))
    box = np.array([[10, 60, 290, 190]], np.float32)
    one = Detections(box, np.array([0.5], np.float32), np.array([class_id], np.int32), names)
    label = draw(canvas(), one)[40:60, 10:60].reshape(-1, 3)
    values = [luminance(pixel) for pixel in [*map(tuple, label), colour(class_id)]]
    fill = luminance(colour(class_id))
    contrast = max((max(v, fill) + 0.05) / (min(v, fill) + 0.05) for v in values)
    assert contrast >= 4.5


@pytest.mark.parametrize("name", ["Straße", "собака", "自転車", "كلب", "two\nlines", "", "\udce4", "x" * 500])
def test_any_name_can_be_drawn(name: str) -> None:
    assert changed(canvas(), draw(canvas(), found((50, 50, 150, 150), name=name))).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (12, 12)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 0, 0), (-50, -50, 500, 500), (30, 30, 35, 35)])
def test_tiny_images_and_boxes_beyond_them(size: tuple[int, int], box: tuple[float, ...]) -> None:
    assert draw(canvas(*size), found(box)).shape == (*size, 3)
