"""Videos and live sources through FFmpeg: frames in, H.264 files out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Frame
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, check_input
from darktrt.progress import LOGGER
from darktrt.vision.decode import Device
from darktrt.vision.gpu_video import GpuVideoError, gpu_frames, has_same_colours, import_codec
from darktrt.vision.prefetch import prefetch

if TYPE_CHECKING:
    import av.container
    import av.video.stream

ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {"b": "8M"}, "mpeg4": {"b": "8M"}}
"""Video encoders by preference, each with options for good quality; the first two write H.264."""

BT601 = 6
"""FFmpeg's number for SMPTE 170M."""

MOST_CONVERTERS = 4
"""Threads that convert frames to RGB; one does 1,000 frames of 1920x1080 a second."""

MOST_BYTES = 2**28
"""How many bytes of pixels are decoded ahead, and at least one frame."""

THREADED_CONVERTER = 17
"""The version of PyAV since which a conversion starts threads of its own, unless asked for one."""

_Frame = TypeVar("_Frame")


@dataclass(frozen=True)
class LiveSource:
    """A camera or a network stream, as FFmpeg opens it."""

    address: str
    form: str | None = None
    """FFmpeg's name of the input format, where FFmpeg cannot derive it from the address."""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The address, without user and password."""
        scheme, separator, rest = self.address.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


@contextmanager
def _video_stream(source: Path | LiveSource) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """Open a source and its first video stream; FFmpeg's errors in the block are raised as errors that name the source."""
    import av

    # "file:", for a colon could be a protocol
    live = source if isinstance(source, LiveSource) else LiveSource(f"file:{source}")
    if isinstance(source, Path):
        check_input(source)
    try:
        with av.open(live.address, format=live.form, options=dict(live.options), metadata_errors="replace") as container:
            if not container.streams.video:
                raise DarktrtError(f"{source}: has no video stream")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        hint = "is it there, and may you read it?" if live is source else "is it damaged or truncated?"
        raise DarktrtError(f"{source}: cannot be read as a video ({error.strerror}); {hint}") from error


@overload
@contextmanager
def open_video(
    source: Path | LiveSource, device: Literal["cpu"] = "cpu"
) -> Iterator[tuple[Fraction, Generator[NDArray[np.uint8], None, None]]]: ...


@overload
@contextmanager
def open_video(source: Path | LiveSource, device: Device) -> Iterator[tuple[Fraction, Generator[Frame, None, None]]]: ...


@contextmanager
def open_video(source: Path | LiveSource, device: Device = "cpu") -> Iterator[tuple[Fraction, Generator[Frame, None, None]]]:
    """Open a video: its frames a second, and its frames in order, ``(H, W, 3)`` RGB, turned upright.

    The frames of a file are decoded in threads, ahead of use; those of a live source as they are asked for.

    Args:
        source: a file or a live source.
        device: ``"cpu"`` decodes by FFmpeg, to arrays. ``"gpu"`` decodes files of which the GPU makes the same colours by
            PyNvVideoCodec, to :class:`~darktrt.cuda.DeviceImage`, with pixels that differ by some levels, and the others by
            FFmpeg. ``"auto"`` is ``"gpu"`` where there are a GPU and PyNvVideoCodec.

    Raises:
        DarktrtError: it is missing, no video, damaged, or has no frames; or ``device`` is ``"gpu"``, and there is no GPU or no
            PyNvVideoCodec.
    """
    with _video_stream(source) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        if isinstance(source, LiveSource):
            frames: Generator[Frame, None, None] = _live_frames(source, container, stream)
        elif device != "cpu" and (codec := import_codec(required=device == "gpu")):
            frames = _gpu_frames(source, codec, container, stream)
        else:
            frames = _file_frames(source, container, stream)
        with closing(frames):  # threads read the container
            yield rate.limit_denominator(1001), frames


def _live_frames(
    source: LiveSource, container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Generator[NDArray[np.uint8], None, None]:
    stream.thread_type = "SLICE"  # threads by frame would delay frames
    convert = _Converter()
    frames = (convert(frame) for frame in container.decode(stream))
    return _at_least_one(source, frames)


def _file_frames(
    source: Path, container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Generator[NDArray[np.uint8], None, None]:
    """FFmpeg's threads decode, others convert to RGB, and one more feeds them."""
    stream.thread_type = "AUTO"
    threads = min(len(os.sched_getaffinity(0)), MOST_CONVERTERS)
    with ThreadPoolExecutor(threads, "to RGB") as pool:
        convert = _Converter()
        started = (pool.submit(convert, frame) for frame in container.decode(stream))
        with closing(prefetch(started, _ahead(stream, 2 * threads))) as waiting:
            yield from _at_least_one(source, (future.result() for future in waiting))


def _gpu_frames(
    source: Path, codec: Any, container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Generator[Frame, None, None]:
    """The GPU's frames; FFmpeg's where the GPU may not, cannot or no longer can decode the file."""
    done, whole = 0, False
    first = _first_frame(source)
    if has_same_colours(first):
        with closing(gpu_frames(source, codec, _Converter()(first), _ahead(stream, 2 * MOST_CONVERTERS))) as frames:
            try:
                for frame in frames:
                    yield frame
                    done += 1
                whole = done >= max(1, stream.frames)
            except GpuVideoError as error:
                LOGGER.warning("%s: PyNvVideoCodec stops after %d frames (%s); FFmpeg decodes the others", source, done, error)
    if not whole:
        with closing(_file_frames(source, container, stream)) as others:
            yield from islice(others, done, None)


def _first_frame(source: Path) -> av.VideoFrame:
    with _video_stream(source) as (container, stream):
        return next(_at_least_one(source, container.decode(stream)))


def _ahead(stream: av.video.stream.VideoStream, most: int) -> int:
    """How many frames may be decoded ahead."""
    return max(1, min(most, MOST_BYTES // max(1, 3 * stream.width * stream.height)))


def _at_least_one(source: Path | LiveSource, frames: Iterable[_Frame]) -> Generator[_Frame, None, None]:
    empty = True
    for frame in frames:
        empty = False
        yield frame
    if empty:
        raise DarktrtError(f"{source}: has no frames that can be decoded")


class _Converter:
    """Makes RGB arrays of decoded frames, turned upright; each thread has its own converter of FFmpeg, to the same bits."""

    def __init__(self) -> None:
        import av

        self._own = threading.local()
        self._options = {"threads": 1} if int(av.__version__.split(".")[0]) >= THREADED_CONVERTER else {}

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        from av.video.reformatter import VideoReformatter

        if not hasattr(self._own, "reformatter"):
            self._own.reformatter = VideoReformatter()
        pixels = self._own.reformatter.reformat(frame, format="rgb24", **self._options).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def video_length(path: Path) -> int:
    """Number of frames; an estimate from the duration where the file has no count, 0 where it has no duration either."""
    import av

    with _video_stream(path) as (container, stream):
        seconds = Fraction(container.duration or 0, av.time_base)
        return stream.frames or round(seconds * (stream.average_rate or 0))


@contextmanager
def video_writer(path: Path, rate: Fraction) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Yield a function that appends an RGB frame ``(H, W, 3)`` uint8 to an H.264 .mp4, which appears when the block ends well.

    Without an H.264 encoder in PyAV it is MPEG-4 part 2, with a warning. An odd width or height loses its last line.
    """
    import av

    encoder = next(name for name in ENCODERS if _can_encode(name))
    if encoder == "mpeg4":
        LOGGER.warning("%s: this PyAV has no H.264 encoder; writing MPEG-4 part 2, which browsers do not play", path)
    with atomic_output(path) as temporary:
        try:
            with av.open(f"file:{temporary}", "w") as container:
                stream: av.video.stream.VideoStream | None = None

                def write(image: NDArray[np.uint8]) -> None:
                    nonlocal stream
                    even = np.ascontiguousarray(image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2])
                    frame = av.VideoFrame.from_ndarray(even, format="rgb24")
                    stream = stream or _add_stream(container, encoder, rate, frame)
                    container.mux(stream.encode(frame.reformat(stream.width, stream.height)))  # sizes may change

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
    stream.codec_context.colorspace = BT601  # FFmpeg's conversion from RGB; players assume BT.709 for HD without a tag
    return stream


def _can_encode(name: str) -> bool:
    import av

    try:
        av.Codec(name, "w")
    except ValueError:  # UnknownCodecError
        return False
    return True
