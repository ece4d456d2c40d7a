"""Network streams of a local server: as little of RTSP and TCP as FFmpeg needs."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import av
import numpy as np


def transport_stream(folder: Path, images: Iterable[np.ndarray]) -> bytes:
    """An MPEG transport stream of images of 160 x 120."""
    path = folder / "a.ts"
    with av.open(str(path), "w", format="mpegts") as container:
        video = container.add_stream("libx264", rate=25, options={"tune": "zerolatency", "g": "5"})
        video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
        for image in images:
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
                with suppress(ConnectionError):  # who watched has seen enough
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
