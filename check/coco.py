"""Average precision as COCO measures it: labelled pictures, detections in them, and pycocotools as the judge."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from calib.data import coco_pictures, path_of
from darktrt import DarktrtError, DetectorInfo
from vision.boxes import Detections
from vision.detect import Detector, Run
from vision.images import read_image

SCORE_THRESHOLD, IOU_THRESHOLD = 0.001, 0.45
"""darknet's own for mAP: nearly every detection counts, and NMS as in production."""

SYNONYMS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names of darknet's coco.names and of VOC, to COCO's."""


class LabelledObject(NamedTuple):
    """One annotation; the box is x, y, width, height in pixels of the picture."""

    class_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool


class LabelledPicture(NamedTuple):
    """A picture file, and what people saw in it."""

    path: Path
    size: tuple[int, int] | None
    """Width and height that the labels were made for, where the file of labels tells."""
    objects: tuple[LabelledObject, ...]


@dataclass(frozen=True)
class Truth:
    """The labelled pictures of a COCO file."""

    name: str
    classes: tuple[str, ...]
    """What the objects' class ids mean."""
    pictures: tuple[LabelledPicture, ...]


@dataclass(frozen=True)
class Accuracy:
    """COCO's numbers, means over the classes that occur; NaN where nothing of such a size is labelled."""

    ap: float
    """Mean over IoU .50:.05:.95, the number that is called AP or mAP."""
    ap50: float
    ap75: float
    ap_small: float
    """Of objects below 32 x 32 pixels; large ones have 96 x 96."""
    ap_medium: float
    ap_large: float


# Labels


def has_labels(entry: str) -> bool:
    """Whether ``entry``, ``FILE.json`` or ``FILE.json:FOLDER``, is a COCO file with annotations; pictures are not."""
    path = _json_path(entry)
    if path is None or not path.is_file():
        return False
    return bool(_coco_json(path).get("annotations"))


def load_truth(entry: str, class_names: Sequence[str], limit: int | None = None, seed: int = 0) -> Truth:
    """The labels of a COCO file for a network of these classes; of more than ``limit`` pictures a seeded sample.

    Categories are the network's classes by name (:data:`SYNONYMS` count), or by the order of their ids where the names differ
    and there are as many, which is said on stderr. Objects of categories that the network does not know are left out.

    Args:
        entry: ``FILE.json``, or ``FILE.json:FOLDER`` with its pictures' folder, which :mod:`calib.data` guesses otherwise.

    Raises:
        DarktrtError: it is no COCO file, has no annotations or other categories, a picture is missing, or ``limit`` is below 1.
    """
    path = _json_path(entry)
    if path is None:
        raise DarktrtError(
            f"{entry}: is no COCO file of labels; name a FILE.json, or FILE.json:FOLDER with its pictures' folder"
        )
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit}; evaluate on at least 1 picture")
    folder, _ = coco_pictures(entry)
    values = _coco_json(path)
    try:
        truth = _parse(values, path, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DarktrtError(f"{path}: is a damaged COCO file ({type(error).__name__}: {error}); get it again") from error
    truth = _with_classes(truth, class_names)
    if limit is not None and limit < len(truth.pictures):
        truth = replace(truth, pictures=tuple(random.Random(seed).sample(truth.pictures, limit)))
    if not any(not one.crowd for picture in truth.pictures for one in picture.objects):
        raise DarktrtError(f"{path}: no object of the network's classes is labelled in {len(truth.pictures)} pictures of it")
    return truth


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


def _parse(values: dict[str, Any], path: Path, folder: Path) -> Truth:
    for key in ("annotations", "categories"):
        if not values.get(key):
            raise DarktrtError(f"{path}: has no {key}, so nothing to hold detections against; name a COCO file with labels")
    categories = {one["id"]: str(one["name"]) for one in sorted(values["categories"], key=lambda one: one["id"])}
    class_ids = {category: i for i, category in enumerate(categories)}
    objects: dict[Any, list[LabelledObject]] = {one["id"]: [] for one in values["images"]}
    for one in values["annotations"]:
        for key, known in (("image_id", objects), ("category_id", class_ids)):
            if one[key] not in known:
                raise DarktrtError(f"{path}: an annotation has {key} {one[key]}, which the file does not list; get it again")
        objects[one["image_id"]].append(_labelled(one, class_ids[one["category_id"]]))
    pictures = [LabelledPicture(folder / one["file_name"], _size(one), tuple(objects[one["id"]])) for one in values["images"]]
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if missing:
        raise DarktrtError(f"{path}: {len(missing)} of its {len(pictures)} pictures are missing, '{missing[0]}' for one")
    return Truth(str(path), tuple(categories.values()), tuple(pictures))


def _labelled(annotation: dict[str, Any], class_id: int) -> LabelledObject:
    """An annotation; other tools than COCO's own leave out the area and the crowd flag."""
    x, y, width, height = (float(value) for value in annotation["bbox"])
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError(f"a bbox is {annotation['bbox']}")
    area = float(annotation.get("area", width * height))
    return LabelledObject(class_id, (x, y, width, height), area, bool(annotation.get("iscrowd", 0)))


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (int(image["width"]), int(image["height"])) if {"width", "height"} <= image.keys() else None


def _with_classes(truth: Truth, class_names: Sequence[str]) -> Truth:
    """The truth in the network's classes, and without objects of others."""
    by_name = {_canonical(name): i for i, name in enumerate(truth.classes)}
    wanted = [_canonical(name) for name in class_names]
    if set(wanted) <= set(by_name) and len(set(wanted)) == len(wanted):
        class_of = {by_name[name]: i for i, name in enumerate(wanted)}
    else:
        odd = next((name for name in class_names if _canonical(name) not in by_name), class_names[0])
        if len(class_names) != len(truth.classes):
            raise DarktrtError(
                f"{truth.name}: has {len(truth.classes)} categories without the network's class '{odd}' among them, and the "
                f"network has {len(class_names)} classes; convert it with --names and the names of the categories"
            )
        print(f"{truth.name}: has no category '{odd}'; categories are taken as classes in order of their ids", file=sys.stderr)
        class_of = {i: i for i in range(len(class_names))}
    pictures = [
        picture._replace(
            objects=tuple(o._replace(class_id=class_of[o.class_id]) for o in picture.objects if o.class_id in class_of)
        )
        for picture in truth.pictures
    ]
    return replace(truth, classes=tuple(class_names), pictures=tuple(pictures))


def _canonical(name: str) -> str:
    plain = name.strip().casefold().replace("_", " ")
    return SYNONYMS.get(plain, plain)


# Judging


def evaluate(run: Run, info: DetectorInfo, truth: Truth, label: str = "") -> Accuracy:
    """The accuracy of a network, a session or an engine, on all pictures of ``truth``; a bar on stderr.

    Raises:
        DarktrtError: a picture cannot be read or has another size than its labels, or the network cannot detect.
    """
    return accuracy(detect_all(Detector(run, info, SCORE_THRESHOLD, IOU_THRESHOLD), truth, label), truth)


def detect_all(detector: Detector, truth: Truth, label: str = "") -> list[Detections]:
    """Detections in every picture, in order, in pixels of the picture."""
    found: list[Detections] = []
    pictures = iter(truth.pictures)
    with progress_bar(len(truth.pictures), "pictures", label) as bar:
        while group := list(islice(pictures, detector.info.batch[0])):
            found += detector.detect([_read(picture, truth) for picture in group])
            bar.update(len(group))
    return found


def _read(picture: LabelledPicture, truth: Truth) -> NDArray[np.uint8]:
    image = read_image(picture.path)
    height, width = image.shape[:2]
    if picture.size not in (None, (width, height)):
        wanted = "x".join(map(str, picture.size or ()))
        raise DarktrtError(f"{picture.path}: is {width}x{height}, but {truth.name} has labels for {wanted}; get the right file")
    return image


def accuracy(found: Sequence[Detections], truth: Truth) -> Accuracy:
    """What COCO's judge says of these detections, one :class:`Detections` a picture."""
    stats = _judge(found, truth).stats
    return Accuracy(*(float(value) if value >= 0 else math.nan for value in stats[: len(fields(Accuracy))]))


def _judge(found: Sequence[Detections], truth: Truth) -> Any:
    """A COCOeval that has judged; pictures, classes and annotations are numbered afresh.

    COCOeval takes a detection matched to an annotation of id 0 for unmatched, so those begin at 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        labels, results = COCO(), COCO()
        labels.dataset, results.dataset = _dataset(truth), _dataset(truth, found)
        for one in (labels, results):
            one.createIndex()
        judge = COCOeval(labels, results, "bbox")
        for step in (judge.evaluate, judge.accumulate, judge.summarize):
            step()
    return judge


def _dataset(truth: Truth, found: Sequence[Detections] | None = None) -> dict[str, Any]:
    """The labels in COCO's form; or the detections."""
    rows = chain.from_iterable(_label_rows(truth) if found is None else map(_detection_rows, range(len(found)), found))
    return {
        "images": [{"id": i} for i in range(len(truth.pictures))],
        "categories": [{"id": i, "name": name} for i, name in enumerate(truth.classes)],
        "annotations": [{"id": i, **row} for i, row in enumerate(rows, 1)],
    }


def _label_rows(truth: Truth) -> list[list[dict[str, Any]]]:
    return [
        [
            {"image_id": i, "category_id": one.class_id, "bbox": list(one.box), "area": one.area, "iscrowd": int(one.crowd)}
            for one in picture.objects
        ]
        for i, picture in enumerate(truth.pictures)
    ]


def _detection_rows(image: int, found: Detections) -> list[dict[str, Any]]:
    corners = found.boxes.astype(np.float64)
    sizes = corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([corners[:, :2], sizes], 1).tolist()
    values = zip(boxes, sizes.prod(1).tolist(), found.scores.tolist(), found.class_ids.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": class_id, "bbox": box, "area": area, "score": score, "iscrowd": 0}
        for box, area, score, class_id in values
    ]


def progress_bar(total: int, unit: str, label: str = "") -> tqdm[Any]:
    """A bar on stderr that a terminal sees go away again; a log file gets a line every ten seconds."""
    terminal = sys.stderr.isatty()
    interval = 0.1 if terminal else 10
    return tqdm(total=total, unit=f" {unit}", desc=label or None, file=sys.stderr, mininterval=interval, leave=not terminal)
