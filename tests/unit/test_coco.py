"""COCO mAP: numbers of small cases with known results, the mapping of classes, and wrong files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Array, Made, made_image, measured_accuracy
from PIL import Image

from darktrt import progress
from darktrt.check.coco import Accuracy, coco_metrics
from darktrt.check.ground_truth import LabelClasses, has_labels, load_ground_truth, read_class_map
from darktrt.errors import DarktrtError
from darktrt.vision.boxes import Detections

NAMES = ("cat", "dog")
Box = tuple[float, float, float, float]


def label(image: Any, box: Box, category: int = 7, **more: Any) -> dict[str, Any]:
    """An annotation; the box as COCO has it, x y width height."""
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def write(
    folder: Path, labels: Sequence[dict[str, Any]], *, names: Sequence[str] = NAMES, count: int = 2, name: str = "val.json"
) -> str:
    """A COCO file with ``count`` images of 200 x 150 beside it, image ids from 40, category ids 7, 9, ..."""
    for i in range(count):
        Image.fromarray(made_image(150, 200, seed=i)).save(folder / f"{i}.png")
    images = [{"id": 40 + i, "file_name": f"{i}.png", "width": 200, "height": 150} for i in range(count)]
    categories = [{"id": 7 + 2 * i, "name": category} for i, category in enumerate(names)]
    path = folder / name
    path.write_text(json.dumps({"images": images, "annotations": labels, "categories": categories[::-1]}))
    return str(path)


def found(*rows: tuple[Box, float, int]) -> Detections:
    """Detections from (x1 y1 x2 y2), score and class id."""
    boxes, scores, ids = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(ids, np.int32)
    return Detections(*arrays, NAMES)


def accuracy_of(entry: str, *detections: Detections) -> Accuracy:
    return coco_metrics(detections, load_ground_truth([entry], NAMES)).accuracy


def judge(entry: str, *detections: Detections) -> tuple[float, float, float]:
    result = accuracy_of(entry, *detections)
    return result.ap, result.ap50, result.ap75


# --- the numbers ---


def test_exact_detections_have_full_ap(tmp_path: Path) -> None:
    """Whatever the ids in the file; other tools' files have no area, crowd flag or id."""
    for more in ({}, {"id": 0}, {"id": 5, "area": 10_000, "iscrowd": 0}):
        entry = write(tmp_path, [label(40, (0, 0, 100, 100), **more), label(41, (10, 20, 50, 60), 9)])
        result = accuracy_of(entry, found(((0, 0, 100, 100), 0.9, 0)), found(((10, 20, 60, 80), 0.3, 1)))
        assert (result.ap, result.ap50, result.ap75, result.ap_medium, result.ap_large) == pytest.approx([1] * 5)
        assert math.isnan(result.ap_small)


def test_overlap_decides_at_which_thresholds_a_box_counts(tmp_path: Path) -> None:
    """IoU .72 passes .50, .55, .60, .65 and .70 of the ten thresholds."""
    entry = write(tmp_path, [label(40, (0, 0, 100, 100))])
    assert judge(entry, found(((0, 0, 72, 100), 0.9, 0)), found()) == pytest.approx((0.5, 1, 0))


def test_missing_detections_end_the_recall(tmp_path: Path) -> None:
    """One of two objects: precision is 1 at recalls 0 to .5, which are 51 of COCO's 101."""
    entry = write(tmp_path, [label(40, (0, 0, 100, 100)), label(41, (0, 0, 100, 100))])
    assert judge(entry, found(((0, 0, 100, 100), 0.9, 0)), found())[0] == pytest.approx(51 / 101)


def test_a_false_positive_costs_by_its_score(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 100, 100))])
    right, wrong = ((0, 0, 100, 100), 0.5, 0), (110, 0, 200, 100)
    assert judge(entry, found((wrong, 0.9, 0), right), found())[0] == pytest.approx(0.5)
    assert judge(entry, found(right, (wrong, 0.1, 0)), found())[0] == pytest.approx(1)
    assert judge(entry, found(right), found((wrong, 0.9, 0)))[0] == pytest.approx(0.5)
    assert judge(entry, found(((0, 0, 100, 100), 0.5, 1)), found())[0] == 0


def test_no_detections_have_ap_zero(tmp_path: Path) -> None:
    assert judge(write(tmp_path, [label(40, (0, 0, 100, 100))]), found(), found()) == (0, 0, 0)


def test_a_crowd_is_neither_missing_nor_a_false_positive(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 50, 50)), label(40, (100, 0, 100, 150), iscrowd=1)])
    right, inside = ((0, 0, 50, 50), 0.5, 0), ((110, 10, 140, 40), 0.9, 0)
    assert judge(entry, found(right), found())[0] == pytest.approx(1)
    assert judge(entry, found(inside, right), found())[0] == pytest.approx(1)


# --- classes ---


def classes_of(entry: str, names: Sequence[str]) -> list[int]:
    return [one.class_id for image in load_ground_truth([entry], names).images for one in image.objects]


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """In any order, in darknet's and VOC's names too; what the network does not know is left out."""
    labels = [label(40, (0, 0, 9, 9), category) for category in (7, 9, 11)]
    assert classes_of(write(tmp_path, labels, names=("cat", "dog", "cow")), ("dog", "cow", "cat")) == [2, 0, 1]
    assert classes_of(write(tmp_path, labels, names=("cat", "dog", "cow")), ("cow", "dog")) == [1, 0]
    entry = write(tmp_path, labels, names=("tv", "potted plant", "airplane"))
    assert classes_of(entry, ("aeroplane", "pottedplant", "tvmonitor")) == [2, 1, 0]
    assert classes_of(entry, ("airplane", "Potted_Plant", "tv")) == [2, 1, 0]
    entry = write(tmp_path, labels, names=("couch", "dining table", "motorcycle"))
    assert classes_of(entry, ("motorbike", "diningtable", "sofa")) == [2, 1, 0]


def test_other_names_are_matched_by_the_order_of_ids_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = [label(40, (0, 0, 9, 9), category) for category in (9, 7)]
    assert classes_of(write(tmp_path, labels), ("katze", "hund")) == [1, 0]
    assert "has no category 'katze'; categories are taken as classes in order of their ids" in caplog.text
    caplog.clear()
    assert classes_of(write(tmp_path, labels), NAMES) == [1, 0]
    assert not caplog.records


def test_classes_without_labels_are_not_evaluated_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 9, 9))])
    assert classes_of(entry, ("cow", "dog", "cat")) == [2]
    assert "has no objects of 'cow'; detections of them are not evaluated" in caplog.text


def test_the_order_of_ids_does_not_count_where_a_name_contradicts_it(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 9, 9), 7), label(40, (0, 0, 9, 9), 9)])
    assert classes_of(entry, ("dog", "katze")) == [0]


def test_a_class_map_joins_classes_of_different_names(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 9, 9), 7), label(40, (0, 0, 9, 9), 9)])
    (tmp_path / "map.txt").write_text("# labels = network\ncat = animal\n\ndog = animal\n")
    classes = LabelClasses(mapped=read_class_map(tmp_path / "map.txt"))
    truth = load_ground_truth([entry], ("person", "animal"), classes=classes)
    assert [one.class_id for one in truth.images[0].objects] == [1, 1]
    for text, message in (
        ("cat animal", r"map\.txt:1: write CLASS"),
        ("cow = animal", "'cow', which is no class of the labels"),
    ):
        (tmp_path / "map.txt").write_text(text)
        with pytest.raises(DarktrtError, match=message):
            load_ground_truth([entry], ("person", "animal"), classes=LabelClasses(mapped=read_class_map(tmp_path / "map.txt")))
    with pytest.raises(DarktrtError, match="'beast', which is no class of the network"):
        load_ground_truth([entry], ("person", "animal"), classes=LabelClasses(mapped={"cat": "beast"}))


def test_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 9, 9))])
    with pytest.raises(DarktrtError, match=r"val\.json: has 2 categories without the network's class 'cow'.*has 3 classes"):
        load_ground_truth([entry], ("cow", "pig", "hen"))
    with pytest.raises(DarktrtError, match=r"val\.json: no object of the network's classes is labelled in 2 images"):
        load_ground_truth([entry], ("dog",))


# --- files ---


def test_images_are_found_where_calibration_finds_them(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 9, 9))])
    assert [image.path for image in load_ground_truth([entry], NAMES).images] == [tmp_path / "0.png", tmp_path / "1.png"]
    (tmp_path / "annotations").mkdir()
    moved = Path(entry).rename(tmp_path / "annotations/instances_val.json")
    with pytest.raises(DarktrtError, match=r"its image '0\.png' is not in its folder"):
        load_ground_truth([str(moved)], NAMES)
    assert load_ground_truth([f"{moved}:{tmp_path}"], NAMES).images[1].path == tmp_path / "1.png"
    (tmp_path / "val/part").mkdir(parents=True)
    for i in range(2):
        (tmp_path / f"{i}.png").rename(tmp_path / f"val/part/{i}.png")
    moved.write_text(moved.read_text().replace('"0.', '"part/0.').replace('"1.', '"part/1.'))
    assert load_ground_truth([str(moved)], NAMES).images[1].path == tmp_path / "val/part/1.png"


def test_equal_names_in_folders_are_not_mixed_up(tmp_path: Path) -> None:
    entry = Path(write(tmp_path, [label(40, (0, 0, 9, 9))]))
    (tmp_path / "a").mkdir()
    (tmp_path / "1.png").rename(tmp_path / "a/0.png")
    entry.write_text(entry.read_text().replace("1.png", "a/0.png"))
    assert [image.path for image in load_ground_truth([str(entry)], NAMES).images] == [tmp_path / "0.png", tmp_path / "a/0.png"]


def test_a_limit_draws_a_sample_by_its_seed(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40 + i, (0, 0, 9, 9)) for i in range(9)], count=9)
    samples = [load_ground_truth([entry], NAMES, 4, seed).images for seed in (0, 0, 1)]
    assert [len({image.path for image in sample}) for sample in samples] == [4, 4, 4]
    assert samples[0] == samples[1] != samples[2]
    assert len(load_ground_truth([entry], NAMES, 1).images) == 1
    assert load_ground_truth([entry], NAMES, 99).images == load_ground_truth([entry], NAMES).images
    with pytest.raises(DarktrtError, match="the limit is 0; evaluate on at least 1 image"):
        load_ground_truth([entry], NAMES, 0)


def test_labels_are_distinguished_from_images(tmp_path: Path) -> None:
    entry = write(tmp_path, [label(40, (0, 0, 9, 9))])
    assert has_labels(entry)
    assert has_labels(f"{entry}:{tmp_path}")
    for other in (str(tmp_path), str(tmp_path / "0.png"), str(tmp_path / "none.json"), write(tmp_path, [], name="test.json")):
        assert not has_labels(other)


GOOD = {
    "images": [{"id": 40, "file_name": "0.png"}],
    "annotations": [label(40, (0, 0, 9, 9))],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
}
WRONG = {
    "no annotations": ({**GOOD, "annotations": []}, "has no annotations, so there is nothing to compare detections with"),
    "no key of annotations": ({"images": GOOD["images"]}, "has no annotations"),
    "no categories": ({**GOOD, "categories": []}, "has no categories"),
    "no images": ({**GOOD, "images": []}, "no images here"),
    "images without names": (
        {**GOOD, "images": [{"id": 1}]},
        "'file_name' is missing.; a COCO file has images with a file_name",
    ),
    "a list": ([1, 2], r"is damaged .*\[1, 2\]"),
    "a number": (3, "is damaged"),
    "null": (None, "is damaged"),
    "an image is missing": (
        {**GOOD, "images": [*GOOD["images"], {"id": 41, "file_name": "x.png"}]},
        r"1 of its 2 images are missing, '.*x\.png' for example",
    ),
    "an unknown image": ({**GOOD, "annotations": [label(99, (0, 0, 9, 9))]}, "an annotation has image_id 99"),
    "an unknown category": ({**GOOD, "annotations": [label(40, (0, 0, 9, 9), 1)]}, "an annotation has category_id 1"),
    "three numbers": ({**GOOD, "annotations": [{**label(40, (0, 0, 9, 9)), "bbox": [1, 2, 3]}]}, r"'bbox' is \[1, 2, 3\]"),
    "a box of NaN": ({**GOOD, "annotations": [label(40, (0, 0, math.nan, 9))]}, "NaN is no finite number"),
    "a box of words": ({**GOOD, "annotations": [{**label(40, (0, 0, 9, 9)), "bbox": "abcd"}]}, "'bbox' is 'abcd'"),
    "annotations of text": ({**GOOD, "annotations": "many"}, "'annotations' is 'many'"),
    "images without ids": ({**GOOD, "images": [{"file_name": "0.png"}]}, "'id' is missing"),
    "a box of the universe": ({**GOOD, "annotations": [label(40, (0, 0, 1e300, 9))]}, r"a bbox is \("),
    "an area of the universe": ({**GOOD, "annotations": [{**label(40, (0, 0, 9, 9)), "area": 1e300}]}, "its area 1e"),
    "an infinite width": ({**GOOD, "images": [{**GOOD["images"][0], "width": math.inf, "height": 1}]}, "Infinity is no finite"),
    "a width of the universe": ({**GOOD, "images": [{**GOOD["images"][0], "width": 1e300, "height": 1}]}, "an image is 1e"),
    "a long name": ({**GOOD, "images": [*GOOD["images"], {"id": 41, "file_name": "x" * 5000}]}, r"'.{1,80}' for example$"),
    "half a character": ({**GOOD, "images": [{"id": 40, "file_name": "\ud800"}]}, "half a character"),
    "an id of a list": ({**GOOD, "images": [{"id": [], "file_name": "0.png"}]}, r"'id' is \[\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused(case: str, tmp_path: Path) -> None:
    values, message = WRONG[case]
    Image.fromarray(made_image(150, 200)).save(tmp_path / "0.png")
    path = tmp_path / "val.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DarktrtError, match=message) as raised:
        load_ground_truth([str(path)], NAMES)
    assert str(raised.value).startswith(f"{path}: ") and len(str(raised.value)) < 400
    path.write_text(json.dumps(GOOD))
    assert len(load_ground_truth([str(path)], NAMES).images) == 1


def test_ids_may_be_text_too(tmp_path: Path) -> None:
    Image.fromarray(made_image(150, 200)).save(tmp_path / "0.png")
    categories = [{"id": "b", "name": "dog"}, {"id": 3, "name": "cat"}, {"id": "a", "name": 7}]
    values = {"images": [{"id": "x", "file_name": "0.png"}], "annotations": [label("x", (0, 0, 9, 9), "b")]}  # type: ignore[arg-type]
    (tmp_path / "val.json").write_text(json.dumps({**values, "categories": categories}))
    (image,) = load_ground_truth([str(tmp_path / "val.json")], ("cat", "7", "dog")).images
    assert image.objects == ((2, (0, 0, 9, 9), 81, False),)


def test_files_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text("{")
    cases = {tmp_path / "val.json": "is damaged or no JSON", tmp_path: "no images here", Path("none.json"): "No such file"}
    for entry, message in cases.items():
        with pytest.raises(DarktrtError, match=message):
            load_ground_truth([str(entry)], NAMES)
    with pytest.raises(DarktrtError, match=r"val\.json: is damaged or no JSON"):
        has_labels(str(tmp_path / "val.json"))


# --- a network ---


def test_a_network_is_evaluated_in_pixels_of_the_images(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds the same box in every image; its batch of two is filled up for the third image."""
    info = replace(made.info, head="decode", input="uint8", batch=(2, 2, 2), class_names=("cat", "dog", "cow"))
    shapes, steps = [], []
    monkeypatch.setattr(progress, "_shown", lambda *step: steps.append(step))

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        shapes.append(inputs["images"].shape)
        boxes = np.array([[[24, 16, 72, 48]]], np.float32).repeat(2, 0)
        return {"boxes": boxes, "scores": np.array([[[0.0, 0.002, 0.0]]], np.float32).repeat(2, 0)}

    labels = [label(40 + i, (50, 37.5, 100, 75), 9) for i in range(3)]
    entry = write(tmp_path, labels, names=("cat", "dog", "cow"), count=3)
    result = measured_accuracy(run, info, load_ground_truth([entry], info.class_names))
    assert (result.ap, result.ap_medium) == pytest.approx((1, 1))
    assert shapes == [(2, 64, 96, 3)] * 2
    assert steps == [("here", 2, 3), ("here", 3, 3)]


def test_images_of_another_size_than_the_labels_are_refused(made: Made, tmp_path: Path) -> None:
    info = replace(made.info, head="decode", class_names=("cat", "dog", "cow"))
    truth = load_ground_truth([write(tmp_path, [label(40, (0, 0, 9, 9))], names=info.class_names)], info.class_names)
    Image.fromarray(made_image(100, 200)).save(tmp_path / "0.png")
    with pytest.raises(DarktrtError, match=r"0\.png: is 200x100, but .*val\.json has labels for 200x150"):
        measured_accuracy(lambda _: {}, info, truth)
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(DarktrtError, match=r"0\.png: "):
        measured_accuracy(lambda _: {}, info, truth)
