"""The pictures to calibrate on: folders, lists, COCO files and patterns to a sorted, seeded sample of paths."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from darktrt import DarktrtError
from vision.detect import IMAGE_SUFFIXES


def find_images(data: Sequence[str | Path], limit: int | None, seed: int) -> list[Path]:
    """All pictures of ``data``, each once, sorted; of more than ``limit`` a sample that depends on ``seed`` alone.

    An entry of ``data`` is one of

    - a folder, searched to any depth; hidden files and folders are skipped;
    - a picture file;
    - a list such as darknet's train.txt: a path a line, absolute or relative to the list's folder; empty lines and those
      that begin with # are skipped;
    - a COCO json, or ``FILE.json:FOLDER``: its ``images[].file_name`` in FOLDER, by default in the first of these that has
      the first picture: the json's own folder, ``images`` in it, the folder in it or beside it that is named like the json
      (``val.json``: val; ``annotations/instances_val2017.json``: val2017);
    - a pattern such as ``'shots/**/*.png'``.

    Raises:
        DarktrtError: an entry does not exist, cannot be read or has no pictures, or ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit}; calibrate on at least 1 picture")
    if not data:
        raise DarktrtError("no pictures to calibrate on; name a folder, list, COCO json or pattern")
    found = {path.resolve(): path for entry in reversed(data) for path in reversed(_entry(str(entry)))}
    images = sorted(found.values())
    if limit is not None and limit < len(images):
        images = sorted(random.Random(seed).sample(images, limit))
    return images


def _entry(entry: str) -> list[Path]:
    path = Path(entry)
    json_file, colon, folder = entry.partition(".json:")
    try:
        if path.is_dir():
            images = _matching(path, "**/*")
        elif colon:
            images = _coco(Path(f"{json_file}.json"), Path(folder))
        elif path.is_file():
            images = _file(path)
        else:
            images = _pattern(path)
    except (OSError, ValueError) as error:  # no permission, too long a name, a malformed pattern
        raise DarktrtError(f"{entry}: cannot be read: {error}") from error
    if not images:
        raise DarktrtError(f"{entry}: no pictures here ({' '.join(IMAGE_SUFFIXES)})")
    return images


def _file(path: Path) -> list[Path]:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return [path]
    return _coco(path, None) if path.suffix.lower() == ".json" else _listed(path)


def _listed(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DarktrtError(f"{path}: is neither a picture nor a list of pictures, a path a line") from error
    images = [path.parent / line for line in lines if line and not line.startswith("#")]
    for image in images:
        if image.suffix.lower() not in IMAGE_SUFFIXES:
            raise DarktrtError(f"{path}: lists '{image}', which is no picture ({' '.join(IMAGE_SUFFIXES)})")
    return images


def _coco(path: Path, folder: Path | None) -> list[Path]:
    try:
        names = [str(image["file_name"]) for image in json.loads(path.read_text())["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DarktrtError(f"{path}: is no COCO file, which has images with a file_name") from error
    if not names:
        return []
    split = path.stem.removeprefix("instances_")
    guesses = [path.parent, path.parent / "images", path.parent / split, path.parent.parent / split]
    for place in [folder] if folder else guesses:
        if (place / names[0]).is_file():
            return [place / name for name in names]
    where = f"'{folder}'" if folder else "its folder, nor in one named like it"
    raise DarktrtError(f"{path}: its picture '{names[0]}' is not in {where}; name the pictures' folder as {path}:FOLDER")


def _pattern(path: Path) -> list[Path]:
    plain = list(takewhile(lambda part: not set("*?[") & set(part), path.parts))
    if len(plain) == len(path.parts):
        raise DarktrtError(f"{path}: no such file or folder")
    return _matching(Path(*plain), str(Path(*path.parts[len(plain) :])))


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Pictures below a folder that match; none that is hidden or lies in a hidden folder."""
    return [
        file
        for file in folder.glob(pattern)
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
