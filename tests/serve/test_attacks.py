"""What a real server, watched as ``serve start`` watches it, does about requests and clients that mean it harm."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_faults import children
from triton_models import Models, ask, post, server_of

from darktrt.errors import DarktrtError
from darktrt.serve.access import is_mended
from darktrt.serve.client.client import Client
from darktrt.serve.server import Server, StartOptions
from darktrt.serve.supervisor import supervise

grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")

SILENT_SECONDS = 8.0


@pytest.fixture(scope="module")
def watched(models: Models) -> Iterator[Server]:
    """A server whose clients may not register shared memory."""
    with server_of(models.repository, StartOptions()) as server, supervised(server):
        yield server


@contextmanager
def supervised(server: Server) -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=supervise, args=(server, SILENT_SECONDS, done))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def serves_again(server: Server, before: int) -> bool:
    """Whether another process than ``before`` answers inferences of all models within a minute and a half."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            if server.process.pid != before:
                ask(server, "made", images=np.zeros((1, 64, 96, 3), np.uint8))
                return True
        except grpc.InferenceServerException:
            pass
        time.sleep(0.1)
    return False


def large_shape(server: Server) -> None:
    if is_mended(server.version()):
        pytest.skip(f"Triton {server.version()} withstands it")
    tensor = {"name": "images", "shape": [1 << 52, 64, 96, 3], "datatype": "UINT8", "data": []}
    with pytest.raises(OSError, match=r"closed|reset"):
        post(server, "models/made/infer", json.dumps({"inputs": [tensor]}).encode(), content_type="application/octet-stream")


def backends(server: Server) -> list[int]:
    """The processes of the Python backend."""
    found = children(server.process.pid)
    return [one for one in found if b"python_backend_stub" in Path(f"/proc/{one}/cmdline").read_bytes()]


def end_a_backend(server: Server) -> None:
    """As the system does it where memory runs out; the server stays ready."""
    for process in backends(server):
        os.kill(process, signal.SIGKILL)
    time.sleep(1)
    assert server.ready()


def halt_a_backend(server: Server) -> None:
    """It answers nothing any more; the server stays ready."""
    for process in backends(server):
        os.kill(process, signal.SIGSTOP)
    assert server.ready()


@pytest.mark.parametrize("harm", [large_shape, end_a_backend, halt_a_backend])
def test_a_server_that_is_harmed_serves_again(watched: Server, harm: Callable[[Server], None]) -> None:
    """The first harm ends this version of Triton by one request."""
    before, helpers = watched.process.pid, backends(watched)
    assert len(helpers) == 3
    harm(watched)
    assert serves_again(watched, before)
    assert not [one for one in helpers if Path(f"/proc/{one}").exists()], "a backend outlived its server"


def test_a_server_that_nobody_asks_stays(watched: Server) -> None:
    """It is asked by the watch itself, and counts as well as long as that is answered."""
    process, asked = watched.process, inferences(watched)
    time.sleep(SILENT_SECONDS + 2)
    assert watched.process is process and process.poll() is None
    assert inferences(watched) >= asked + 3, "of each model once and more"


def inferences(server: Server) -> int:
    return sum(int(model["inference_count"]) for model in json.loads(server.get("v2/models/stats"))["model_stats"])


def test_clients_change_nothing_that_others_see(watched: Server) -> None:
    """Neither the log, nor tracing, nor shared memory; by neither protocol, nor with the header that would open them."""
    settings = [
        ("logging", b'{"log_verbose_level": 1}'),
        ("trace/setting", b'{"trace_level": ["TENSORS"]}'),
        ("systemsharedmemory/region/a/register", b'{"key": "/a", "offset": 0, "byte_size": 8}'),
        ("systemsharedmemory/unregister", b""),
        ("cudasharedmemory/unregister", b""),
    ]
    for path, body in settings:
        for headers in ({}, {"closed": "nobody"}, {"closed:": "nobody"}):
            status, answer = post_with(watched, path, body, headers)
            assert status == 403 and b"is restricted" in answer, (path, headers)
    with grpc.InferenceServerClient(watched.grpc) as client:
        calls: list[Callable[[], object]] = [
            lambda: client.update_log_settings({"log_verbose_level": 1}),
            lambda: client.update_trace_settings(settings={"trace_level": ["TENSORS"]}),
            lambda: client.register_system_shared_memory("a", "/a", 8),
            client.unregister_system_shared_memory,
            client.unregister_cuda_shared_memory,
        ]
        for call in calls:
            with pytest.raises(grpc.InferenceServerException, match="is restricted"):
                call()


def post_with(server: Server, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """As :func:`post`, with headers that urllib would not send."""
    import socket

    host, port = server.http.split(":")
    lines = [f"POST /v2/{path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = connection.recv(1 << 16)
    return int(answer.split()[1]), answer


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_client_is_told_where_shared_memory_is_closed(watched: Server, protocol: str) -> None:
    """At once, and not after the time for a server that is away."""
    url = watched.grpc if protocol == "grpc" else f"http://{watched.http}"
    began = time.monotonic()
    with pytest.raises(DarktrtError, match=r"is restricted.*; shared memory needs 'darktrt serve start --shared-memory'"):
        Client(url, "made", shared_memory="system", retry_seconds=30)
    assert time.monotonic() - began < 10


def test_the_memory_of_a_model_cannot_be_named(triton: Server) -> None:
    """Where clients may register shared memory, they would write into it in this version, and other users could read it."""
    named = list(Path("/dev/shm").glob(f"*darktrt_*_{triton.http.rpartition(':')[2]}_*"))
    assert all(path.stat().st_mode & 0o077 == 0 for path in named)
    assert not named or is_mended(triton.version())
    assert ask(triton, "made", images=np.zeros((3, 64, 96, 3), np.uint8))["num_detections"].shape == (3, 1)
