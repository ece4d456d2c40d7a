"""Cameras and network streams: real RTSP and TCP streams of a local server, and FFmpeg's test image for a camera."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from streams import RtspServer, TcpServer, transport_stream
from test_detect import NetworkDetector, made_detector, made_info, photo, save_video

from darktrt.errors import DarktrtError
from darktrt.vision.live import camera, detect_live, stream
from darktrt.vision.video import LiveSource, open_video

TEST_IMAGE = LiveSource("testsrc=size=160x120:rate=30,realtime", "lavfi")
"""Endless, 30 frames a second."""


def blue(frames: int) -> Iterator[np.ndarray]:
    """A blue rectangle that moves."""
    return (photo((10 + i, 30, 60 + i, 90), 2, (120, 160)) for i in range(frames))


def test_an_rtsp_stream(tmp_path: Path) -> None:
    server = RtspServer(transport_stream(tmp_path, blue(40)), seconds=1)
    results = list(detect_live(made_detector(), stream(server.url), tmp_path / "out.mp4"))
    assert server.asked[:4] == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"]
    numbers = [one.frame for one in results]
    assert len(numbers) > 5
    assert numbers == sorted(set(numbers))
    assert [one.detections.names for one in results[:5]] == [["blue"]] * 5
    message = results[0].to_dict()["file"]
    assert message == server.url.replace("user:secret@", "")
    with open_video(tmp_path / "out.mp4") as (_, frames):
        assert len(list(frames)) == numbers[-1] + 1, "missed frames are made up for"


def test_a_stream_that_stops_is_the_end(tmp_path: Path) -> None:
    server = TcpServer(transport_stream(tmp_path, blue(12)))
    assert list(detect_live(made_detector(), stream(server.url)))[-1].frame is not None


def slow_detector(seconds: float) -> NetworkDetector:
    fast = made_detector()

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        return fast.run(inputs)

    return NetworkDetector(run, made_info(batch=(1, 1, 1)))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_slow_detector_drops_frames_and_does_not_lag(tmp_path: Path, in_flight: int) -> None:
    found = detect_live(slow_detector(0.1), TEST_IMAGE, tmp_path / "out.mp4", in_flight, limit=5)
    numbers = [one.frame or 0 for one in found]
    assert len(numbers) == 5
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 6 / in_flight
    with open_video(tmp_path / "out.mp4") as (rate, frames):
        assert rate == Fraction(30)
        assert len(list(frames)) == numbers[-1] + 1


def test_it_stops_when_the_event_is_set(tmp_path: Path) -> None:
    stop = threading.Event()
    results: Iterator[object] = detect_live(slow_detector(0.01), TEST_IMAGE, tmp_path / "out.mp4", stop=stop)
    next(results)
    threading.Timer(0.5, stop.set).start()
    assert len(list(results)) > 2
    assert (tmp_path / "out.mp4").is_file()


def test_closing_early_leaves_nothing(tmp_path: Path) -> None:
    results = detect_live(slow_detector(0.01), TEST_IMAGE, tmp_path / "out.mp4")
    next(results)
    results.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda folder: camera("97"), "/dev/video97: there is no such camera"),
        (lambda folder: camera("/dev/none"), "/dev/none: there is no such camera"),
        (lambda folder: stream("camera/stream"), "is no URL of a stream"),
        (lambda folder: stream("rtsp://"), "is no URL of a stream"),
        (lambda folder: list(detect_live(made_detector(), stream("rtsp://a:b@127.0.0.1:9/x"))), "rtsp://127.0.0.1:9/x: cannot"),
        (lambda folder: detect_live(made_detector(), TEST_IMAGE, limit=0), "the limit is 0 frames"),
        (lambda folder: detect_live(made_detector(), TEST_IMAGE, folder / "a.avi"), "name an .mp4 file"),
        (lambda folder: detect_live(made_detector(), TEST_IMAGE, folder / "none" / "a.mp4"), "does the folder exist"),
        (lambda folder: list(detect_live(made_detector(), camera(str(save_video(folder / "v.mp4"))))), "v.mp4: cannot be read"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(tmp_path: Path, act: object, message: str) -> None:
    with pytest.raises(DarktrtError, match=message) as caught:
        act(tmp_path)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert "a:b" not in str(caught.value)
