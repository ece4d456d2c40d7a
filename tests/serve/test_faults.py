"""What goes wrong between client and server: a server that dies on the way, a client that does, and many requests at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_client import SCORE, assert_same, direct, photos, regions_of, save_images, url
from triton_models import Models, server_of

from darktrt.errors import DarktrtError
from darktrt.serve.client.client import Client
from darktrt.serve.server import Server, StartOptions, running
from darktrt.vision.boxes import Detections

WARM_UP, MIXED_REQUESTS, CONCURRENCY = 300, 600, 16
GROWTH = 0.05


def ports(server: Server) -> StartOptions:
    """To start another one in its place."""
    numbers = [int(one.rpartition(":")[2]) for one in (server.http, server.grpc, server.metrics)]
    return StartOptions(http_port=numbers[0], grpc_port=numbers[1], metrics_port=numbers[2], shared_memory=True)


def test_a_server_that_is_killed_and_started_anew_costs_nothing(models: Models, alone: Path, tmp_path: Path) -> None:
    """Clients of both protocols, with shared memory and without, finish the folder: every image once, in order, with the right
    detections."""
    paths = [tmp_path / f"{i:03}.png" for i in range(60)]
    for path in paths:
        Image.fromarray(photos()[int(path.stem) % 7]).save(path)
    with server_of(alone) as first, ExitStack() as stack:
        clients = {
            f"{protocol}, {memory}": Client(url(first, protocol), "made", score_threshold=SCORE, shared_memory=memory)
            for protocol in ("grpc", "http")
            for memory in ("none", "system")
        }
        results = {name: client.detect_files([tmp_path], tmp_path / name) for name, client in clients.items()}
        found = {name: list(islice(results[name], 10)) for name in clients}
        restart = threading.Timer(1, lambda: stack.enter_context(running(alone, ports(first))))
        first.kill()
        restart.start()
        with ThreadPoolExecutor() as pool:
            rest = dict(zip(clients, pool.map(list, results.values()), strict=True))
        restart.join()
        for name, client in clients.items():
            client.close()
            assert client.retries > 0, name
    expected = (9 * direct(models.made, photos()))[:60]
    for name in clients:
        told = [*found[name], *rest[name]]
        assert [one.path for one in told] == paths, name
        assert_same([one.detections for one in told], expected)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [path.name for path in paths]
    assert regions_of(first) == []


def test_a_server_that_is_stopped_in_order_and_started_anew_costs_nothing(models: Models, alone: Path, tmp_path: Path) -> None:
    """While it stops it answers that it has no such model, because it unloads the models before it closes its ports."""
    paths = save_images(tmp_path)
    with server_of(alone) as first, ExitStack() as stack:

        def restart() -> None:
            first.stop()
            stack.enter_context(running(alone, ports(first)))

        with Client(first.grpc, "made", score_threshold=SCORE, shared_memory="system", retry_seconds=120) as client:
            found = client.detect_all(paths)
            restarting = threading.Thread(target=restart)
            restarting.start()
            while restarting.is_alive() or not client.retries:
                found = client.detect_all(paths)
                assert len(found) == len(paths)
            restarting.join()
            found = client.detect_all(paths)
    assert_same(found, direct(models.made, photos()))


def test_memory_that_another_client_takes_away_costs_nothing(triton: Server, models: Models) -> None:
    """Triton lets each client list and release the regions of all."""
    import tritonclient.http
    import tritonclient.utils

    other, done, released = tritonclient.http.InferenceServerClient(triton.http), threading.Event(), 0
    with Client(triton.grpc, "made", score_threshold=SCORE, shared_memory="system") as client:

        def release() -> None:
            nonlocal released
            while not done.is_set():
                with suppress(tritonclient.utils.InferenceServerException):  # of regions in use
                    other.unregister_system_shared_memory()
                    released += 1

        thief = threading.Thread(target=release)
        thief.start()
        try:
            found = [client.detect_all(photos()) for _ in range(6)]
        finally:
            done.set()
            thief.join()
    assert released > 2
    for each in found:
        assert_same(each, direct(models.made, photos()))
    assert regions_of(triton) == []


def test_a_server_that_stays_away_is_reported(alone: Path, tmp_path: Path) -> None:
    save_images(tmp_path / "in")
    with server_of(alone) as server, Client(server.grpc, "made", retry_seconds=1) as client:
        client.detect(photos()[0])
        server.kill()
        started = time.monotonic()
        with pytest.raises(DarktrtError, match="cannot be reached"):
            list(client.detect_files([tmp_path / "in"], tmp_path / "out"))
        assert time.monotonic() - started < 5
    assert not (tmp_path / "out").exists()


HOLDER = """
import sys, time
from darktrt.serve.client.client import Client
client = Client(sys.argv[1], "made", shared_memory="system", in_flight=3)
client.run({"images": __import__("numpy").zeros((1, 64, 96, 3), "uint8")})
print("holding", flush=True)
time.sleep(600)
"""


def holder(server: Server) -> subprocess.Popen[str]:
    """A client in a process of its own that holds three regions."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, server.grpc], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "holding\n"
    return process


def registered(server: Server) -> set[str]:
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(server.http)
    return {region["name"] for region in client.get_system_shared_memory_status()}


def test_regions_of_a_killed_client_are_freed_by_the_next_start_and_no_others(triton: Server) -> None:
    import tritonclient.http
    from tritonclient.utils import shared_memory

    dead, living = holder(triton), holder(triton)
    stranger = shared_memory.create_shared_memory_region("theirs", "/theirs", 64)
    tritonclient.http.InferenceServerClient(triton.http).register_system_shared_memory("theirs", "/theirs", 64)
    try:
        held = set(regions_of(triton))
        assert len(held) == 6
        assert registered(triton) == held | {"theirs"}
        dead.kill()
        dead.wait()
        assert registered(triton) == held | {"theirs"}
        with Client(triton.grpc, "made", shared_memory="system", in_flight=1):
            now = registered(triton)
            assert len(now & held) == 3, "those of the living client"
            assert len(now) == 5, "and the new one, and the stranger's"
        assert registered(triton) == (now & held) | {"theirs"}
        assert set(regions_of(triton)) == now & held
        living.send_signal(signal.SIGKILL)
        living.wait()
        with Client(f"http://{triton.http}", "made", shared_memory="system"):  # by another way to the same server
            pass
        assert registered(triton) == {"theirs"}
        assert regions_of(triton) == []
    finally:
        for process in (dead, living):
            process.kill()
            process.wait()
        tritonclient.http.InferenceServerClient(triton.http).unregister_system_shared_memory("theirs")
        shared_memory.destroy_shared_memory_region(stranger)


def test_regions_of_a_server_that_was_started_anew_are_freed(alone: Path) -> None:
    with server_of(alone) as first:
        process = holder(first)
        process.kill()
        process.wait()
        assert len(regions_of(first)) == 3
        first.kill()
        with running(alone, ports(first)) as again, Client(again.grpc, "made", shared_memory="system", in_flight=1):
            assert len(regions_of(first)) == 1
    assert regions_of(first) == []


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("memory", ["none", "system"])
def test_who_gives_up_on_the_way_does_not_hurt_the_server(triton: Server, models: Models, protocol: str, memory: Any) -> None:
    """Not even by taking memory away that the server is about to write into."""
    url = triton.grpc if protocol == "grpc" else f"http://{triton.http}"
    images = {"images": np.zeros((3, 64, 96, 3), np.uint8)}
    given_up = 0
    for _ in range(5):
        client = Client(url, "made", batch=3, in_flight=CONCURRENCY, shared_memory=memory)
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            futures = [pool.submit(client.run, images) for _ in range(CONCURRENCY)]
            futures[0].result()
            client.close()
        given_up += sum(future.exception() is not None for future in futures)
    assert given_up > CONCURRENCY
    with Client(url, "made", score_threshold=SCORE) as client:
        assert_same(client.detect_all(photos()), direct(models.made, photos()))
    assert regions_of(triton) == []


# Many requests


def resident(process_id: int) -> int:
    """Bytes of memory of a process and its children; shared pages once a process."""
    pages = sum(_resident_pages(one) for one in [process_id, *children(process_id)])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _resident_pages(process_id: int) -> int:
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1])


def children(process_id: int) -> list[int]:
    found = [int(one) for task in Path(f"/proc/{process_id}/task").iterdir() for one in (task / "children").read_text().split()]
    return found + [further for one in found for further in children(one)]


class Mix:
    """Requests of all kinds in an order that a seed makes; each knows what must come of it."""

    def __init__(self, server: Server, models: Models) -> None:
        urls = (server.grpc, f"http://{server.http}")
        kinds: list[tuple[str, Any]] = [("made", "none"), ("made", "system"), ("files", "none"), ("letterbox", "none")]
        self.clients = [
            Client(url, model, score_threshold=SCORE, in_flight=CONCURRENCY, shared_memory=memory, batch=2)
            for url in urls
            for model, memory in kinds
        ]
        self.images = photos()
        self.expected = {
            name: direct(path, self.images) for name, path in (("made", models.made), ("letterbox", models.letterbox))
        }
        self.expected["files"] = self.expected["made"]
        self.wrong: list[str] = []
        self.refused = 0
        self._lock = threading.Lock()

    def ask(self, number: int) -> None:
        random = np.random.default_rng(number)
        client = self.clients[random.integers(len(self.clients))]
        if random.integers(10) == 0:
            self.ask_nonsense(client)
            return
        which = random.integers(0, len(self.images), random.integers(1, 4))
        found = client.detect_all([self.images[i] for i in which])
        self.check(number, found, [self.expected[client.model.name][i] for i in which])

    def check(self, number: int, found: list[Detections], expected: list[Detections]) -> None:
        try:
            assert_same([*found, *self.expected["made"]], [*expected, *self.expected["made"]])
        except AssertionError as error:
            with self._lock:
                self.wrong.append(f"request {number}: {error}")

    def ask_nonsense(self, client: Client) -> None:
        bad = np.array([[b"no image"]], object) if client.model.encoded else np.zeros((1, 7, 9, 3), np.uint8)
        try:
            client.run({"image" if client.model.encoded else "images": bad})
        except DarktrtError:
            with self._lock:
                self.refused += 1
        else:
            self.wrong.append("nonsense was answered")

    def close(self) -> None:
        for client in self.clients:
            client.close()


def test_600_mixed_requests_at_concurrency_16(models: Models) -> None:
    """No answer is wrong, nothing grows: neither the server with its helpers, nor the client."""
    with server_of(models.repository) as server:
        mix = Mix(server, models)
        try:
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                list(pool.map(mix.ask, range(WARM_UP)))
                before = {"server": resident(server.process.pid), "client": _resident_pages(os.getpid())}
                refused = mix.refused
                list(pool.map(mix.ask, range(WARM_UP, WARM_UP + MIXED_REQUESTS)))
                after = {"server": resident(server.process.pid), "client": _resident_pages(os.getpid())}
        finally:
            mix.close()
    growth = {name: after[name] / before[name] - 1 for name in before}
    print(f"refused {mix.refused - refused}, growth {growth}")
    assert mix.wrong == []
    assert 35 < mix.refused - refused < 90
    assert max(growth.values()) < GROWTH, growth
    assert regions_of(server) == []
