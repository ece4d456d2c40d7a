"""Labelled images: COCO json files, and darknet's label files beside the images; whose classes are whose."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from darktrt.errors import DarktrtError
from darktrt.vision.sources import IMAGE_SUFFIXES, coco_images, find_images, path_of

SYNONYMS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names of darknet's coco.names and of VOC, to COCO's."""

IMAGE_FOLDERS = ("images", "JPEGImages")
"""In their place darknet looks for the folder ``labels``."""

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)
"""EXIF's tag, and its values for images that are shown turned by a quarter."""

Notes = list[str] | None
"""Where what is wrong with the labels is noted as sentences, so that the rest can be judged; None: it raises."""


class LabelledObject(NamedTuple):
    """One annotation; the box is x, y, width, height in pixels of the image."""

    class_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool


class LabelledImage(NamedTuple):
    """An image file, and what people saw in it."""

    path: Path
    size: tuple[int, int] | None
    """Width and height that the labels were made for, where the file of labels tells."""
    objects: tuple[LabelledObject, ...]


@dataclass(frozen=True)
class Truth:
    """Labelled images."""

    name: str
    classes: tuple[str, ...]
    """What the objects' class ids mean."""
    images: tuple[LabelledImage, ...]

    @property
    def count(self) -> int:
        """Objects to be found; crowds need not be."""
        return sum(not one.crowd for image in self.images for one in image.objects)


@dataclass(frozen=True)
class LabelClasses:
    """What the classes of labels are called, and which class of the network each is, where names do not tell."""

    names: Sequence[str] | None = None
    """Of darknet's class ids; None for those of the network. A COCO file names its own."""
    mapped: Mapping[str, str] | None = None
    """The network's class by the labels' class; classes that are not in it go by their names."""


def has_labels(entry: str) -> bool:
    """Whether ``entry`` of DATA is a COCO file with annotations, or has an image with darknet's label file."""
    path = _json_path(entry)
    if path is None:
        return any(_label_file(image) for image in find_images([entry], None, 0))
    return path.is_file() and bool(_coco_json(path).get("annotations"))


def load_truth(
    data: Sequence[str],
    class_names: Sequence[str],
    limit: int | None = None,
    seed: int = 0,
    classes: LabelClasses = LabelClasses(),
    notes: Notes = None,
) -> Truth:
    """The labels of images for a network of these classes; of more than ``limit`` images a seeded sample.

    ``data`` is one COCO file, ``FILE.json`` or ``FILE.json:FOLDER`` with its images' folder, which
    :mod:`darktrt.vision.sources` guesses otherwise. Or it is folders, lists and patterns of images, as
    :func:`darktrt.vision.sources.find_images` takes them, with darknet's label files:
    ``dog.txt`` beside ``dog.jpg``, or in the folder ``labels`` in the place of ``images``; a line an object, its class
    and centre, width and height in parts of the image's.

    Classes are the network's by name (:data:`SYNONYMS` count), or by their order where there are as many and none stands in
    another place, which is said. Objects of classes that the network does not know are left out.

    Args:
        notes: takes a sentence for everything that is wrong or missing and was left out; without, that raises.

    Raises:
        DarktrtError: nothing can be read; without ``notes`` also where labels, images or classes are missing or wrong.
    """
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit}; evaluate on at least 1 image")
    files = [entry for entry in data if _json_path(entry)]
    if files and len(data) > 1:
        raise DarktrtError(f"{data[1]}: labels are in {data[0]} too; name one COCO json to evaluate on, or label files alone")
    truth = _coco(files[0], notes) if files else _darknet(data, class_names, classes.names, notes)
    truth = _present(truth, notes)
    truth = _with_classes(truth, class_names, classes.mapped or {}, notes)
    if limit is not None and limit < len(truth.images):
        truth = replace(truth, images=tuple(random.Random(seed).sample(truth.images, limit)))
    if not truth.count:
        _flaw(notes, f"{truth.name}: no object of the network's classes is labelled in {len(truth.images)} images of it")
    return truth


def read_class_map(path: str | Path) -> dict[str, str]:
    """A file with a line ``class of the labels = class of the network`` each; empty lines and those with # do not count.

    Raises:
        DarktrtError: it cannot be read, or has another line.
    """
    found = {}
    for number, line in _lines(Path(path)):
        left, equals, right = (part.strip() for part in line.partition("="))
        if not (left and equals and right):
            raise DarktrtError(f"{path}:{number}: write CLASS OF THE LABELS = CLASS OF THE NETWORK, not '{line:.40}'")
        found[left] = right
    return found


def read_names(path: str | Path) -> list[str]:
    """Class names, a line each.

    Raises:
        DarktrtError: the file cannot be read.
    """
    return [line for _, line in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers; not empty ones, nor comments.

    Raises:
        DarktrtError: the file cannot be read, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DarktrtError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DarktrtError(f"{path}: is no text; a file with a line each is wanted") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _flaw(notes: Notes, sentence: str) -> None:
    if notes is None:
        raise DarktrtError(sentence)
    notes.append(sentence)


def _present(truth: Truth, notes: Notes) -> Truth:
    """The truth without images that are not there.

    Raises:
        DarktrtError: none is there.
    """
    missing = [image.path for image in truth.images if not image.path.is_file()]
    if not missing:
        return truth
    sentence = f"{truth.name}: {len(missing)} of its {len(truth.images)} images are missing, '{missing[0]}' for one"
    _flaw(notes if len(missing) < len(truth.images) else None, sentence)
    return replace(truth, images=tuple(image for image in truth.images if image.path.is_file()))


# --- COCO ---


def _json_path(entry: str) -> Path | None:
    path = path_of(entry)
    return path if path.suffix.lower() == ".json" else None


def _coco_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DarktrtError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DarktrtError(f"{path}: is no JSON, so no COCO file ({error})") from error
    if not isinstance(values, dict):
        raise DarktrtError(f"{path}: is no COCO file, which has images, annotations and categories")
    return values


def _coco(entry: str, notes: Notes) -> Truth:
    path = path_of(entry)
    folder, _ = coco_images(entry)
    values = _coco_json(path)
    for key in ("annotations", "categories"):
        if not values.get(key):
            _flaw(notes, f"{path}: has no {key}, so nothing to hold detections against; name a COCO file with labels")
    try:
        return _parse(values, path, folder, notes)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DarktrtError(f"{path}: is a damaged COCO file ({type(error).__name__}: {error}); get it again") from error


def _parse(values: dict[str, Any], path: Path, folder: Path, notes: Notes) -> Truth:
    ordered = sorted(values.get("categories") or [], key=lambda one: one["id"])
    class_ids = {one["id"]: i for i, one in enumerate(ordered)}
    objects: dict[Any, list[LabelledObject]] = {one["id"]: [] for one in values["images"]}
    unlisted: Counter[str] = Counter()
    for one in values.get("annotations") or []:
        odd = [key for key, known in (("image_id", objects), ("category_id", class_ids)) if one[key] not in known]
        if odd:
            unlisted[f"{odd[0]} {one[odd[0]]}"] += 1
        else:
            objects[one["image_id"]].append(_labelled(one, class_ids[one["category_id"]]))
    if unlisted:
        which = f"an annotation has {next(iter(unlisted))}, which the file does not list"
        _flaw(notes, f"{path}: {which}{f', as have {unlisted.total() - 1} others' * (unlisted.total() > 1)}; get it again")
    images = [LabelledImage(folder / one["file_name"], _size(one), tuple(objects[one["id"]])) for one in values["images"]]
    return Truth(str(path), tuple(str(one["name"]) for one in ordered), tuple(images))


def _labelled(annotation: dict[str, Any], class_id: int) -> LabelledObject:
    """An annotation; other tools than COCO's own leave out the area and the crowd flag."""
    x, y, width, height = (float(value) for value in annotation["bbox"])
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError(f"a bbox is {annotation['bbox']}")
    area = float(annotation.get("area", width * height))
    return LabelledObject(class_id, (x, y, width, height), area, bool(annotation.get("iscrowd", 0)))


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["width"]), int(image["height"])) if {"width", "height"} <= image.keys() else None


# --- darknet ---


def _darknet(data: Sequence[str], class_names: Sequence[str], names: Sequence[str] | None, notes: Notes) -> Truth:
    name = ", ".join(data)
    images, without = [], []
    wrong: list[str] = []
    known = tuple(class_names if names is None else names)
    for path in find_images(data, None, 0):
        file, size = _label_file(path), _image_size(path)
        if file is None:
            without.append(path)
        objects = _read_label_file(file, size, len(known), wrong) if file and size else []
        images.append(LabelledImage(path, None, tuple(objects)))
    if images and len(without) == len(images):
        wanted = without[0].with_suffix(".txt")
        _flaw(notes, f"{name}: no image has labels; name a COCO json, or write darknet's, such as '{wanted}'")
    elif without:
        note = f"{name}: {len(without)} of {len(images)} images have no label file, '{without[0]}' for one"
        _told(notes, f"{note}; they count as empty, so that all that is found in them is a false alarm")
    if wrong:
        _flaw(notes, f"{wrong[0]}{f'; so are {len(wrong) - 1} other lines' * (len(wrong) > 1)}")
    if orphans := _labels_without_images(data):
        _told(notes, f"{name}: {len(orphans)} label files have no image, '{orphans[0]}' for one; they do not count")
    return Truth(name, known, tuple(images))


def _told(notes: Notes, sentence: str) -> None:
    """What may be as it is meant: said, and no error."""
    if notes is None:
        print(f"warning: {sentence}", file=sys.stderr)
    else:
        notes.append(sentence)


def _label_file(image: Path) -> Path | None:
    """Darknet's label file of an image, if it is there."""
    return next((path for path in _label_places(image.with_suffix(".txt")) if path.is_file()), None)


def _label_places(path: Path) -> list[Path]:
    """The path itself, and with the last folder of images in it swapped for that of labels."""
    at = max((i for i, part in enumerate(path.parts) if part in IMAGE_FOLDERS), default=None)
    return [path] if at is None else [path, Path(*path.parts[:at], "labels", *path.parts[at + 1 :])]


def _image_size(path: Path) -> tuple[int, int] | None:
    """Width and height as :func:`darktrt.vision.images.read_image` gives them; None where it cannot, which it says later."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(_ORIENTATION) in _LYING else (width, height)
    except OSError:
        return None


def _read_label_file(path: Path, size: tuple[int, int], classes: int, wrong: list[str]) -> list[LabelledObject]:
    """The objects of one image; a sentence about each line that is none goes to ``wrong``."""
    found = []
    for number, line in _lines(path):
        try:
            found.append(_object(line, size, classes))
        except ValueError as error:
            wrong.append(f"{path}:{number}: '{line:.60}' is no label: {error}")
    return found


def _object(line: str, size: tuple[int, int], classes: int) -> LabelledObject:
    """A line ``class x y width height``, the centre and the sides in parts of the image's.

    Raises:
        ValueError: it is no such line.
    """
    words = line.split()
    if len(words) != 5 or not words[0].isdecimal():
        raise ValueError("CLASS X Y WIDTH HEIGHT are wanted, the class by its number")
    class_id, (x, y, width, height) = int(words[0]), map(float, words[1:])
    if class_id >= classes:
        raise ValueError(f"there are {classes} classes")
    if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width < math.inf and 0 < height < math.inf):
        raise ValueError("the centre must lie within 0..1, and the sides be above 0")
    width, height = min(width, 1), min(height, 1)  # as darknet cuts them
    across, down = size
    box = ((x - width / 2) * across, (y - height / 2) * down, width * across, height * down)
    return LabelledObject(class_id, box, box[2] * box[3], False)


def _labels_without_images(data: Sequence[str]) -> list[Path]:
    """Where DATA names folders: label files there, and in the folders that darknet has for them, whose image is not there."""
    folders = [folder for entry in data for folder in _label_places(Path(entry)) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.txt"))]
    return [file for file in files if not _has_image(file) and _is_label_file(file)]


def _has_image(label_file: Path) -> bool:
    parts = label_file.parts
    elsewhere = [Path(*(folder if part == "labels" else part for part in parts)) for folder in IMAGE_FOLDERS]
    names = [form for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper())]
    return any(place.with_suffix(suffix).is_file() for place in (label_file, *elsewhere) for suffix in names)


def _is_label_file(file: Path) -> bool:
    wrong: list[str] = []
    return bool(_read_label_file(file, (1, 1), sys.maxsize, wrong)) and not wrong


# --- classes ---


def _with_classes(truth: Truth, class_names: Sequence[str], mapped: Mapping[str, str], notes: Notes) -> Truth:
    """The truth in the network's classes, and without objects of others."""
    class_of = _class_map(truth, class_names, mapped, notes)
    labelled = Counter(one.class_id for image in truth.images for one in image.objects)
    unknown = [f"{truth.classes[i]} ({labelled[i]})" for i in sorted(labelled) if i not in class_of]
    if unknown and class_of:
        _told(notes, f"{truth.name}: objects of classes that the network does not know are left out: {', '.join(unknown)}")
    images = [
        image._replace(
            objects=tuple(o._replace(class_id=class_of[o.class_id]) for o in image.objects if o.class_id in class_of)
        )
        for image in truth.images
    ]
    return replace(truth, classes=tuple(class_names), images=tuple(images))


def _class_map(truth: Truth, class_names: Sequence[str], mapped: Mapping[str, str], notes: Notes) -> dict[int, int]:
    """The network's class id by that of the labels."""
    network = {_canonical(name): i for i, name in enumerate(class_names)}
    theirs = [_canonical(name) for name in truth.classes]
    chosen = {_canonical(left): _canonical(right) for left, right in mapped.items()}
    for name, known, whose in (
        *((name, theirs, "labels") for name in chosen),
        *((name, network, "network") for name in chosen.values()),
    ):
        if name not in known:
            raise DarktrtError(f"the class map speaks of '{name}', which is no class of the {whose}")
    by_name = {i: network[chosen.get(name, name)] for i, name in enumerate(theirs) if chosen.get(name, name) in network}
    lacking = [name for i, name in enumerate(class_names) if i not in by_name.values()]
    if not lacking or mapped:
        return by_name
    if len(class_names) == len(theirs) and all(i == j for i, j in by_name.items()):
        _told(notes, f"{truth.name}: has no category '{lacking[0]}'; categories are taken as classes in order of their ids")
        return {i: i for i in range(len(class_names))}
    if by_name:
        few = f"'{lacking[0]}'" if len(lacking) == 1 else f"{len(lacking)} of the network's classes, '{lacking[0]}' for one"
        _told(notes, f"{truth.name}: has no objects of {few}; what is found of them is not judged")
        return by_name
    _flaw(
        notes,
        f"{truth.name}: has {len(theirs)} categories without the network's class '{lacking[0]}' among them, and the "
        f"network has {len(class_names)} classes; convert it with --names and the names of the categories, or give --class-map",
    )
    return by_name


def _canonical(name: str) -> str:
    plain = name.strip().casefold().replace("_", " ")
    return SYNONYMS.get(plain, plain)
