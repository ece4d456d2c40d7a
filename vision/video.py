"""Videos and live sources through FFmpeg: frames in, H.264 files out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output
from darktrt.progress import LOGGER

if TYPE_CHECKING:
    import av.container
    import av.video.stream

ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "libopenh264": {"b": "8M"}, "mpeg4": {"b": "8M"}}
"""Video encoders by preference, each with options for good quality; the first two write H.264."""

BT601 = 6
"""FFmpeg's number for SMPTE 170M."""


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
    """Open a video: its frames a second, and its frames in order, ``(H, W, 3)`` uint8 RGB, turned upright.

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
    stream.thread_type = "AUTO" if isinstance(source, Path) else "SLICE"  # threads by frame would delay frames
    for frame in container.decode(stream):
        empty = False
        yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
    if empty:
        raise DarktrtError(f"{source}: has no frames that can be decoded")


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
