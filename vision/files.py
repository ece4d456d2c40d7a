"""Detections in files: images, folders and videos in, results and drawn copies out."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darktrt.cuda import Frame, host_pixels
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, make_folder
from darktrt.progress import progress
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.draw import draw
from darktrt.vision.sources import VIDEO_SUFFIXES, find_media
from darktrt.vision.video import LiveSource, open_video, video_length, video_writer

DRAWN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Formats of drawn images; a drawn video is an .mp4."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class FileResult:
    """The detections of one image, or of one frame of a video or a live source."""

    path: Path | LiveSource
    detections: Detections
    frame: int | None = None
    """The frame's number from 0; None for an image."""
    image: Path | None = None
    """The drawn copy, if any; a video's is complete only after its last frame."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able record."""
        frame = {} if self.frame is None else {"frame": self.frame}
        image = {} if self.image is None else {"image": str(self.image)}
        return {"file": str(self.path), **frame, "detections": self.detections.to_list(), **image}


@dataclass(frozen=True)
class _Job:
    path: Path
    target: Path | None = None
    in_folder: bool = False
    """Whether the target's folder may have to be made."""

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def detect_files(
    detector: NetworkDetector,
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    in_flight: int | None = None,
) -> Generator[FileResult, None, None]:
    """Detect in images and videos and, with ``output``, write copies with the detections drawn in.

    Args:
        sources: image and video files, folders (searched to any depth, by suffix), and patterns such as ``'shots/*.png'``.
        output: a file (.jpg, .png, ... for one image, .mp4 for one video) or a folder, which is made. In a folder a copy
            has the path of its source relative to the source folder; equal names are numbered.
        in_flight: concurrent calls of the detector, in threads, for one on a server; None for a network on this machine.

    Returns:
        An iterator of results, one for each image or frame. Sources and output are checked before it is returned. A copy
        appears under its name only when it is complete. Close the iterator if you stop before its end.

    Raises:
        DarktrtError: there are no sources, one is missing or unreadable, or the output cannot be what was asked for.
    """
    target = None if output is None else Path(output)
    paths = find_media(sources, exclude=target)
    in_folder = target is not None and _is_folder(target)
    jobs = [_Job(path, copy, in_folder) for path, copy in zip(paths, _targets(paths, target), strict=True)]
    total = sum(video_length(job.path) if job.is_video else 1 for job in jobs)
    return _with_progress(_detect_jobs(detector, jobs, in_flight), total)


def _with_progress(results: Generator[FileResult, None, None], total: int) -> Generator[FileResult, None, None]:
    """Pass results on and show the progress."""
    with closing(results), progress(total, "images", least=2) as bar:
        for result in results:
            bar.update()
            with bar.aside():
                yield result


def _detect_jobs(detector: NetworkDetector, jobs: list[_Job], in_flight: int | None) -> Generator[FileResult, None, None]:
    for is_video, group in groupby(jobs, key=lambda job: job.is_video):
        if is_video:
            for job in group:
                yield from _detect_video(detector, job, in_flight)
        else:
            yield from _detect_images(detector, group, in_flight)


def _detect_images(detector: NetworkDetector, jobs: Iterable[_Job], in_flight: int | None) -> Iterator[FileResult]:
    with closing(_read_and_detect(detector, jobs, in_flight)) as results:
        for batch, images, detected in results:
            for job, image, detections in zip(batch, images, detected, strict=True):
                if job.target and image is not None:
                    if job.in_folder:
                        make_folder(job.target.parent)
                    write_image(job.target, draw(host_pixels(image), detections))
                yield FileResult(job.path, detections, image=job.target)


def _read_and_detect(
    detector: NetworkDetector, jobs: Iterable[_Job], in_flight: int | None
) -> Generator[tuple[list[_Job], Sequence[Frame | None], list[Detections]], None, None]:
    """The jobs in batches with their images, which may be None where no copy is wanted, and detections."""
    batches = list(_batches(jobs, detector.info.batch[2]))
    if in_flight is None:
        rest = (job for batch in batches for job in batch)
        with closing(detector.detect_frames([job.path for job in batch] for batch in batches)) as parts:
            for frames, detections in parts:  # of a whole batch, or of a part of one with large images
                yield list(islice(rest, len(frames))), frames, detections
        return

    def detect(batch: list[_Job]) -> tuple[Sequence[Frame | None], list[Detections]]:
        return detector.detect_images([job.path for job in batch], any(job.target for job in batch))

    with closing(ahead(detect, batches, in_flight)) as results:
        yield from ((batch, *result) for batch, result in results)


def _detect_video(detector: NetworkDetector, job: _Job, in_flight: int | None) -> Iterator[FileResult]:
    with ExitStack() as stack:
        rate, frames = stack.enter_context(open_video(job.path, detector._decodes_on))
        if job.target and job.in_folder:
            make_folder(job.target.parent)
        write = stack.enter_context(video_writer(job.target, rate)) if job.target else None
        results = stack.enter_context(closing(detect_frames(detector, enumerate(frames), in_flight)))
        for number, image, detections in results:
            if write:
                write(draw(host_pixels(image), detections))
            yield FileResult(job.path, detections, number, job.target)


def detect_frames(
    detector: NetworkDetector, frames: Iterable[tuple[int, Frame]], in_flight: int | None = None
) -> Generator[tuple[int, Frame, Detections], None, None]:
    """Detect in numbered frames: yield each with its detections, in order.

    Args:
        in_flight: concurrent calls of the detector, in threads, for one on a server; None for a network on this machine.
    """
    batches = _batches(frames, detector.info.batch[2])
    if in_flight is None:
        yield from _detect_ahead(detector, batches)
        return
    with closing(ahead(lambda batch: detector.detect([image for _, image in batch]), batches, in_flight)) as results:
        for batch, detected in results:
            for (number, image), detections in zip(batch, detected, strict=True):
                yield number, image, detections


def _detect_ahead(
    detector: NetworkDetector, batches: Iterable[list[tuple[int, Frame]]]
) -> Generator[tuple[int, Frame, Detections], None, None]:
    numbers: deque[int] = deque()

    def images() -> Iterator[list[Frame]]:
        for batch in batches:
            numbers.extend(number for number, _ in batch)
            yield [image for _, image in batch]

    with closing(detector.detect_frames(images())) as results:
        for frames, detected in results:
            for image, detections in zip(frames, detected, strict=True):
                yield numbers.popleft(), image, detections


def ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], in_flight: int
) -> Generator[tuple[_Item, _Result], None, None]:
    """Yield items with the function's results, in order; up to ``in_flight`` calls run at once, in threads."""
    if in_flight == 1:
        yield from ((item, function(item)) for item in items)
        return
    pool = ThreadPoolExecutor(in_flight, "detect")
    try:
        started = ((item, pool.submit(function, item)) for item in items)
        waiting = deque(islice(started, in_flight + 1))  # one more, for the first thread that gets free
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
            waiting.extend(islice(started, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # stopping early does not wait for running calls


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


# Targets


def _targets(sources: dict[Path, Path], output: Path | None) -> list[Path | None]:
    """The path of each source's copy."""
    if output is None:
        return [None] * len(sources)
    targets = _targets_in(output, sources) if _is_folder(output) else [_single_target(output, list(sources))]
    originals = {os.path.realpath(file) for file in sources}
    for target in targets:
        if os.path.realpath(target) in originals:
            raise DarktrtError(f"{target}: is one of the sources and would be overwritten; choose another output")
    return [*targets]


def _is_folder(output: Path) -> bool:
    return os.path.isdir(output) or not output.suffix


def _single_target(output: Path, sources: list[Path]) -> Path:
    suffix = output.suffix.lower()
    if suffix not in (*DRAWN_SUFFIXES, ".mp4"):
        raise DarktrtError(f"{output}: cannot write '{suffix}'; use {' '.join(DRAWN_SUFFIXES)}, .mp4 for a video, or a folder")
    if len(sources) > 1:
        raise DarktrtError(f"{output}: is one file, but there are {len(sources)} sources; name a folder")
    if (suffix == ".mp4") != _Job(sources[0]).is_video:
        kind = "a video; name an .mp4 file" if suffix != ".mp4" else "an image; name a .jpg or .png file"
        raise DarktrtError(f"{output}: the source {sources[0]} is {kind}")
    return output


def _targets_in(folder: Path, sources: dict[Path, Path]) -> list[Path]:
    """A path for each source; they are unique even where case does not count."""
    used: set[str] = set()
    targets = []
    for file, path in sources.items():
        wanted = (".mp4",) if _Job(file).is_video else DRAWN_SUFFIXES
        name = path.name if path.suffix.lower() in wanted else f"{path.name}{'.mp4' if '.mp4' in wanted else '.png'}"
        first = target = folder / path.parent / name
        number = 1
        while str(target).casefold() in used:
            number += 1
            target = first.with_name(f"{first.stem}-{number}{first.suffix}")
        used.add(str(target).casefold())
        targets.append(target)
    return targets


def write_image(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an RGB image ``(H, W, 3)`` uint8 in the format of the suffix, whole or not at all."""
    encoded = io.BytesIO()
    form = Image.registered_extensions()[path.suffix.lower()]
    try:
        Image.fromarray(image).save(encoded, form, quality=92)
    except ValueError as error:
        raise DarktrtError(f"{path}: cannot be written ({error}); try a .png file") from error
    with atomic_output(path) as temporary:
        temporary.write_bytes(encoded.getvalue())  # Pillow itself would not notice a full disk
