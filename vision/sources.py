"""Image and video files named by folders, lists, COCO files and patterns."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from darktrt.errors import DarktrtError, quote
from darktrt.files import read_text
from darktrt.records import Excerpt, read_record

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
COCO_BYTES = 1 << 30
"""The largest COCO file that is read; that of train2017 has half a billion bytes."""
COCO_ADVICE = "a COCO file has images with a file_name"

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")


def find_images(data: Sequence[str | Path], limit: int | None = None, seed: int = 0) -> list[Path]:
    """All images of ``data``, each once, sorted.

    An entry of ``data`` is one of

    - a folder, which is searched to any depth; hidden files and folders are skipped;
    - an image file;
    - a list such as darknet's train.txt: one path a line, absolute or relative to the list's folder; empty lines and lines
      that begin with # are skipped;
    - a COCO json, or ``FILE.json:FOLDER``: its ``images[].file_name`` in FOLDER. The default folder is the first of these
      that has one of the images: the json's own folder, ``images`` in it, the folder in it or beside it that is named like
      the json (``val.json``: val; ``annotations/instances_val2017.json``: val2017);
    - a pattern such as ``'shots/**/*.png'``.

    Args:
        data: the entries.
        limit: the size of a random sample to draw where there are more images.
        seed: the sample is a function of the images and the seed.

    Raises:
        DarktrtError: an entry does not exist, cannot be read or has no images, or ``limit`` is less than 1.
    """
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit}; it must be at least 1", argument="limit")
    if not data:
        raise DarktrtError("there are no images; name a folder, list, COCO json or pattern", argument="data")
    paths = {os.path.realpath(path): path for entry in reversed(data) for path in reversed(_images_of(str(entry)))}
    images = sorted(paths.values())
    if limit is not None and limit < len(images):
        images = sorted(random.Random(seed).sample(images, limit))
    return images


def find_media(sources: Sequence[str | os.PathLike[str]], exclude: Path | None = None) -> dict[Path, Path]:
    """All images and videos, each once: the path of every file, and its path relative to the source folder.

    Args:
        sources: files of any suffix, folders (searched to any depth by suffix), and patterns such as ``'shots/*.png'``.
        exclude: a folder inside the sources to skip, such as the outputs of an earlier run; a source itself is not skipped.

    Raises:
        DarktrtError: there are no sources, or one is missing, cannot be read or has no images and videos.
    """
    if not sources:
        raise DarktrtError("no sources; name images, videos or folders")
    files: dict[Path, Path] = {}
    if "" in [os.fspath(source) for source in sources]:
        raise DarktrtError("a source has an empty name; name images, videos or folders")
    for source in map(Path, sources):
        try:
            media = _media_of(source, exclude)
        except (OSError, ValueError) as error:  # no permission, too long a name, a malformed pattern
            raise DarktrtError(f"{source}: cannot be read: {error}") from error
        if not media:
            raise DarktrtError(f"{source}: no images or videos here ({' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)})")
        for file, relative in media.items():
            files.setdefault(file, relative)
    return files


def _media_of(source: Path, exclude: Path | None) -> dict[Path, Path]:
    if source.is_dir():
        folder, pattern = source, "**/*"
    elif source.exists() or source.is_symlink():
        return {source: Path(source.name)}
    else:
        folder, pattern = split_pattern(source)
    skipped = Path(os.path.realpath(exclude)) if exclude and os.path.realpath(exclude) != os.path.realpath(folder) else None
    files = sorted(matching_files(folder, pattern, IMAGE_SUFFIXES + VIDEO_SUFFIXES))
    return {file: file.relative_to(folder) for file in files if skipped not in Path(os.path.realpath(file)).parents}


def path_of(entry: str) -> Path:
    """The file, folder or pattern that an entry of :func:`find_images` names, without the folder behind a COCO json."""
    json_file, colon, _ = entry.partition(".json:")
    return Path(f"{json_file}.json" if colon else entry)


def coco_images(entry: str) -> tuple[Path, list[str]]:
    """The image folder of a COCO json and the images' names relative to it.

    Args:
        entry: ``FILE.json:FOLDER``, or ``FILE.json``, whose folder is searched for as :func:`find_images` describes.

    Raises:
        DarktrtError: the file is no COCO file, lists no images, or none of its images is in the folder.
    """
    path, folder = path_of(entry), entry.partition(".json:")[2]
    names = _coco_names(path)
    if not names:
        raise _no_images(entry)
    split = path.stem.removeprefix("instances_")
    guesses = [path.parent, path.parent / "images", path.parent / split, path.parent.parent / split]
    for candidate in [Path(folder)] if folder else guesses:
        if any(os.path.isfile(candidate / name) for name in names):
            return candidate, names
    where = f"'{folder}'" if folder else "its folder, nor in one named like it"
    raise DarktrtError(f"{path}: its image '{quote(names[0])}' is not in {where}; name the images' folder as {path}:FOLDER")


def matching_files(folder: Path, pattern: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> Iterator[Path]:
    """Files below a folder that match a pattern and have one of these suffixes; hidden files and folders are skipped."""
    for file in folder.glob(pattern):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in suffixes and not hidden and file.is_file():
            yield file


def split_pattern(path: Path) -> tuple[Path, str]:
    """A pattern such as ``shots/**/*.png`` as the folder before its first wildcard and the pattern below that folder.

    Raises:
        DarktrtError: the path has no wildcard: it names a file or folder that does not exist.
    """
    plain = list(takewhile(lambda part: not set("*?[") & set(part), path.parts))
    if len(plain) == len(path.parts):
        raise DarktrtError(f"{path}: no such file or folder")
    return Path(*plain), str(Path(*path.parts[len(plain) :]))


def _images_of(entry: str) -> list[Path]:
    path = Path(entry)
    try:
        if path.is_dir():
            images = list(matching_files(path, "**/*"))
        elif ".json:" in entry:
            images = _coco(entry)
        elif path.is_file():
            images = _file(path)
        else:
            images = list(matching_files(*split_pattern(path)))
    except (OSError, ValueError) as error:  # no permission, too long a name, a malformed pattern
        raise DarktrtError(f"{entry}: cannot be read: {error}") from error
    if not images:
        raise _no_images(entry)
    return images


def _no_images(entry: str) -> DarktrtError:
    return DarktrtError(f"{entry}: no images here ({' '.join(IMAGE_SUFFIXES)})")


def _file(path: Path) -> list[Path]:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return [path]
    return _coco(str(path)) if path.suffix.lower() == ".json" else _listed(path)


def _listed(path: Path) -> list[Path]:
    advice = "it should be an image, or a list of images, a path a line"
    lines = [line.strip() for line in read_text(path, advice=advice).splitlines()]
    images = [path.parent / line for line in lines if line and not line.startswith("#")]
    for image in images:
        if image.suffix.lower() not in IMAGE_SUFFIXES:
            raise DarktrtError(f"{path}: lists '{image}', which is no image ({' '.join(IMAGE_SUFFIXES)})")
    return images


def _coco(entry: str) -> list[Path]:
    folder, names = coco_images(entry)
    return [folder / name for name in names]


@dataclass(frozen=True)
class _CocoImage(Excerpt):
    file_name: str


@dataclass(frozen=True)
class _CocoImages(Excerpt):
    images: tuple[_CocoImage, ...]


def _coco_names(path: Path) -> list[str]:
    return [image.file_name for image in read_record(_CocoImages, path, COCO_ADVICE, COCO_BYTES).images]
