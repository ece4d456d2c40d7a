"""The images to calibrate on: folders, lists, COCO files and patterns to a sorted, seeded sample of paths; or samples.

And those images in the batches that TensorRT's own calibration takes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output
from darktrt.metadata import DetectorInfo
from darktrt.vision.detector import IMAGE_SUFFIXES, fit
from darktrt.vision.images import read_image

SAMPLES_WARNING = """\
WARNING: no DATA was given, so the scales come from flips and crops of two sample images.
         Such scales are for trying out only: an INT8 engine made with them may miss objects.
         Calibrate on images like those that the network will see, a hundred or more:
         darktrt calib ONNX path/to/images -o TABLE, or make ... DATA=path/to/images"""

_CROP = 2 / 3
_CORNERS = {"whole": None, "middle": (0.5, 0.5), "nw": (0, 0), "ne": (1, 0), "sw": (0, 1), "se": (1, 1)}
"""Where a crop of ``_CROP`` of both sides lies: the shares of what is cut off that are cut off left and above."""


def find_images(data: Sequence[str | Path], limit: int | None, seed: int) -> list[Path]:
    """All images of ``data``, each once, sorted; of more than ``limit`` a sample that depends on ``seed`` alone.

    An entry of ``data`` is one of

    - a folder, searched to any depth; hidden files and folders are skipped;
    - an image file;
    - a list such as darknet's train.txt: a path a line, absolute or relative to the list's folder; empty lines and those
      that begin with # are skipped;
    - a COCO json, or ``FILE.json:FOLDER``: its ``images[].file_name`` in FOLDER, by default in the first of these that has
      one of the images: the json's own folder, ``images`` in it, the folder in it or beside it that is named like the json
      (``val.json``: val; ``annotations/instances_val2017.json``: val2017);
    - a pattern such as ``'shots/**/*.png'``.

    Raises:
        DarktrtError: an entry does not exist, cannot be read or has no images, or ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit}; calibrate on at least 1 image")
    if not data:
        raise DarktrtError("no images to calibrate on; name a folder, list, COCO json or pattern")
    found = {path.resolve(): path for entry in reversed(data) for path in reversed(_entry(str(entry)))}
    images = sorted(found.values())
    if limit is not None and limit < len(images):
        images = sorted(random.Random(seed).sample(images, limit))
    return images


def batches(images: Sequence[Path], info: DetectorInfo) -> Iterator[dict[str, NDArray[Any]]]:
    """The images as all inputs of a model, for TensorRT to calibrate on; under a bar on stderr.

    One at a time, or of a static batch as many as it takes; the last is filled up from the first images.

    Raises:
        DarktrtError: an image cannot be read.
    """
    size = batch_of(info)
    filled = [*images, *islice(cycle(images), -len(images) % size)]
    for i in tqdm(range(0, len(filled), size), "calibrating", unit=" batches", leave=False, disable=not sys.stderr.isatty()):
        fitted = [fit(read_image(path), info) for path in filled[i : i + size]]
        inputs: dict[str, NDArray[Any]] = {"images": np.stack([array for array, _ in fitted])}
        if info.takes_thresholds:
            inputs |= {name: np.array([0.5], np.float32) for name in ("score_threshold", "iou_threshold")}
        if info.takes_image_size:
            inputs["image_size"] = np.array([placement.inner_size for _, placement in fitted], np.float32)
        yield inputs


def batch_of(info: DetectorInfo) -> int:
    """Images in one of these batches."""
    return info.batch[0] if info.batch[0] == info.batch[2] else 1


def path_of(entry: str) -> Path:
    """The file, folder or pattern that an entry of DATA names, without the folder that may follow a COCO json."""
    json_file, colon, _ = entry.partition(".json:")
    return Path(f"{json_file}.json" if colon else entry)


def _entry(entry: str) -> list[Path]:
    path = Path(entry)
    try:
        if path.is_dir():
            images = _matching(path, "**/*")
        elif ".json:" in entry:
            images = _coco(entry)
        elif path.is_file():
            images = _file(path)
        else:
            images = _pattern(path)
    except (OSError, ValueError) as error:  # no permission, too long a name, a malformed pattern
        raise DarktrtError(f"{entry}: cannot be read: {error}") from error
    if not images:
        raise DarktrtError(f"{entry}: no images here ({' '.join(IMAGE_SUFFIXES)})")
    return images


def _file(path: Path) -> list[Path]:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return [path]
    return _coco(str(path)) if path.suffix.lower() == ".json" else _listed(path)


def _listed(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DarktrtError(f"{path}: is neither an image nor a list of images, a path a line") from error
    images = [path.parent / line for line in lines if line and not line.startswith("#")]
    for image in images:
        if image.suffix.lower() not in IMAGE_SUFFIXES:
            raise DarktrtError(f"{path}: lists '{image}', which is no image ({' '.join(IMAGE_SUFFIXES)})")
    return images


def coco_images(entry: str) -> tuple[Path, list[str]]:
    """The names of a COCO json's images, and the folder that they count from.

    Args:
        entry: ``FILE.json:FOLDER``, or ``FILE.json``, for which :func:`find_images` says where the folder is looked for.

    Raises:
        DarktrtError: it is no COCO file, lists no images, or none of them is in the folder.
    """
    path, folder = path_of(entry), entry.partition(".json:")[2]
    try:
        names = [str(image["file_name"]) for image in json.loads(path.read_text(encoding="utf-8"))["images"]]
    except OSError as error:
        raise DarktrtError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DarktrtError(f"{path}: is no COCO file, which has images with a file_name") from error
    if not names:
        raise DarktrtError(f"{entry}: no images here ({' '.join(IMAGE_SUFFIXES)})")
    split = path.stem.removeprefix("instances_")
    guesses = [path.parent, path.parent / "images", path.parent / split, path.parent.parent / split]
    for place in [Path(folder)] if folder else guesses:
        if any((place / name).is_file() for name in names):
            return place, names
    where = f"'{folder}'" if folder else "its folder, nor in one named like it"
    raise DarktrtError(f"{path}: its image '{names[0]}' is not in {where}; name the images' folder as {path}:FOLDER")


def _coco(entry: str) -> list[Path]:
    folder, names = coco_images(entry)
    return [folder / name for name in names]


def _pattern(path: Path) -> list[Path]:
    plain = list(takewhile(lambda part: not set("*?[") & set(part), path.parts))
    if len(plain) == len(path.parts):
        raise DarktrtError(f"{path}: no such file or folder")
    return _matching(Path(*plain), str(Path(*path.parts[len(plain) :])))


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Images below a folder that match; none that is hidden or lies in a hidden folder."""
    return [
        file
        for file in folder.glob(pattern)
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]


def flips_and_crops(images: Sequence[Path], folder: Path) -> list[Path]:
    """Twelve images of each one, written as JPEG into ``folder``: whole and five crops, each also mirrored.

    The same images give the same files, byte for byte, so that a run on them can be resumed.

    Raises:
        DarktrtError: an image cannot be read, or a file not written.
    """
    made = []
    for path in images:
        image = Image.fromarray(read_image(path))
        for name, corner in _CORNERS.items():
            crop = _cropped(image, *corner) if corner else image
            for suffix, variant in (("", crop), ("-mirrored", crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
                made.append(folder / f"{path.stem}-{name}{suffix}.jpg")
                with atomic_output(made[-1]) as temporary:
                    variant.save(temporary, quality=95)
    return made


def _cropped(image: Image.Image, left: float, above: float) -> Image.Image:
    width, height = round(image.width * _CROP), round(image.height * _CROP)
    x, y = round((image.width - width) * left), round((image.height - height) * above)
    return image.crop((x, y, x + width, y + height))
