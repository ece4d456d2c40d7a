"""Detections in live sources: cameras and network streams."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import host_pixels
from darktrt.errors import DarktrtError
from darktrt.files import check_writable
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.draw import draw
from darktrt.vision.files import FileResult, detect_frames
from darktrt.vision.video import LiveSource, open_video, video_writer

_STREAM_OPTIONS = {"rtsp_transport": "tcp", "timeout": "10000000"}
"""For RTSP: TCP, for lost packets show as grey smears; and a timeout of ten seconds, in microseconds."""


def camera(device: str) -> LiveSource:
    """A camera of this machine by its number or device file: ``0`` is ``/dev/video0``.

    Raises:
        DarktrtError: there is no such camera.
    """
    path = f"/dev/video{device}" if device.isdigit() else device
    if not os.path.exists(path):
        raise DarktrtError(f"{path}: there is no such camera; 'ls /dev/video*' lists those there are")
    return LiveSource(path, "v4l2")


def stream(url: str) -> LiveSource:
    """A network stream, as FFmpeg reads it: ``rtsp://user:password@camera/stream1``, ``http://...``, ``udp://...``.

    Raises:
        DarktrtError: it is no URL.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not rest:
        raise DarktrtError(f"'{url}': is no URL of a stream, such as rtsp://camera/stream1")
    return LiveSource(url, options=_STREAM_OPTIONS if scheme.lower().startswith("rtsp") else {})


class _Newest:
    """The newest frame of a source, which a thread reads; frames that are not fetched in time are lost."""

    def __init__(self, source: LiveSource, stop: threading.Event) -> None:
        self._source, self._stop = source, stop
        self._changed = threading.Condition()
        self._frame: tuple[int, NDArray[np.uint8]] | None = None
        self._rate: Fraction | None = None
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._read, name="frames", daemon=True).start()

    def _read(self) -> None:
        try:
            with open_video(self._source) as (rate, frames):
                self._set(rate=rate)
                for frame in enumerate(frames):
                    if self._ended or self._stop.is_set():
                        return
                    self._set(frame=frame)
        except BaseException as error:  # is raised in the thread that waits for frames
            self._error = error
        finally:
            self.end()

    def _set(self, rate: Fraction | None = None, frame: tuple[int, NDArray[np.uint8]] | None = None) -> None:
        with self._changed:
            self._rate, self._frame = rate or self._rate, frame
            self._changed.notify_all()

    def end(self) -> None:
        """Stop; the thread ends at the next frame."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def rate(self) -> Fraction:
        """Frames a second, as soon as the source is open."""
        with self._changed:
            self._changed.wait_for(lambda: self._rate or self._ended)
            return self._rate or self._fail()

    def frames(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Numbered frames, always the newest; the numbers include lost frames."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._frame or self._ended)
                frame, self._frame = self._frame, None
            if frame is None:
                if self._error:
                    self._fail()
                return
            yield frame

    def _fail(self) -> Fraction:
        raise self._error or DarktrtError(f"{self._source}: ended before it began")


def detect_live(
    detector: NetworkDetector,
    source: LiveSource,
    output: Path | None = None,
    in_flight: int = 1,
    limit: int | None = None,
    stop: threading.Event | None = None,
) -> Generator[FileResult, None, None]:
    """Detect in the frames of a camera or stream until it ends, ``limit`` frames are done, or ``stop`` is set.

    Frames that arrive while ``in_flight`` others are processed are dropped; ``frame`` of a result counts them too. The video
    ``output``, an .mp4 file, repeats the next frame in their place, so that it has the right speed.

    Raises:
        DarktrtError: the source cannot be opened or breaks off, or the output cannot be written.
    """
    if limit is not None and limit < 1:
        raise DarktrtError(f"the limit is {limit} frames; it must be at least 1")
    if output:
        if output.suffix.lower() != ".mp4":
            raise DarktrtError(f"{output}: a live source is written as a video; name an .mp4 file")
        check_writable(output)
    return _detect_live(detector, source, output, in_flight, limit, stop or threading.Event())


def _detect_live(
    detector: NetworkDetector, source: LiveSource, output: Path | None, in_flight: int, limit: int | None, stop: threading.Event
) -> Generator[FileResult, None, None]:
    with ExitStack() as stack:
        newest = _Newest(source, stop)
        stack.callback(newest.end)
        rate = newest.rate()
        write = stack.enter_context(video_writer(output, rate)) if output else None
        frames = islice(newest.frames(), limit)
        last = -1
        for number, image, detections in stack.enter_context(closing(detect_frames(detector, frames, in_flight))):
            if write:
                drawn = draw(host_pixels(image), detections)
                for _ in range(number - last):
                    write(drawn)
            last = number
            yield FileResult(source, detections, number, output)
