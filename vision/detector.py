"""A network's outputs to detections, and whole files: images, folders and videos in, results and drawn copies out."""

from __future__ import annotations

import io
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.vision.boxes import Detections, nms, place_detections
from darktrt.vision.draw import draw
from darktrt.vision.images import Placement, preprocess, read_image
from darktrt.vision.sources import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import av.container
    import av.video.stream

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Arrays], Arrays]
"""A session of ONNX Runtime or an engine: named input arrays to named output arrays."""

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
DRAWN_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What a drawn image can be written as; a video is written as .mp4."""

ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {"b": "8M"}, "mpeg4": {"b": "8M"}}
"""Video encoders by preference, each with the options that give a good image; the first two write H.264."""

BT601 = 6
"""FFmpeg's number for SMPTE 170M."""

HANDFUL = 4

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def fit(image: NDArray[np.uint8], info: DetectorInfo) -> tuple[NDArray[Any], Placement]:
    """An RGB image ``(H, W, 3)`` as the input of one network, without the batch, and where the image lies in it."""
    return preprocess(image, info.width, info.height, info.channels, info.resize, info.input)


class Detector:
    """A network that can be run, with what its metadata says about feeding it and reading it.

    Args:
        run: takes ``images`` as the metadata describes (and the two thresholds where the model ends in NMS).
        info: the model's metadata.
        score_threshold: detections must exceed it.
        iou_threshold: overlap above which NMS suppresses.

    Raises:
        DarktrtError: the model ends at its raw heads, or a threshold is outside 0..1.
    """

    def __init__(self, run: Run, info: DetectorInfo, score_threshold: float = 0.25, iou_threshold: float = 0.45) -> None:
        if info.head == "raw":
            raise DarktrtError(f"{info.name}: ends at its raw heads; to detect, make it with head nms or decode")
        info.check_thresholds(Thresholds(score_threshold, iou_threshold))
        self.run = run
        self.info = info
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of every RGB image ``(H, W, 3)`` uint8, in pixels of that image, best first, clipped to it.

        Raises:
            DarktrtError: an image is no such array, or the model gives outputs that its metadata does not announce.
        """
        return [found for batch in _batches(images, self.info.batch[2]) for found in self._detect_batch(batch)]

    def detect_images(
        self, paths: Sequence[Path], pixels: bool = True
    ) -> tuple[Sequence[NDArray[np.uint8] | None], list[Detections]]:
        """The images of image files, which may be None without ``pixels``, and their detections.

        Raises:
            DarktrtError: a file cannot be read, or as :meth:`detect`.
        """
        images = [read_image(path) for path in paths]
        return images, self.detect(images)

    def _detect_batch(self, images: list[NDArray[np.uint8]]) -> list[Detections]:
        info = self.info
        fitted = [fit(image, info) for image in images]
        fitted += fitted[:1] * (info.batch[0] - len(fitted))
        inputs: Arrays = {"images": np.stack([array for array, _ in fitted])}
        if info.takes_image_size:
            inputs["image_size"] = np.array([placement.inner_size for _, placement in fitted], np.float32)
        outputs = self._run(inputs)
        read = self._read_padded if info.head == "nms" else self._read_decoded
        return [
            place_detections(*read({k: v[i] for k, v in outputs.items()}, placement), placement, info.class_names)
            for i, (_, placement) in enumerate(fitted[: len(images)])
        ]

    def _run(self, inputs: Arrays) -> Arrays:
        names = ["boxes", "scores"]
        if self.info.head == "nms":
            names += ["classes", "num_detections"]
        if self.info.takes_thresholds:
            inputs["score_threshold"] = np.array([self.score_threshold], np.float32)
            inputs["iou_threshold"] = np.array([self.iou_threshold], np.float32)
        outputs = self.run(inputs)
        batch = len(next(iter(inputs.values())))
        for name in names:
            if name not in outputs:
                raise DarktrtError(f"{self.info.name}: gives no output '{name}', only {', '.join(outputs) or 'nothing'}")
            if len(outputs[name]) != batch:
                raise DarktrtError(f"{self.info.name}: '{name}' has {len(outputs[name])} rows for a batch of {batch}")
        return {name: outputs[name] for name in names}

    def _read_padded(self, outputs: Arrays, _: Placement) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        count = int(outputs["num_detections"].item())
        # Copies, for an engine may write its next results into the same memory.
        return outputs["boxes"][:count].copy(), outputs["scores"][:count].copy(), outputs["classes"][:count].copy()

    def _read_decoded(
        self, outputs: Arrays, placement: Placement
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]:
        boxes, scores = outputs["boxes"], outputs["scores"]
        if np.isnan(scores).any():  # would pass for "nothing found": no comparison with NaN is true
            raise DarktrtError(f"{self.info.name}: its scores are not numbers; are the weights damaged?")
        rule, size = self.info.nms, placement.inner_size
        limit = self.info.max_detections or None
        thresholds = (self.score_threshold, self.iou_threshold)
        return nms(boxes, scores, *thresholds, rule.kind, rule.beta, size, max_detections=limit)


@dataclass(frozen=True)
class LiveSource:
    """A camera or a stream of the network, as FFmpeg opens it."""

    address: str
    form: str | None = None
    """FFmpeg's name of the input format, where the address does not tell."""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The address, without user and password."""
        scheme, found, rest = self.address.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"


@dataclass(frozen=True)
class FileResult:
    """What was found in one image, or in one frame of a video or of a live source."""

    path: Path | LiveSource
    detections: Detections
    frame: int | None = None
    """The frame's number from 0; None for an image."""
    image: Path | None = None
    """The drawn copy, where one was asked for; a video's is complete only after its last frame."""

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
    """The target's folder is ours to make."""

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def detect_files(
    detector: Detector,
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    in_flight: int = 1,
) -> Generator[FileResult, None, None]:
    """Detect in images and videos and, with ``output``, write copies with the detections drawn in.

    Args:
        sources: image and video files, folders (searched to any depth, by suffix), and patterns such as ``'shots/*.png'``.
        output: a file (.jpg, .png, ... for one image, .mp4 for one video) or a folder, which is made. In a folder a copy
            keeps its place below the folder that was given; equal names are numbered.
        in_flight: how many calls of the detector are under way at once, in threads; one that waits for a server takes several.

    Returns:
        An iterator of results, one an image or frame. Sources and output are checked before it is returned. A copy appears
        under its name only when it is complete. Close the iterator if you stop before its end.

    Raises:
        DarktrtError: there are no sources, one is missing or unreadable, or the output cannot be what was asked for.
    """
    target = None if output is None else Path(output)
    found = _find_sources(sources, target)
    in_folder = target is not None and _is_folder(target)
    jobs = [_Job(path, place, in_folder) for path, place in zip(found, _targets(found, target), strict=True)]
    total = sum(video_length(job.path) if job.is_video else 1 for job in jobs)
    return _with_progress(_detect_jobs(detector, jobs, in_flight), total)


def _with_progress(results: Generator[FileResult, None, None], total: int) -> Generator[FileResult, None, None]:
    """Pass results on beside a progress bar on stderr; no bar for one image, nor for a handful where no terminal shows it."""
    terminal = sys.stderr.isatty()
    bar = tqdm(
        total=total,
        unit=" images",
        file=sys.stderr,
        mininterval=0.1 if terminal else 10,
        disable=total <= (1 if terminal else HANDFUL),
    )
    with closing(results), bar:
        for result in results:
            bar.update()
            # On a terminal the bar steps aside for what the caller prints; a log file would get a line each time.
            with tqdm.external_write_mode() if terminal else nullcontext():
                yield result


def _detect_jobs(detector: Detector, jobs: list[_Job], in_flight: int) -> Generator[FileResult, None, None]:
    for is_video, group in groupby(jobs, key=lambda job: job.is_video):
        if is_video:
            for job in group:
                yield from _detect_video(detector, job, in_flight)
        else:
            yield from _detect_images(detector, group, in_flight)


def _detect_images(detector: Detector, jobs: Iterable[_Job], in_flight: int) -> Iterator[FileResult]:
    def detect(batch: list[_Job]) -> tuple[Sequence[NDArray[np.uint8] | None], list[Detections]]:
        return detector.detect_images([job.path for job in batch], any(job.target for job in batch))

    with closing(ahead(detect, _batches(jobs, detector.info.batch[2]), in_flight)) as results:
        for batch, (images, found) in results:
            for job, image, detections in zip(batch, images, found, strict=True):
                if job.target and image is not None:
                    if job.in_folder:
                        _make_folder(job.target.parent)
                    write_image(job.target, draw(image, detections))
                yield FileResult(job.path, detections, image=job.target)


def _detect_video(detector: Detector, job: _Job, in_flight: int) -> Iterator[FileResult]:
    with ExitStack() as stack:
        rate, frames = stack.enter_context(open_video(job.path))
        if job.target and job.in_folder:
            _make_folder(job.target.parent)
        write = stack.enter_context(video_writer(job.target, rate)) if job.target else None
        for number, image, found in stack.enter_context(closing(detect_frames(detector, enumerate(frames), in_flight))):
            if write:
                write(draw(image, found))
            yield FileResult(job.path, found, number, job.target)


def detect_frames(
    detector: Detector, frames: Iterable[tuple[int, NDArray[np.uint8]]], in_flight: int = 1
) -> Generator[tuple[int, NDArray[np.uint8], Detections], None, None]:
    """Numbered frames ``(H, W, 3)`` uint8 RGB with what is in them, in order."""
    batches = _batches(frames, detector.info.batch[2])
    with closing(ahead(lambda batch: detector.detect([image for _, image in batch]), batches, in_flight)) as results:
        for batch, found in results:
            for (number, image), detections in zip(batch, found, strict=True):
                yield number, image, detections


def ahead(
    function: Callable[[_Item], _Found], items: Iterable[_Item], in_flight: int
) -> Generator[tuple[_Item, _Found], None, None]:
    """Items with what the function makes of them, in order; up to ``in_flight`` calls run at once, in threads."""
    if in_flight == 1:
        yield from ((item, function(item)) for item in items)
        return
    pool = ThreadPoolExecutor(in_flight, "detect")
    try:
        started = ((item, pool.submit(function, item)) for item in items)
        waiting = deque(islice(started, in_flight + 1))  # one more, to be at hand when a thread gets free
        while waiting:
            item, found = waiting.popleft()
            yield item, found.result()
            waiting.extend(islice(started, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who stops early need not wait for what is under way


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


# Sources and targets


def _find_sources(arguments: Sequence[str | os.PathLike[str]], output: Path | None) -> dict[Path, Path]:
    """Every file to read, once, in order, with the path that its copy gets inside an output folder."""
    if not arguments:
        raise DarktrtError("no sources; name images, videos or folders")
    found: dict[Path, Path] = {}
    for argument in map(Path, arguments):
        try:
            files = _files_of(argument, output)
        except (OSError, ValueError) as error:  # no permission, too long a name, a malformed pattern
            raise DarktrtError(f"{argument}: cannot be read: {error}") from error
        if not files:
            raise DarktrtError(f"{argument}: no images or videos here ({' '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)})")
        for file, place in files.items():
            found.setdefault(file, place)
    return found


def _files_of(argument: Path, output: Path | None) -> dict[Path, Path]:
    if argument.is_dir():
        return _media_in(argument, "**/*", output)
    if argument.exists() or argument.is_symlink():
        return {argument: Path(argument.name)}
    plain = list(takewhile(lambda part: not set("*?[") & set(part), argument.parts))
    if len(plain) == len(argument.parts):
        raise DarktrtError(f"{argument}: no such file or folder")
    return _media_in(Path(*plain), str(Path(*argument.parts[len(plain) :])), output)


def _media_in(folder: Path, pattern: str, output: Path | None) -> dict[Path, Path]:
    """Images and videos that match, sorted; not hidden ones, nor copies of an earlier run in an output folder there."""
    places = {file: file.relative_to(folder) for file in sorted(folder.glob(pattern)) if _is_media(file)}
    copies = output.resolve() if output and output.resolve() != folder.resolve() else None
    return {
        file: place
        for file, place in places.items()
        if not any(part.startswith(".") for part in place.parts) and copies not in file.resolve().parents
    }


def _is_media(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and file.is_file()


def _targets(found: dict[Path, Path], output: Path | None) -> list[Path | None]:
    """Where the copy of every source goes."""
    if output is None:
        return [None] * len(found)
    targets = _targets_in(output, found) if _is_folder(output) else [_single_target(output, list(found))]
    originals = {file.resolve() for file in found}
    for target in targets:
        if target.resolve() in originals:
            raise DarktrtError(f"{target}: is one of the sources and would be overwritten; choose another output")
    return [*targets]


def _is_folder(output: Path) -> bool:
    try:
        return output.is_dir() or not output.suffix
    except OSError as error:
        raise DarktrtError(f"{output}: cannot be written: {error}") from error


def _single_target(output: Path, found: list[Path]) -> Path:
    suffix = output.suffix.lower()
    if suffix not in (*DRAWN_SUFFIXES, ".mp4"):
        raise DarktrtError(f"{output}: cannot write '{suffix}'; use {' '.join(DRAWN_SUFFIXES)}, .mp4 for a video, or a folder")
    if len(found) > 1:
        raise DarktrtError(f"{output}: is one file, but there are {len(found)} sources; name a folder")
    if (suffix == ".mp4") != _Job(found[0]).is_video:
        kind = "a video; name an .mp4 file" if suffix != ".mp4" else "an image; name a .jpg or .png file"
        raise DarktrtError(f"{output}: the source {found[0]} is {kind}")
    return output


def _targets_in(folder: Path, found: dict[Path, Path]) -> list[Path]:
    """One path a source, no two alike, not even where upper and lower case are the same."""
    taken: set[str] = set()
    targets = []
    for file, place in found.items():
        wanted = (".mp4",) if _Job(file).is_video else DRAWN_SUFFIXES
        name = place.name if place.suffix.lower() in wanted else f"{place.name}{'.mp4' if '.mp4' in wanted else '.png'}"
        first = target = folder / place.parent / name
        number = 1
        while str(target).casefold() in taken:
            number += 1
            target = first.with_name(f"{first.stem}-{number}{first.suffix}")
        taken.add(str(target).casefold())
        targets.append(target)
    return targets


def _make_folder(folder: Path) -> None:
    """Called once there is something to put into it, so that an unreadable source leaves no empty folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DarktrtError(f"{folder}: cannot make this output folder ({error.strerror})") from error


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


# Video


@contextmanager
def _video_stream(source: Path | LiveSource) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """The opened source and its first video stream; FFmpeg's errors inside the block become sentences that name the source."""
    import av

    live = (
        source if isinstance(source, LiveSource) else LiveSource(f"file:{source}")
    )  # "file:", for a colon could be a protocol
    try:
        with av.open(live.address, format=live.form, options=dict(live.options), metadata_errors="replace") as container:
            if not container.streams.video:
                raise DarktrtError(f"{source}: has no video stream")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        hint = "is it there, and may you read it?" if live is source else "is it damaged or truncated?"
        raise DarktrtError(f"{source}: cannot be read as a video ({error.strerror}); {hint}") from error


@contextmanager
def open_video(source: Path | LiveSource) -> Iterator[tuple[Fraction, Generator[NDArray[np.uint8], None, None]]]:
    """Frames a second, and the frames in order, ``(H, W, 3)`` uint8 RGB, turned upright as the source asks.

    Raises:
        DarktrtError: it is missing, no video, damaged, or has no frames.
    """
    with _video_stream(source) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        yield rate.limit_denominator(1001), _frames(source, container, stream)


def _frames(
    source: Path | LiveSource, container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Generator[NDArray[np.uint8], None, None]:
    empty = True
    stream.thread_type = "AUTO" if isinstance(source, Path) else "SLICE"  # threads by frame would show what was a while ago
    for frame in container.decode(stream):
        empty = False
        yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
    if empty:
        raise DarktrtError(f"{source}: has no frames that can be decoded")


def video_length(path: Path) -> int:
    """Number of frames; an estimate from the duration where the file does not say, 0 where that is not known either."""
    import av

    with _video_stream(path) as (container, stream):
        seconds = Fraction(container.duration or 0, av.time_base)
        return stream.frames or round(seconds * (stream.average_rate or 0))


@contextmanager
def video_writer(path: Path, rate: Fraction) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Yield a function that appends an RGB frame ``(H, W, 3)`` uint8 to an H.264 .mp4, which appears when the block ends well.

    Without an H.264 encoder in PyAV it is MPEG-4 part 2, said on stderr. An odd width or height loses its last line.
    """
    import av

    encoder = next(name for name in ENCODERS if _can_encode(name))
    if encoder == "mpeg4":
        print(f"{path}: this PyAV has no H.264 encoder; writing MPEG-4 part 2, which browsers do not play", file=sys.stderr)
    with atomic_output(path) as temporary:
        try:
            with av.open(f"file:{temporary}", "w") as container:
                stream: av.video.stream.VideoStream | None = None

                def write(image: NDArray[np.uint8]) -> None:
                    nonlocal stream
                    even = np.ascontiguousarray(image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2])
                    frame = av.VideoFrame.from_ndarray(even, format="rgb24")
                    stream = stream or _add_stream(container, encoder, rate, frame)
                    container.mux(stream.encode(frame.reformat(stream.width, stream.height)))  # sizes may change on the way

                yield write
                if stream:
                    container.mux(stream.encode())
        except av.FFmpegError as error:
            raise DarktrtError(f"{path}: cannot be written ({error.strerror}); is the disk full?") from error


def _add_stream(
    container: av.container.OutputContainer, encoder: str, rate: Fraction, first: av.VideoFrame
) -> av.video.stream.VideoStream:
    stream = cast("av.video.stream.VideoStream", container.add_stream(encoder, rate=rate, options=ENCODERS[encoder]))
    stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
    stream.codec_context.colorspace = BT601  # what FFmpeg makes of RGB; untagged, players take HD for BT.709 and shift colours
    return stream


def _can_encode(name: str) -> bool:
    import av

    try:
        av.Codec(name, "w")
    except ValueError:  # UnknownCodecError
        return False
    return True
