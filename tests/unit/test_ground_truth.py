"""Darknet's label files, and mistakes in labels: each is a sentence, and the rest is evaluated."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from helpers import made_image
from PIL import Image

from darktrt.check.ground_truth import GroundTruth, LabelClasses, has_labels, load_ground_truth, read_names
from darktrt.errors import DarktrtError
from darktrt.vision.images import read_image

NAMES = ("cat", "dog")


def photos(folder: Path, labels: dict[str, str | None]) -> Path:
    """Images of 200 x 150 by their stem, and their label files; None for none."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (stem, text) in enumerate(labels.items()):
        Image.fromarray(made_image(150, 200, seed=i)).save(folder / f"{stem}.png")
        if text is not None:
            (folder / f"{stem}.txt").write_text(text)
    return folder


def noted(*data: Path | str, classes: LabelClasses | None = None, names: tuple[str, ...] = NAMES) -> tuple[GroundTruth, str]:
    """The ground truth, and its notes."""
    truth = load_ground_truth([str(entry) for entry in data], names, classes=classes or LabelClasses(), strict=False)
    return truth, "\n".join(truth.notes)


# --- darknet's files ---


def test_boxes_are_in_pixels_of_the_image(folder: Path) -> None:
    photos(Path("photos"), {"a": "1 0.5 0.4 0.25 0.2\n0 0.1 0.1 0.2 0.2\n", "b": ""})
    truth, notes = noted("photos")
    first, second = truth.images[0].objects
    assert (first.class_id, second.class_id, notes) == (1, 0, "")
    assert first.box == pytest.approx((75, 45, 50, 30)) and first.area == pytest.approx(1500)
    assert truth.images[1].objects == () and truth.count == 2


def test_labels_are_of_the_upright_image(folder: Path) -> None:
    """As :func:`read_image` turns it: 200 x 150 in the file, 150 x 200 upright."""
    photos(Path("photos"), {"a": "0 0.5 0.5 1 1"})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(made_image(150, 200)).save("photos/a.jpg", exif=exif)
    Path("photos/a.png").unlink()
    assert noted("photos")[0].images[0].objects[0].box == (0, 0, 150, 200)


def test_labels_are_beside_the_image_or_in_the_folder_labels(folder: Path) -> None:
    photos(Path("data/images/train"), {"a": None, "b": "1 0.5 0.5 0.5 0.5"})
    Path("data/labels/train").mkdir(parents=True)
    Path("data/labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    Path("train.txt").write_text("data/images/train/a.png\ndata/images/train/b.png\n")
    for entry in ("train.txt", "data/images", "data/images/train/*.png"):
        assert has_labels(entry)
        truth, notes = noted(entry)
        assert [image.objects[0].class_id for image in truth.images] == [0, 1], entry
        assert not notes
    Path("data/labels/train/a.txt").unlink()
    assert not has_labels("data/images/train/a.png")


def test_sizes_are_clipped_as_darknet_does(folder: Path) -> None:
    photos(Path("photos"), {"a": "0 0.5 0.5 1.2 1.2"})
    assert noted("photos")[0].images[0].objects[0].box == (0, 0, 200, 150)


def test_class_ids_have_names_of_their_own(folder: Path) -> None:
    photos(Path("photos"), {"a": "2 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5"})
    Path("my.names").write_text("dog\ncow\ncat\n")
    truth, notes = noted("photos", classes=LabelClasses(read_names("my.names")))
    assert [one.class_id for one in truth.images[0].objects] == [0, 1]
    assert "objects of classes that the network does not have are left out: cow (1)" in notes


# --- mistakes are noted, and with strict raised ---

WRONG = {
    "0 0.5 0.5 0.5": "write CLASS X Y WIDTH HEIGHT",
    "cat 0.5 0.5 0.5 0.5": "with the number of the class",
    "0 0.5 0.5 0.5 wide": "could not convert string to float",
    "0 1.5 0.5 0.5 0.5": "the centre must lie within 0..1",
    "0 0.5 0.5 0 0.5": "width and height be above 0",
    "0 0.5 0.5 nan 0.5": "width and height be above 0",
    "2 0.5 0.5 0.5 0.5": "there are 2 classes",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_named(line: str, folder: Path) -> None:
    photos(Path("photos"), {"a": f"1 0.5 0.5 0.5 0.5\n{line}\n"})
    with pytest.raises(DarktrtError, match=rf"^photos/a\.txt:2: '{line}' is no label: .*{WRONG[line]}"):
        load_ground_truth(["photos"], NAMES)
    truth, notes = noted("photos")
    assert truth.count == 1
    assert notes.startswith(f"photos/a.txt:2: '{line}' is no label")


def test_images_without_labels_are_noted(folder: Path) -> None:
    photos(Path("photos"), {"a": "0 0.5 0.5 0.5 0.5", "b": None, "c": None})
    truth, notes = noted("photos")
    assert len(truth.images) == 3
    assert "2 of 3 images have no label file, 'photos/b.png' for example; they count as empty" in notes


def test_no_labels_at_all(folder: Path) -> None:
    photos(Path("photos"), {"a": None, "b": None})
    with pytest.raises(DarktrtError, match=r"photos: no image has labels; name a COCO json, or write label files of darknet"):
        load_ground_truth(["photos"], NAMES)
    truth, notes = noted("photos")
    assert (len(truth.images), truth.count) == (2, 0)
    assert "no image has labels" in notes and "no object of the network's classes is labelled in 2 images" in notes


def test_labels_without_images_are_noted(folder: Path) -> None:
    photos(Path("data/images"), {"a": "0 0.5 0.5 0.5 0.5"})
    Path("data/labels").mkdir()
    for name in ("data/images/gone.txt", "data/labels/away.txt"):
        Path(name).write_text("0 0.5 0.5 0.5 0.5")
    for name, text in (("classes", "cat\ndog\n"), ("empty", ""), ("notes", "0 0.5 0.5 0.5 0.5\n3 boxes are missing\n")):
        Path(f"data/images/{name}.txt").write_text(text)  # no label files
    _, notes = noted("data/images")
    assert "2 label files have no image, 'data/images/gone.txt' for example" in notes


def test_images_of_a_list_that_are_missing_are_noted(folder: Path) -> None:
    photos(Path("photos"), {"a": "0 0.5 0.5 0.5 0.5"})
    Path("train.txt").write_text("photos/a.png\nphotos/gone.png\n")
    Path("photos/gone.txt").write_text("0 0.5 0.5 0.5 0.5")
    with pytest.raises(DarktrtError, match=r"train\.txt: 1 of its 2 images are missing, 'photos/gone\.png' for example"):
        load_ground_truth(["train.txt"], NAMES)
    truth, notes = noted("train.txt")
    assert len(truth.images) == 1 and "'photos/gone.png' for example" in notes
    Path("photos/a.png").unlink()
    with pytest.raises(DarktrtError, match="2 of its 2 images are missing"):
        noted("train.txt")


def coco(**changes: object) -> Path:
    photos(Path("val"), {"0": None, "1": None})
    box = {"bbox": [0, 0, 9, 9]}
    values: dict[str, object] = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
        "annotations": [{"image_id": 0, "category_id": 7, **box}, {"image_id": 1, "category_id": 9, **box}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }
    Path("val.json").write_text(json.dumps({**values, **changes}))
    return Path("val.json")


def test_a_coco_file_with_gaps_is_evaluated_without_them(folder: Path) -> None:
    images = [{"id": 4, "file_name": "4.png"}, {"id": 0, "file_name": "0.png"}]
    truth, notes = noted(coco(images=images))
    assert [image.path.name for image in truth.images] == ["0.png"] and truth.count == 1
    assert "an annotation has image_id 1, which the file does not list" in notes
    assert "1 of its 2 images are missing, 'val/4.png' for example" in notes


def test_an_empty_ground_truth_is_noted(folder: Path) -> None:
    truth, notes = noted(coco(annotations=[]))
    assert len(truth.images) == 2
    assert "has no annotations" in notes and "no object of the network's classes is labelled" in notes


def test_unknown_classes_are_noted(folder: Path) -> None:
    truth, notes = noted(coco(), names=("cow", "pig", "hen"))
    assert truth.count == 0
    assert "has 2 categories without the network's class 'cow' among them" in notes


# --- images that are none ---

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
NO_IMAGES = {
    "of 3,600,000,000 pixels": PNG + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0) + b"\x00" * 4,
    "of a negative size": b"P6\n-3 4\n255\n" + bytes(36),
    "without a size": b"P6\nabc 4\n255\n",
    "in PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    "damaged": b"\x89PNG\r\n\x1a\n" + b"\xff" * 30,
    "empty": b"",
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_labels_of_an_image_that_is_none_are_refused_with_it(kind: str, folder: Path) -> None:
    """The labels need the size of the image; the image itself is refused where it is read."""
    photos(Path("photos"), {"a": "0 0.5 0.5 0.5 0.5", "b": "1 0.5 0.5 0.5 0.5"})
    Path("photos/b.png").write_bytes(NO_IMAGES[kind])
    assert [len(image.objects) for image in noted("photos")[0].images] == [1, 0]
    with pytest.raises(DarktrtError, match=r"^photos/b\.png: (is|has|cannot be) "):
        read_image("photos/b.png")


# --- places and sizes ---


def test_the_last_image_folder_of_a_path_is_replaced(folder: Path) -> None:
    """As darknet does; VOC's JPEGImages too. A file beside the image comes first."""
    photos(Path("images/set/JPEGImages/a"), {"0": None})
    for place, class_id in (("images/set/labels/a", 1), ("images/set/JPEGImages/a", 0)):
        assert has_labels("images/set/JPEGImages/a") == (class_id == 0)
        Path(place).mkdir(parents=True, exist_ok=True)
        Path(place, "0.txt").write_text(f"{class_id} 0.5 0.5 0.5 0.5")
        truth, _ = noted("images/set/JPEGImages/a")
        assert [one.class_id for one in truth.images[0].objects] == [class_id]
    Path("labels/set").mkdir(parents=True)
    Path("labels/set/x.txt").write_text("0 0.5 0.5 0.5 0.5")
    photos(Path("images/set"), {"x": None})
    assert has_labels("images/set/x.png")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".JPG"])
@pytest.mark.parametrize("place", ["images", "JPEGImages"])
def test_label_files_of_images_in_another_folder_are_no_orphans(folder: Path, suffix: str, place: str) -> None:
    photos(Path(place), {"a": None})
    Path(place, "a.png").rename(Path(place, f"a{suffix}"))
    Path("labels").mkdir()
    Path("labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    assert noted(place)[1] == ""


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("0 0 0 0.5 0.5", (-50, -37.5, 100, 75)),
        ("0 1 1 0.5 0.5", (150, 112.5, 100, 75)),
        ("1 0.25 0.75 1 0.5", (-50, 75, 200, 75)),
        ("1 0.5 0.5 7 0.5", (0, 37.5, 200, 75)),
    ],
)
def test_a_box_may_reach_over_the_edge(folder: Path, line: str, box: tuple[float, ...]) -> None:
    photos(Path("photos"), {"a": line})
    (one,) = load_ground_truth(["photos"], NAMES).images[0].objects
    assert one.box == pytest.approx(box) and one.area == pytest.approx(box[2] * box[3])
    assert (one.class_id, one.crowd) == (int(line[0]), False)


@pytest.mark.parametrize(
    "line", ["0 -0.1 0.5 0.5 0.5", "0 0.5 1.1 0.5 0.5", "0 0.5 0.5 0.5 0", "0 0.5 0.5 inf 0.5", "0 .5 .5 .5 .5 1"]
)
def test_more_wrong_lines(folder: Path, line: str) -> None:
    photos(Path("photos"), {"a": line})
    with pytest.raises(DarktrtError, match=r"^photos/a\.txt:1: .* is no label"):
        load_ground_truth(["photos"], NAMES)


def test_several_wrong_lines_are_counted(folder: Path) -> None:
    """One is quoted; the others are a number. Empty lines and comments are no lines."""
    photos(Path("photos"), {"a": "# a comment\n\n0 1\n", "b": "0 0.5 0.5 0.5 0.5\n0 2\n0 3\n"})
    notes = noted("photos")[0].notes
    assert notes[0].startswith("photos/a.txt:3: '0 1' is no label") and notes[0].endswith("; so are 2 other lines")
    Path("photos/b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert "other lines" not in noted("photos")[1]


def test_annotations_that_the_file_does_not_list_are_counted(folder: Path) -> None:
    box = {"bbox": [0, 0, 9, 9]}
    wrong = [{"image_id": 5, "category_id": 7, **box}, {"image_id": 0, "category_id": 1, **box}]
    right = [{"image_id": 0, "category_id": 7, **box}]
    _, notes = noted(coco(annotations=[*right, *wrong, wrong[1]]))
    assert "an annotation has image_id 5, which the file does not list, as have 2 others; get it again" in notes
    _, notes = noted(coco(annotations=[*right, wrong[1]]))
    assert "an annotation has category_id 1, which the file does not list; get it again" in notes


def test_what_a_coco_file_says_of_an_object(folder: Path) -> None:
    """Its area is that of the segmentation, which may be smaller than the box; without one it is the box's."""
    box = {"image_id": 0, "category_id": 9, "bbox": [1, 2, 30, 40]}
    annotations = [{**box, "area": 500}, box, {**box, "iscrowd": 1}, {**box, "area": 0}]
    truth, notes = noted(coco(annotations=annotations, images=[{"id": 0, "file_name": "0.png", "width": 200, "height": 150}]))
    (image,) = truth.images
    assert [(one.class_id, one.area, one.crowd) for one in image.objects] == [
        (1, 500, False), (1, 1200, False), (1, 1200, True), (1, 0, False),
    ]  # fmt: skip
    assert all(one.box == (1, 2, 30, 40) for one in image.objects)
    assert image.size == (200, 150) and truth.count == 3 and not notes
    for known in ({"width": 200}, {"height": 150}, {}):
        (image,) = noted(coco(images=[{"id": 0, "file_name": "0.png", **known}], annotations=annotations))[0].images
        assert image.size is None


def test_numbers_up_to_a_million_million_are_pixels(folder: Path) -> None:
    box = {"image_id": 0, "category_id": 7, "bbox": [0, 0, 9, 9]}
    for changes in ({"bbox": [1e12, 0, 9, 9]}, {"bbox": [0, -1e12, 9, 9]}, {"area": 1e12}):
        assert noted(coco(annotations=[{**box, **changes}]))[0].count == 1
    for changes in ({"bbox": [1.1e12, 0, 9, 9]}, {"bbox": [0, -1.1e12, 9, 9]}, {"area": 1.1e12}):
        with pytest.raises(DarktrtError, match="a bbox is"):
            noted(coco(annotations=[{**box, **changes}]))
    for sides, passes in (((1e12, 1), True), ((1, 1e12), True), ((1.1e12, 1), False), ((1, 1.1e12), False)):
        path = coco(images=[{"id": 0, "file_name": "0.png", "width": sides[0], "height": sides[1]}], annotations=[box])
        if passes:
            assert noted(path)[0].count == 1
        else:
            with pytest.raises(DarktrtError, match=r"an image is 1"):
                noted(path)


def test_images_of_the_size_of_their_labels(folder: Path) -> None:
    """Before any is run; what the file does not say is not compared."""
    for sides, fits in (((200, 150), True), ((200, 151), False), ((150, 200), False), ((None, 9), True)):
        image = {"id": 0, "file_name": "0.png", "width": sides[0], "height": sides[1]}
        truth, _ = noted(coco(images=[image], annotations=[{"image_id": 0, "category_id": 7, "bbox": [0, 0, 9, 9]}]))
        if fits:
            truth.check_sizes()
        else:
            with pytest.raises(
                DarktrtError, match=rf"val/0\.png: is 200x150, but val\.json has labels for {sides[0]}x{sides[1]}"
            ):
                truth.check_sizes()


def test_one_source_of_labels_at_a_time(folder: Path) -> None:
    photos(Path("photos"), {"a": "0 0.5 0.5 0.5 0.5"})
    with pytest.raises(DarktrtError, match=r"^photos: val\.json has labels too; name one COCO json to evaluate on"):
        noted(coco(), "photos")
    photos(Path("more"), {"b": "0 0.5 0.5 0.5 0.5"})
    assert noted("photos", "more")[0].count == 2


def test_labels_are_strict_unless_it_is_said_otherwise(folder: Path) -> None:
    photos(Path("photos"), {"a": "wrong"})
    with pytest.raises(DarktrtError, match="is no label"):
        load_ground_truth(["photos"], NAMES)


def test_a_sample_is_that_of_seed_0(folder: Path) -> None:
    """Unless another one is named; the whole set without a limit."""
    photos(Path("photos"), {str(i): "0 0.5 0.5 0.5 0.5" for i in range(9)})
    samples = [load_ground_truth(["photos"], NAMES, 4, *seed).images for seed in ((), (0,), (1,))]
    assert samples[0] == samples[1] != samples[2]
    assert len(load_ground_truth(["photos"], NAMES).images) == 9


def test_notes_are_logged_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    photos(Path("photos"), {"a": "0 0.5 0.5 0.5 0.5", "b": None})
    truth, notes = noted("photos")
    assert caplog.messages == list(truth.notes) == [notes]


# --- classes ---


def test_what_network_and_labels_have_in_common(folder: Path) -> None:
    """Objects of other classes are counted by class; a class map says nothing of classes that it leaves out."""
    labels = "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.5 0.5\n"
    photos(Path("photos"), {"a": labels})
    own = LabelClasses(("cat", "cow", "pig"))
    truth, notes = noted("photos", classes=own)
    assert "left out: cow (2), pig (1)" in notes and truth.count == 1
    assert "has no objects of 'dog'; detections of them are not evaluated" in notes
    _, notes = noted("photos", classes=own, names=("cat", "dog", "hen", "fox"))
    assert "has no objects of 3 of the network's classes, 'dog' for example; detections of them are not evaluated" in notes
    mapped = LabelClasses(("cat", "cow", "pig"), {"cow": "dog"})
    truth, notes = noted("photos", classes=mapped)
    assert truth.count == 3 and notes == "photos: objects of classes that the network does not have are left out: pig (1)"
    assert noted("photos", classes=LabelClasses(("cat", "dog", "cat")))[1] == ""


def test_the_digest_says_which_results_can_be_compared(folder: Path) -> None:
    """It depends on the images' content and on every label, on no name and no order."""
    photos(Path("a"), {"0": "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5", "1": ""})
    photos(Path("b"), {"0": "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5", "1": ""})
    Path("b/0.png").rename("b/z.png")
    Path("b/0.txt").rename("b/z.txt")
    Path("b/z.txt").write_text("1 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5")
    digest = noted("a")[0].digest
    assert digest == noted("b")[0].digest and len(digest) == 64
    for text in ("0 0.5 0.5 0.5 0.5", "0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5", "0 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.25"):
        Path("b/z.txt").write_text(text)
        assert noted("b")[0].digest != digest
