"""Cameras and network streams: real RTSP and TCP streams served here, and FFmpeg's test picture for a camera."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_detect import Detector, made_detector, made_info, picture, save_video

from darktrt import DarktrtError
from vision.detect import LiveSource, open_video
from vision.live import camera, detect_live, stream

TEST_PICTURE = LiveSource("testsrc=size=160x120:rate=30,realtime", "lavfi")
"""Endless, 30 frames a second."""


def transport_stream(folder: Path, frames: int) -> bytes:
    """An MPEG transport stream with a blue rectangle."""
    path = folder / "a.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        video = container.add_stream("libx264", rate=25, options={"tune": "zerolatency", "g": "5"})
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        for i in range(frames):
            image = picture((10 + i, 30, 60 + i, 90), 2, (120, 160))
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
    return path.read_bytes()


class RtspServer:
    """As little of RTSP as FFmpeg needs: one stream, packets in the control connection."""

    PACKET = 7 * 188

    def __init__(self, content: bytes, seconds: float) -> None:
        self.content, self.seconds = content, seconds
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"rtsp://user:secret@127.0.0.1:{self.listener.getsockname()[1]}/stream1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        reader = connection.makefile("rb")
        while request := reader.readline().decode().strip():
            method = request.split()[0]
            self.asked.append(method)
            headers = dict(line.split(": ", 1) for line in iter(lambda: reader.readline().decode().strip(), ""))
            connection.sendall(self.answer(method, headers).encode())
            if method == "PLAY":
                self.play(connection)
                return

    def answer(self, method: str, headers: dict[str, str]) -> str:
        description = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=made\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track1\r\n"
        extra = {
            "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
            "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(description)}\r\n",
            "SETUP": f"Session: 1\r\nTransport: {headers.get('Transport', '')}\r\n",
        }.get(method, "Session: 1\r\n")
        return f"RTSP/1.0 200 OK\r\nCSeq: {headers['CSeq']}\r\n{extra}\r\n{description if method == 'DESCRIBE' else ''}"

    def play(self, connection: socket.socket) -> None:
        packets = [self.content[i : i + self.PACKET] for i in range(0, len(self.content), self.PACKET)]
        for number, packet in enumerate(packets):
            rtp = struct.pack(">BBHII", 0x80, 33, number, number * 900, 1) + packet
            connection.sendall(struct.pack(">cBH", b"$", 0, len(rtp)) + rtp)
            time.sleep(self.seconds / len(packets))
        connection.close()


class TcpServer:
    def __init__(self, content: bytes) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=lambda: listener.accept()[0].sendall(content), daemon=True).start()


def test_an_rtsp_stream(tmp_path: Path) -> None:
    server = RtspServer(transport_stream(tmp_path, 40), seconds=1)
    results = list(detect_live(made_detector(), stream(server.url), tmp_path / "out.mp4"))
    assert server.asked[:4] == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"]
    numbers = [one.frame for one in results]
    assert len(numbers) > 5
    assert numbers == sorted(set(numbers))
    assert [one.detections.names for one in results[:5]] == [["blue"]] * 5
    said = results[0].to_dict()["file"]
    assert said == server.url.replace("user:secret@", "")
    with open_video(tmp_path / "out.mp4") as (_, frames):
        assert len(list(frames)) == numbers[-1] + 1, "missed frames are made up for"


def test_a_stream_that_stops_is_the_end(tmp_path: Path) -> None:
    server = TcpServer(transport_stream(tmp_path, 12))
    assert list(detect_live(made_detector(), stream(server.url)))[-1].frame is not None


def slow_detector(seconds: float) -> Detector:
    fast = made_detector()

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        return fast.run(inputs)

    return Detector(run, made_info(batch=(1, 1, 1)))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_who_is_slow_misses_frames_and_does_not_fall_behind(tmp_path: Path, in_flight: int) -> None:
    found = detect_live(slow_detector(0.1), TEST_PICTURE, tmp_path / "out.mp4", in_flight, limit=5)
    numbers = [one.frame or 0 for one in found]
    assert len(numbers) == 5
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 6 / in_flight
    with open_video(tmp_path / "out.mp4") as (rate, frames):
        assert rate == Fraction(30)
        assert len(list(frames)) == numbers[-1] + 1


def test_it_stops_when_told(tmp_path: Path) -> None:
    stop = threading.Event()
    results: Iterator[object] = detect_live(slow_detector(0.01), TEST_PICTURE, tmp_path / "out.mp4", stop=stop)
    next(results)
    threading.Timer(0.5, stop.set).start()
    assert len(list(results)) > 2
    assert (tmp_path / "out.mp4").is_file()


def test_who_stops_listening_leaves_nothing(tmp_path: Path) -> None:
    results = detect_live(slow_detector(0.01), TEST_PICTURE, tmp_path / "out.mp4")
    next(results)
    results.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda folder: camera("97"), "/dev/video97: there is no such camera"),
        (lambda folder: camera("/dev/none"), "/dev/none: there is no such camera"),
        (lambda folder: stream("camera/stream"), "is no URL of a stream"),
        (lambda folder: stream("rtsp://"), "is no URL of a stream"),
        (lambda folder: list(detect_live(made_detector(), stream("rtsp://a:b@127.0.0.1:9/x"))), "rtsp://127.0.0.1:9/x: cannot"),
        (lambda folder: detect_live(made_detector(), TEST_PICTURE, folder / "a.avi"), "name an .mp4 file"),
        (lambda folder: detect_live(made_detector(), TEST_PICTURE, folder / "none" / "a.mp4"), "does the folder exist"),
        (lambda folder: list(detect_live(made_detector(), camera(str(save_video(folder / "v.mp4"))))), "v.mp4: cannot be read"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, act: object, said: str) -> None:
    with pytest.raises(DarktrtError, match=said) as caught:
        act(tmp_path)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert "a:b" not in str(caught.value)
