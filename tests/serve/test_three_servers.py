"""One client and three real servers of a model: they share the requests, and two that are killed cost nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image
from test_client import SCORE, assert_same, direct, lines, photos, regions_of, save_images
from test_faults import ports
from triton_models import Models, server_of

from darktrt.cli import main
from darktrt.serve.client.client import Client
from darktrt.serve.server import Server, running
from darktrt.vision.files import FileResult

IMAGES = 210
KILLED = (40, 80)
"""After so many images the first server is killed, and the second."""
BACK_AT = 140
"""So many images at the latest are told before the first is up again."""


@pytest.fixture(scope="module")
def trio(alone: Path) -> Iterator[list[Server]]:
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        yield list(pool.map(lambda _: stack.enter_context(server_of(alone)), range(3)))


def urls(servers: list[Server]) -> list[str]:
    """Of both protocols."""
    return [servers[0].grpc, f"http://{servers[1].http}", servers[2].grpc]


def options(servers: list[Server]) -> list[str]:
    return [word for url in urls(servers) for word in ("--server", url)]


def test_the_commands(trio: list[Server], models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path)
    command = ["client", "detect", str(tmp_path), "--json", "--score-threshold", str(SCORE), "--shared-memory", "system"]
    assert main([*command, *options(trio)]) == 0
    found = lines(capsys.readouterr().out)
    assert main(["client", "detect", str(tmp_path), "--json", "--score-threshold", str(SCORE), "--server", trio[0].grpc]) == 0
    alone = lines(capsys.readouterr().out)
    assert [one["file"] for one in found] == [one["file"] for one in alone]
    assert [[box["class"] for box in one["detections"]] for one in found] == [
        [box["class"] for box in one["detections"]] for one in alone
    ]
    assert main(["client", "statistics", "--json", *options(trio)]) == 0
    counts = json.loads(capsys.readouterr().out)
    names = [f"{'' if '://' in url else 'grpc://'}{url}" for url in urls(trio)]
    assert [one["server"] for one in counts] == names
    assert all(one["inferences"] for one in counts)
    assert main(["client", "ping", *options(trio)]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: model 'made' answered noise in" in printed for name in names)


def test_servers_that_cannot_go_together(trio: list[Server], triton: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "info", "--server", trio[0].grpc, "--server", f"grpc://{trio[0].grpc}"]) == 2
    assert f"grpc://{trio[0].grpc}: is named twice; name each server once [--server]" in capsys.readouterr().err
    assert main(["client", "info", "--server", trio[0].grpc, "--server", triton.grpc]) == 2
    assert f"grpc://{triton.grpc}: has the models files, letterbox, made; name one [--model]" in capsys.readouterr().err


def test_load_over_several(trio: list[Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    metrics = [word for one in trio for word in ("--metrics", f"http://{one.metrics}/metrics")]
    command = ["load", *options(trio), "--concurrency", "6", "--seconds", "1", "--processes", "2", "--json", str(file)]
    assert main([*command, *metrics, "--shared-memory", "system"]) == 0
    printed = capsys.readouterr().out
    ((level,),) = (one["levels"] for one in json.loads(file.read_text()))
    assert [one["server"] for one in level["servers"]] == [f"{'' if '://' in url else 'grpc://'}{url}" for url in urls(trio)]
    assert sum(one["infer_per_second"] for one in level["servers"]) == pytest.approx(level["infer_per_second"], abs=0.05)
    assert all(one["latency"]["p50"] > 0 and one["failures"] == 0 for one in level["servers"])
    assert "| 6 | all | " in printed
    assert printed.count("|  | grpc://") == 2
    assert [regions for one in trio for regions in regions_of(one)] == []
    assert main([*command, "--metrics", "http://a:1"]) == 2
    assert "there are 3 servers, and metrics of 1 [--metrics]" in capsys.readouterr().err


def test_two_servers_are_killed_and_one_is_started_again(
    trio: list[Server], alone: Path, models: Models, tmp_path: Path
) -> None:
    """Each image is told once, in order, with the right detections."""
    paths = made_files(tmp_path, IMAGES)
    with ExitStack() as stack, Client(urls(trio), "made", score_threshold=SCORE, shared_memory="system", batch=2) as client:
        found = kill_two(client, trio, alone, paths, stack)
        states = client.servers
    assert [one.path for one in found] == paths
    assert_same([one.detections for one in found], (IMAGES * direct(models.made, photos()))[:IMAGES])
    assert [one.up for one in states] == [True, False, True]
    assert all(one.answered > 10 for one in states)
    assert sum(one.answered for one in states) == IMAGES / 2
    assert client.retries == sum(one.failed for one in states) > 0
    assert [regions for one in trio for regions in regions_of(one)] == []


def made_files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{i:04}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(photos()[i % len(photos())]).save(path)
    return paths


def kill_two(client: Client, servers: list[Server], repository: Path, paths: list[Path], stack: ExitStack) -> list[FileResult]:
    """The results of all images, while the first server is killed and started again, and the second is killed."""
    results = client.detect_files([paths[0].parent])
    found = [next(results) for _ in range(KILLED[0])]
    servers[0].kill()
    restart = threading.Thread(target=lambda: stack.enter_context(running(repository, ports(servers[0]))))
    restart.start()
    found += [next(results) for _ in range(KILLED[1] - KILLED[0])]
    servers[1].kill()
    while restart.is_alive() and len(found) < BACK_AT:
        found.append(next(results))
    restart.join()
    end = time.monotonic() + 10
    while not client.servers[0].up:
        assert time.monotonic() < end
        time.sleep(0.05)
    return [*found, *results]
