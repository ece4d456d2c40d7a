"""Where a variant's detections differ from the reference's: what counts, by how much, and the images that show it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import made_image
from PIL import Image

from darktrt.check.disagreements import disagreement, labels_of, panels, shown
from darktrt.check.ground_truth import LabelledImage, LabelledObject
from darktrt.vision.boxes import Detections

NAMES = ("cat", "dog")
Row = tuple[tuple[float, float, float, float], float, int]
LEFT, RIGHT, BELOW = (0, 0, 40, 40), (100, 0, 140, 40), (0, 100, 40, 140)


def detections(*rows: Row) -> Detections:
    boxes, scores, ids = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(ids, np.int32)
    return Detections(*arrays, NAMES)


def test_only_scores_above_a_quarter_are_shown() -> None:
    found = detections((LEFT, 0.5, 0), (RIGHT, 0.251, 1), (BELOW, 0.25, 0))
    assert shown(found).scores.tolist() == [0.5, np.float32(0.251)]
    nothing = disagreement("x.png", "INT8", detections((BELOW, 0.25, 0)), detections((RIGHT, 0.25, 1)))
    assert (nothing.amount, nothing.missing, nothing.extra, nothing.moved) == (0, (), (), ())


def test_several_differences_add_up() -> None:
    """Unmatched detections by what they are above 0.25, and changes of scores by a tenth or more as they are."""
    expected = detections((LEFT, 0.875, 0), (RIGHT, 0.75, 1), (BELOW, 0.625, 1))
    actual = detections((BELOW, 0.9375, 1), (LEFT, 0.75, 0), ((200, 0, 240, 40), 0.5, 1), ((200, 100, 240, 140), 0.375, 0))
    one = disagreement("x.png", "INT8", actual, expected)
    assert (one.image, one.variant) == ("x.png", "INT8")
    assert (one.missing, one.extra) == (("dog 0.75",), ("dog 0.50", "cat 0.38"))
    assert one.moved == ("cat 0.88 → 0.75", "dog 0.62 → 0.94")
    assert one.amount == pytest.approx((0.75 - 0.25) + (0.5 - 0.25) + (0.375 - 0.25) + 0.125 + 0.3125)


def test_a_change_of_a_tenth_counts() -> None:
    for score, counts in ((0.39, True), (0.41, False), (0.61, True), (0.59, False)):
        one = disagreement("x.png", "INT8", detections((LEFT, score, 0)), detections((LEFT, 0.5, 0)))
        assert bool(one.moved) == (one.amount > 0) == counts


def test_labels_are_drawn_as_corners() -> None:
    """Of every class; a box of negative width has none."""
    objects = (
        LabelledObject(1, (10, 20, 30, 50), 1500, False),
        LabelledObject(0, (5, 6, 0, 7), 0, False),
        LabelledObject(0, (50, 60, -7, -8), 0, True),
    )
    found = labels_of(LabelledImage(Path("x.png"), None, objects), NAMES)
    assert found.boxes.tolist() == [[10, 20, 40, 70], [5, 6, 5, 13], [50, 60, 50, 60]]
    assert (found.class_ids.tolist(), found.scores.tolist()) == ([1, 0, 0], [1, 1, 1])
    nothing = labels_of(LabelledImage(Path("x.png"), None, ()), NAMES)
    assert nothing.boxes.shape == (0, 4)


def opened(panel: str) -> Image.Image:
    kind, _, text = panel.partition(";base64,")
    assert kind == "data:image/jpeg"
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((960, 480), (480, 240)), ((480, 960), (240, 480)), ((480, 480), (480, 480)), ((200, 100), (200, 100)),
        ((4000, 2), (480, 1)), ((2, 4000), (1, 480)), ((481, 481), (480, 480)),
    ],
)  # fmt: skip
def test_panels_are_at_most_480_pixels_large(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    Image.new("RGB", size, "gray").save(tmp_path / "x.png")
    labelled = LabelledImage(tmp_path / "x.png", None, ())
    assert {opened(panel).size for panel in panels(labelled, [detections()])} == {expected}


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    """In an image of half the size too; with scores for detections, and without for labels."""
    Image.new("RGB", (960, 640), "black").save(tmp_path / "x.png")
    labelled = LabelledImage(tmp_path / "x.png", None, (LabelledObject(0, (200, 300, 400, 200), 80_000, False),))
    found = detections(((200, 300, 600, 500), 0.9, 0), ((700, 100, 800, 200), 0.2, 1))
    labels, drawn = (np.asarray(opened(panel)).astype(int).sum(2) for panel in panels(labelled, [found]))
    for pixels in (labels, drawn):
        rows, columns = np.nonzero(pixels > 200)
        assert abs(columns.min() - 100) <= 3 and abs(rows.max() - 250) <= 3
        assert abs(np.flatnonzero((pixels > 200).sum(0) > 60).max() - 300) <= 3
        assert pixels[40:110, 340:410].max() < 60  # the detection below 0.25 is not drawn
    assert (drawn > 200).sum() > (labels > 200).sum() + 50  # the score


def test_panels_are_small_files(tmp_path: Path) -> None:
    """JPEG of quality 80, whose shades are off by a few levels, and no byte larger than need be."""
    pixels = made_image(320, 480)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    (panel, _) = panels(LabelledImage(tmp_path / "x.png", None, ()), [detections()])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    image: Any = opened(panel)
    assert image.quantization == Image.open(buffer).quantization  # type: ignore[attr-defined]
    assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 4
    assert len(base64.b64decode(panel.partition(";base64,")[2])) < len(buffer.getvalue())
