"""Labelled images: COCO json files, darknet's label files, and the mapping of their classes to those of a network."""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from darktrt.errors import DarktrtError, quote
from darktrt.files import read_text, sha256_of
from darktrt.progress import LOGGER
from darktrt.records import Excerpt, read_record
from darktrt.vision.images import image_size
from darktrt.vision.sources import COCO_BYTES, IMAGE_SUFFIXES, coco_images, find_images, path_of

SYNONYMS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""COCO's class names by those of darknet's coco.names and of VOC."""

IMAGE_FOLDERS = ("images", "JPEGImages")
"""Image folders that darknet replaces with ``labels`` to find label files."""

_LARGEST = 1e12
"""Coordinates and areas beyond it are no pixels."""


class LabelledObject(NamedTuple):
    """One annotation; the box is x, y, width, height in pixels of the image."""

    class_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool


class LabelledImage(NamedTuple):
    """An image file and its annotations."""

    path: Path
    size: tuple[int, int] | None
    """Width and height that the labels were made for; None where the label file does not have them."""
    objects: tuple[LabelledObject, ...]


@dataclass(frozen=True)
class GroundTruth:
    """Labelled images."""

    name: str
    classes: tuple[str, ...]
    """Class names by the objects' class ids."""
    images: tuple[LabelledImage, ...]
    notes: tuple[str, ...] = ()
    """Sentences about labels and images that are wrong or missing and were left out."""

    @property
    def count(self) -> int:
        """Objects that a detector should detect; crowds do not count."""
        return sum(not one.crowd for image in self.images for one in image.objects)

    def check_sizes(self) -> None:
        """See, before any image is run, that the images have the sizes that their labels were made for.

        Raises:
            DarktrtError: an image has another size.
        """
        for image in self.images:
            size = image_size(image.path) if image.size else None
            if size and image.size and size != image.size:
                actual, labelled = ("x".join(map(str, pair)) for pair in (size, image.size))
                raise DarktrtError(f"{image.path}: is {actual}, but {self.name} has labels for {labelled}; get the right file")

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The SHA-256 of every image file, in order."""
        return tuple(sha256_of(image.path) for image in self.images)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images and their labels in any order; results on one digest can be compared."""
        rows = sorted(
            (digest, sorted((one.class_id, *one.box, one.crowd) for one in image.objects))
            for digest, image in zip(self.digests, self.images, strict=True)
        )
        return sha256(repr(rows).encode()).hexdigest()


@dataclass(frozen=True)
class LabelClasses:
    """The names of the labels' classes, and their mapping to the network's classes where names differ."""

    names: Sequence[str] | None = None
    """By darknet's class ids; None for the network's own names. A COCO file has its own."""
    mapped: Mapping[str, str] | None = None
    """The network's class by the labels' class; other classes are matched by name."""


class _Notes:
    """Collects what is wrong with labels, as sentences; with ``strict`` a flaw raises."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.sentences: list[str] = []

    def flaw(self, sentence: str) -> None:
        """Note what can hardly be intended."""
        if self.strict:
            raise DarktrtError(sentence)
        self.sentences.append(sentence)

    def note(self, sentence: str) -> None:
        """Note what may be intended."""
        self.sentences.append(sentence)


def has_labels(entry: str) -> bool:
    """Whether ``entry`` is a COCO file with annotations, or has an image with a label file of darknet."""
    path = _json_path(entry)
    if path is None:
        return any(_label_file(image) for image in find_images([entry], None, 0))
    return os.path.isfile(path) and bool(_read_coco(path).annotations)


def load_ground_truth(
    data: Sequence[str],
    class_names: Sequence[str],
    limit: int | None = None,
    seed: int = 0,
    classes: LabelClasses = LabelClasses(),
    strict: bool = True,
) -> GroundTruth:
    """Load the labels of images for a network of these classes; notes are logged as warnings too.

    ``data`` is one COCO file: ``FILE.json``, or ``FILE.json:FOLDER`` with the folder of its images, which
    :mod:`darktrt.vision.sources` searches for otherwise. Or ``data`` is folders, lists and patterns of images, as
    :func:`darktrt.vision.sources.find_images` accepts them, with darknet's label files:
    ``dog.txt`` beside ``dog.jpg``, or in the folder ``labels`` that replaces ``images``. A label file has one line for each
    object: its class, and the centre, width and height relative to the image's.

    Classes are matched by name (:data:`SYNONYMS` count), or by their order where their numbers are equal and no name
    contradicts that order, which is noted. Objects of classes that the network does not have are left out.

    Args:
        limit: draw a sample of so many images by ``seed``.
        strict: raise for labels, images or classes that are missing or wrong; otherwise they are noted and left out.

    Raises:
        DarktrtError: nothing can be read; with ``strict`` also as above.
    """
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit}; evaluate on at least 1 image", "limit")
    files = [entry for entry in data if _json_path(entry)]
    if files and len(data) > 1:
        raise DarktrtError(f"{data[1]}: {data[0]} has labels too; name one COCO json to evaluate on, or only label files")
    notes = _Notes(strict)
    ground_truth = _coco(files[0], notes) if files else _darknet(data, class_names, classes.names, notes)
    ground_truth = _present(ground_truth, notes)
    ground_truth = _with_classes(ground_truth, class_names, classes.mapped or {}, notes)
    if limit is not None and limit < len(ground_truth.images):
        ground_truth = replace(ground_truth, images=tuple(random.Random(seed).sample(ground_truth.images, limit)))
    if not ground_truth.count:
        images = len(ground_truth.images)
        notes.flaw(f"{ground_truth.name}: no object of the network's classes is labelled in {images} images of it")
    for sentence in notes.sentences:
        LOGGER.warning("%s", sentence)
    return replace(ground_truth, notes=tuple(notes.sentences))


def read_class_map(path: str | Path) -> dict[str, str]:
    """Read lines ``class of the labels = class of the network``; empty lines and those that begin with # are skipped.

    Raises:
        DarktrtError: the file cannot be read, or has another line.
    """
    classes = {}
    for number, line in _lines(Path(path)):
        left, equals, right = (part.strip() for part in line.partition("="))
        if not (left and equals and right):
            raise DarktrtError(f"{path}:{number}: write CLASS OF THE LABELS = CLASS OF THE NETWORK, not '{line:.40}'")
        classes[left] = right
    return classes


def read_names(path: str | Path) -> list[str]:
    """Read class names, one on each line.

    Raises:
        DarktrtError: the file cannot be read.
    """
    return [line for _, line in _lines(Path(path))]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, without empty ones and comments.

    Raises:
        DarktrtError: the file cannot be read, or is no text.
    """
    text = read_text(path)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _present(ground_truth: GroundTruth, notes: _Notes) -> GroundTruth:
    """Leave out images whose files do not exist.

    Raises:
        DarktrtError: no file exists.
    """
    present = tuple(image for image in ground_truth.images if os.path.isfile(image.path))
    missing = [image.path for image in ground_truth.images if not os.path.isfile(image.path)]
    if not missing:
        return ground_truth
    count = len(ground_truth.images)
    sentence = f"{ground_truth.name}: {len(missing)} of its {count} images are missing, '{quote(str(missing[0]))}' for example"
    if not present:
        raise DarktrtError(sentence)
    notes.flaw(sentence)
    return replace(ground_truth, images=present)


# --- COCO ---


def _json_path(entry: str) -> Path | None:
    path = path_of(entry)
    return path if path.suffix.lower() == ".json" else None


@dataclass(frozen=True)
class _CocoImage(Excerpt):
    id: int | str
    file_name: str
    width: float | None = None
    height: float | None = None

    def __post_init__(self) -> None:
        if max(self.width or 0, self.height or 0) > _LARGEST:
            raise ValueError(f"an image is {self.width:g} x {self.height:g}")

    @property
    def size(self) -> tuple[int, int] | None:
        return None if self.width is None or self.height is None else (int(self.width), int(self.height))


@dataclass(frozen=True)
class _CocoAnnotation(Excerpt):
    """Tools other than COCO's own leave out the area and the crowd flag."""

    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool = 0

    def __post_init__(self) -> None:
        if max(map(abs, (*self.bbox, self.area or 0))) > _LARGEST:
            raise ValueError(f"a bbox is {self.bbox} and its area {self.area}")


@dataclass(frozen=True)
class _CocoCategory(Excerpt):
    id: int | str
    name: int | str


@dataclass(frozen=True)
class _CocoFile(Excerpt):
    images: tuple[_CocoImage, ...]
    annotations: tuple[_CocoAnnotation, ...] | None = None
    categories: tuple[_CocoCategory, ...] | None = None


def _read_coco(path: Path) -> _CocoFile:
    return read_record(_CocoFile, path, "a COCO file has images, annotations and categories; get it again", COCO_BYTES)


def _coco(entry: str, notes: _Notes) -> GroundTruth:
    path = path_of(entry)
    folder, _ = coco_images(entry)
    coco = _read_coco(path)
    for name, values in (("annotations", coco.annotations), ("categories", coco.categories)):
        if not values:
            notes.flaw(f"{path}: has no {name}, so there is nothing to compare detections with; name a COCO file with labels")
    categories = sorted(coco.categories or (), key=lambda one: (isinstance(one.id, str), one.id))
    objects = _objects(coco, {category.id: i for i, category in enumerate(categories)}, path, notes)
    images = [LabelledImage(folder / image.file_name, image.size, objects[image.id]) for image in coco.images]
    return GroundTruth(str(path), tuple(str(category.name) for category in categories), tuple(images))


def _objects(
    coco: _CocoFile, class_ids: Mapping[int | str, int], path: Path, notes: _Notes
) -> dict[int | str, tuple[LabelledObject, ...]]:
    """The objects by the image's id; annotations of images and categories that the file does not list are noted."""
    objects: dict[int | str, list[LabelledObject]] = {image.id: [] for image in coco.images}
    unlisted: list[str] = []
    for one in coco.annotations or ():
        if one.image_id not in objects:
            unlisted.append(f"image_id {quote(str(one.image_id))}")
        elif one.category_id not in class_ids:
            unlisted.append(f"category_id {quote(str(one.category_id))}")
        else:
            area = one.bbox[2] * one.bbox[3] if one.area is None else one.area
            objects[one.image_id].append(LabelledObject(class_ids[one.category_id], one.bbox, area, bool(one.iscrowd)))
    if unlisted:
        others = f", as have {len(unlisted) - 1} others" if len(unlisted) > 1 else ""
        notes.flaw(f"{path}: an annotation has {unlisted[0]}, which the file does not list{others}; get it again")
    return {image_id: tuple(labelled) for image_id, labelled in objects.items()}


# --- darknet ---


def _darknet(data: Sequence[str], class_names: Sequence[str], names: Sequence[str] | None, notes: _Notes) -> GroundTruth:
    classes = tuple(class_names if names is None else names)
    images, unlabelled, wrong = [], [], list[str]()
    for path in find_images(data, None, 0):
        file, size = _label_file(path), image_size(path)
        if file is None:
            unlabelled.append(path)
        objects = _read_label_file(file, size, len(classes), wrong) if file and size else []
        images.append(LabelledImage(path, None, tuple(objects)))
    ground_truth = GroundTruth(", ".join(data), classes, tuple(images))
    _note_unlabelled(ground_truth, unlabelled, notes)
    if wrong:
        notes.flaw(f"{wrong[0]}{f'; so are {len(wrong) - 1} other lines' * (len(wrong) > 1)}")
    if orphans := _labels_without_images(data):
        notes.note(
            f"{ground_truth.name}: {len(orphans)} label files have no image, '{orphans[0]}' for example; they do not count"
        )
    return ground_truth


def _note_unlabelled(ground_truth: GroundTruth, unlabelled: Sequence[Path], notes: _Notes) -> None:
    """Note images without a label file."""
    name, count = ground_truth.name, len(ground_truth.images)
    if count and len(unlabelled) == count:
        example = unlabelled[0].with_suffix(".txt")
        notes.flaw(f"{name}: no image has labels; name a COCO json, or write label files of darknet, such as '{example}'")
    elif unlabelled:
        notes.note(
            f"{name}: {len(unlabelled)} of {count} images have no label file, '{unlabelled[0]}' for example; they count as "
            "empty, so every detection in them is a false positive"
        )


def _label_file(image: Path) -> Path | None:
    """Darknet's label file of an image, if it exists."""
    return next((path for path in _label_paths(image.with_suffix(".txt")) if os.path.isfile(path)), None)


def _label_paths(path: Path) -> list[Path]:
    """The path, and the path with its last image folder replaced with ``labels``."""
    at = max((i for i, part in enumerate(path.parts) if part in IMAGE_FOLDERS), default=None)
    return [path] if at is None else [path, Path(*path.parts[:at], "labels", *path.parts[at + 1 :])]


def _read_label_file(path: Path, size: tuple[int, int], classes: int, wrong: list[str]) -> list[LabelledObject]:
    """The objects of one image; a sentence about each malformed line is appended to ``wrong``."""
    objects = []
    for number, line in _lines(path):
        try:
            objects.append(_object(line, size, classes))
        except ValueError as error:
            wrong.append(f"{path}:{number}: '{quote(line, 60)}' is no label: {quote(str(error))}")
    return objects


def _object(line: str, size: tuple[int, int], classes: int) -> LabelledObject:
    """A line ``class x y width height``: the box's centre and size relative to the image's size.

    Raises:
        ValueError: it is no such line.
    """
    words = line.split()
    if len(words) != 5 or not words[0].isdecimal():
        raise ValueError("write CLASS X Y WIDTH HEIGHT, with the number of the class")
    class_id, (x, y, width, height) = int(words[0]), map(float, words[1:])
    if class_id >= classes:
        raise ValueError(f"there are {classes} classes")
    if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < width < math.inf and 0 < height < math.inf):
        raise ValueError("the centre must lie within 0..1, and width and height be above 0")
    width, height = min(width, 1), min(height, 1)  # as darknet cuts them
    columns, rows = size
    box = ((x - width / 2) * columns, (y - height / 2) * rows, width * columns, height * rows)
    return LabelledObject(class_id, box, box[2] * box[3], False)


def _labels_without_images(data: Sequence[str]) -> list[Path]:
    """Label files without an image, in the folders that DATA names and in darknet's label folders for them."""
    folders = [folder for entry in data for folder in _label_paths(Path(entry)) if folder.is_dir()]
    files = [file for folder in folders for file in sorted(folder.rglob("*.txt"))]
    return [file for file in files if not _has_image(file) and _is_label_file(file)]


def _has_image(label_file: Path) -> bool:
    parts = label_file.parts
    paths = [Path(*(folder if part == "labels" else part for part in parts)) for folder in IMAGE_FOLDERS]
    suffixes = [form for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper())]
    return any(path.with_suffix(suffix).is_file() for path in (label_file, *paths) for suffix in suffixes)


def _is_label_file(file: Path) -> bool:
    wrong: list[str] = []
    return bool(_read_label_file(file, (1, 1), sys.maxsize, wrong)) and not wrong


# --- classes ---


def _with_classes(
    ground_truth: GroundTruth, class_names: Sequence[str], mapped: Mapping[str, str], notes: _Notes
) -> GroundTruth:
    """The same labels with the network's class ids, without objects of other classes."""
    class_of = _class_map(ground_truth, class_names, mapped, notes)
    labelled = Counter(one.class_id for image in ground_truth.images for one in image.objects)
    unknown = [f"{ground_truth.classes[i]} ({labelled[i]})" for i in sorted(labelled) if i not in class_of]
    if unknown and class_of:
        left_out = ", ".join(unknown)
        notes.note(f"{ground_truth.name}: objects of classes that the network does not have are left out: {left_out}")
    images = [
        image._replace(
            objects=tuple(o._replace(class_id=class_of[o.class_id]) for o in image.objects if o.class_id in class_of)
        )
        for image in ground_truth.images
    ]
    return replace(ground_truth, classes=tuple(class_names), images=tuple(images))


def _class_map(
    ground_truth: GroundTruth, class_names: Sequence[str], mapped: Mapping[str, str], notes: _Notes
) -> dict[int, int]:
    """The network's class id by that of the labels."""
    by_name = _classes_by_name(ground_truth.classes, class_names, mapped)
    missing = [name for i, name in enumerate(class_names) if i not in by_name.values()]
    if not missing or mapped:
        return by_name
    name, count = ground_truth.name, len(ground_truth.classes)
    if len(class_names) == count and all(i == j for i, j in by_name.items()):
        notes.note(f"{name}: has no category '{missing[0]}'; categories are taken as classes in order of their ids")
        return {i: i for i in range(len(class_names))}
    if by_name:
        which = f"'{missing[0]}'"
        if len(missing) > 1:
            which = f"{len(missing)} of the network's classes, {which} for example"
        notes.note(f"{name}: has no objects of {which}; detections of them are not evaluated")
    else:
        notes.flaw(
            f"{name}: has {count} categories without the network's class '{missing[0]}' among them, and the network has "
            f"{len(class_names)} classes; convert it with the names of the categories, or give a class map"
        )
    return by_name


def _classes_by_name(classes: Sequence[str], class_names: Sequence[str], mapped: Mapping[str, str]) -> dict[int, int]:
    """The network's class id by that of the labels, for names that both have and those that are mapped.

    Raises:
        DarktrtError: a mapped name is no class.
    """
    network = {_canonical(name): i for i, name in enumerate(class_names)}
    labels = [_canonical(name) for name in classes]
    chosen = {_canonical(left): _canonical(right) for left, right in mapped.items()}
    for left, right in chosen.items():
        if left not in labels:
            raise DarktrtError(f"the class map has '{left}', which is no class of the labels", "class_map")
        if right not in network:
            raise DarktrtError(f"the class map has '{right}', which is no class of the network", "class_map")
    names = [chosen.get(name, name) for name in labels]
    return {i: network[name] for i, name in enumerate(names) if name in network}


def _canonical(name: str) -> str:
    plain = name.strip().casefold().replace("_", " ")
    return SYNONYMS.get(plain, plain)
