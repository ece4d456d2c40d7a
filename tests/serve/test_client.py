"""The client against a real server: the same detections as without one, over every protocol and kind of memory."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import MAP_TOLERANCE, ROOT, made_image, measured_accuracy
from PIL import Image
from streams import RtspServer, transport_stream
from test_docs import blocks, commands, copy_images, page, run_here
from triton_models import Models

from darktrt.check.ground_truth import GroundTruth, LabelledImage, LabelledObject
from darktrt.cli import main
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.serve.client.client import Client, triton_run
from darktrt.serve.client.shared_memory import FOLDER, prefix_of
from darktrt.serve.client.statistics import ModelStatistics
from darktrt.serve.client.transport import Endpoint
from darktrt.serve.server import Server
from darktrt.vision.boxes import Detections
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.sources import IMAGE_SUFFIXES
from darktrt.vision.video import open_video, video_writer

SCORE = 0.08
"""What the made network, whose weights are random, finds a fair number of boxes with."""
SIZES = [(64, 96), (120, 50), (33, 200), (64, 96), (90, 90), (50, 120), (61, 77)]


def photos() -> list[np.ndarray]:
    return [made_image(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


def save_images(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(SIZES))]
    for path, image in zip(paths, photos(), strict=True):
        Image.fromarray(image).save(path)
    return paths


def direct(model: Path, images: Sequence[np.ndarray], score: float = SCORE) -> list[Detections]:
    with OnnxRunner(model) as runner:
        return NetworkDetector(runner.run, runner.info, score).detect(images)


def assert_same(found: Sequence[Detections], expected: Sequence[Detections]) -> None:
    """The server has its own ONNX Runtime, maybe of another version, so sums may be rounded otherwise."""
    assert sum(map(len, expected)) >= 10
    for one, other in zip(found, expected, strict=True):
        assert one.class_ids.tolist() == other.class_ids.tolist()
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def url(triton: Server, protocol: str) -> str:
    return triton.grpc if protocol == "grpc" else f"http://{triton.http}"


def regions_of(server: Server) -> list[str]:
    """Those that clients of this server have on this machine."""
    prefixes = [prefix_of(Endpoint.parse(url(server, protocol))) for protocol in ("grpc", "http")]
    return sorted(path.name for prefix in prefixes for path in FOLDER.glob(f"{prefix}*"))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("memory", ["none", "system"])
@pytest.mark.parametrize("model", ["made", "files", "letterbox"])
def test_detections_are_those_without_a_server(
    triton: Server, models: Models, protocol: str, memory: Any, model: str, tmp_path: Path
) -> None:
    with Client(url(triton, protocol), model, score_threshold=SCORE, shared_memory=memory, batch=2) as client:
        found = client.detect_all(photos())
        paths = save_images(tmp_path)
        assert_same(client.detect_all(paths), found)
        one = client.detect(paths[2])
    assert_same(found, direct(models.letterbox if model == "letterbox" else models.made, photos()))
    assert_same([one] * 10, [found[2]] * 10)
    assert regions_of(triton) == []


def test_thresholds_go_with_every_request(triton: Server, models: Models) -> None:
    """Requests of two clients are batched together in the server, each by its own thresholds."""
    found: dict[float, list[Detections]] = {}

    def ask(score: float) -> None:
        with Client(triton.grpc, "made", score_threshold=score, in_flight=8) as client:
            found[score] = [client.detect(image) for _ in range(5) for image in photos()]

    threads = [threading.Thread(target=ask, args=(score,)) for score in (0.07, 0.1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for score, detections in found.items():
        assert_same(detections, 5 * direct(models.made, photos(), score))
    assert sum(map(len, found[0.07])) > sum(map(len, found[0.1]))


def test_names_sizes_and_batches_come_from_the_server(triton: Server) -> None:
    with Client(triton.grpc, "made", batch=3) as client:
        assert (client.info.width, client.info.height) == (96, 64)
        assert client.info.batch == (1, 3, 3)
        assert len(client.info.class_names) == 3
        assert not client.model.encoded
    with Client(triton.grpc, "files") as client:
        assert client.model.encoded


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_statistics_count_what_was_asked(triton: Server, protocol: str) -> None:
    with Client(url(triton, protocol), "made", batch=2) as client:
        (before,) = client.statistics()
        client.detect_all(photos())
        change = counted_since(before, client, 4)
    assert (change.inferences, change.success.count, change.fail.count) == (7, 4, 0)
    assert change.compute_infer.mean_ms > 0
    assert 1 <= change.mean_batch <= 3


def counted_since(before: ModelStatistics, client: Client, requests: int, seconds: float = 10) -> ModelStatistics:
    """The counts of so many requests, which Triton may update a moment after its answers."""
    end = time.monotonic() + seconds
    while True:
        (after,) = client.statistics()
        change = after - before
        if change.success.count >= requests or time.monotonic() > end:
            return change
        time.sleep(0.05)


def labelled(folder: Path, model: Path) -> GroundTruth:
    """Made images, labelled with some of what the network finds in them, a little off: an AP neither 0 nor 1."""
    names = tuple("abc")
    random = np.random.default_rng(0)
    labelled_images = []
    for path, found in zip(save_images(folder), direct(model, photos(), 0.05), strict=True):
        best = found.select(slice(0, 12))
        corners = best.boxes + random.normal(0, 1.5, best.boxes.shape)
        objects = []
        for box, class_id in zip(corners, best.class_ids, strict=True):
            x, y, width, height = box[0], box[1], max(box[2] - box[0], 1), max(box[3] - box[1], 1)
            objects.append(LabelledObject(int(class_id), (x, y, width, height), float(width * height), False))
        labelled_images.append(LabelledImage(path, None, tuple(objects)))
    return GroundTruth("made", names, tuple(labelled_images))


@pytest.mark.parametrize("memory", ["none", "system"])
def test_map_through_triton_is_that_without(triton: Server, models: Models, tmp_path: Path, memory: str) -> None:
    truth = labelled(tmp_path, models.made)
    with OnnxRunner(models.made) as runner:
        expected = measured_accuracy(runner.run, runner.info, truth)
    with triton_run(triton.grpc, "made", shared_memory=memory) as (run, info):
        found = measured_accuracy(run, info, truth)
    assert 0.05 < expected.ap < 0.95
    assert abs(found.ap - expected.ap) < MAP_TOLERANCE
    assert abs(found.ap50 - expected.ap50) < MAP_TOLERANCE


def test_a_model_of_files_is_none_to_evaluate(triton: Server) -> None:
    with pytest.raises(DarktrtError, match="accepts image files"), triton_run(triton.grpc, "files"):
        pass


# The command


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("model", ["made", "files"])
def test_a_folder_is_drawn_and_printed_as_by_detect(
    triton: Server, models: Models, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "in")
    options = ["--score-threshold", str(SCORE), "--json"]
    command = ["client", "detect", str(tmp_path / "in"), "--server", triton.grpc, "--model", model, *options]
    assert main([*command, "-o", str(tmp_path / "a"), "--batch", "2"]) == 0
    through = lines(capsys.readouterr().out)
    assert main(["detect", str(tmp_path / "in"), "--model", str(models.made), "-o", str(tmp_path / "b"), *options]) == 0
    direct_lines = lines(capsys.readouterr().out)
    assert [one["file"] for one in through] == [one["file"] for one in direct_lines]
    for one, other in zip(through, direct_lines, strict=True):
        assert [found["class"] for found in one["detections"]] == [found["class"] for found in other["detections"]]
        drawn = [np.asarray(Image.open(tmp_path / folder / Path(one["file"]).name)).astype(int) for folder in "ab"]
        assert drawn[0].shape == drawn[1].shape
        assert np.mean(np.abs(drawn[0] - drawn[1]) > 8) < 0.01


def test_a_video(triton: Server, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [made_image(80, 120, seed) for seed in range(9)]
    with video_writer(tmp_path / "in.mp4", 10) as write:  # type: ignore[arg-type]
        for frame in frames:
            write(frame)
    command = ["client", "detect", str(tmp_path / "in.mp4"), "--server", f"http://{triton.http}", "--model", "made", "--json"]
    assert main([*command, "-o", str(tmp_path / "out.mp4"), "--batch", "2"]) == 0
    assert [one["frame"] for one in lines(capsys.readouterr().out)] == list(range(9))
    assert (tmp_path / "out.mp4").stat().st_size > 1000


def test_a_stream_until_ctrl_c_keeps_the_video(triton: Server, tmp_path: Path) -> None:
    stream = RtspServer(transport_stream(tmp_path, [made_image(120, 160, seed) for seed in range(200)]), seconds=60)
    command = ["client", "detect", stream.url, "--server", triton.grpc, "--model", "made", "--json", "-o", "out.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "darktrt", *command], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    seen = [json.loads(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGINT)
    seen += lines(process.stdout.read())
    assert process.wait() == 0
    assert seen[0]["file"].startswith("rtsp://127.0.0.1:")
    with open_video(tmp_path / "out.mp4") as (_, frames):
        assert len(list(frames)) == seen[-1]["frame"] + 1


def test_ping_info_and_statistics(triton: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server = ["--server", triton.grpc, "--model", "made"]
    assert main(["client", "ping", *server, "--batch", "3"]) == 0
    printed = capsys.readouterr().out
    assert "answered noise in" in printed
    assert "3 a request" in printed
    assert main(["client", "info", *server]) == 0
    assert "made: made, 96x64, 3 classes" in capsys.readouterr().out
    assert main(["client", "info", *server, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["inputs"][0] == {"name": "images", "type": "uint8", "dims": [64, 96, 3]}
    assert info["detector"]["width"] == 96
    assert main(["client", "statistics", *server]) == 0
    assert "compute_infer" in capsys.readouterr().out


def test_the_guides_commands(triton: Server, tmp_path: Path) -> None:
    """As they stand there, but that load is measured for half a second in place of five."""
    copy_images(tmp_path)
    lines = [shlex.split(line) for line in commands(page("serving"), "bash") if line.split()[1] in ("client", "load")]
    assert len(lines) >= 6
    for _, command, *options in lines:
        seconds = ["--seconds", "0.5"] if command == "load" else []
        words = [command, *options, "--server", triton.grpc, "--model", "made", *seconds]
        done = run_here(words, tmp_path, partial(main, words))
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    images = {path.name for path in (tmp_path / "docs").iterdir() if path.suffix in IMAGE_SUFFIXES}
    assert {path.name for path in (tmp_path / "found").iterdir()} == images
    assert (tmp_path / "load.json").is_file()


def test_the_guides_program(triton: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path, *_) = save_images(tmp_path)
    _, (_, text) = blocks(page("serving"), "python3")
    assert len(text.splitlines()) <= 10
    arguments = f'"{triton.grpc}", "made", score_threshold={SCORE}'
    changed = text.replace('"localhost:8001"', arguments).replace("street.jpg", str(path))
    exec(compile(changed, "serving.md", "exec"), {})
    with Client(triton.grpc, "made", score_threshold=SCORE) as client:
        assert len(capsys.readouterr().out.splitlines()) == len(client.detect(path)) > 3


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rtsp://127.0.0.1/a", "dog.jpg"], "rtsp://127.0.0.1/a: a camera or stream must be the only source"),
        (["camera:99"], "/dev/video99: there is no such camera"),
        (["dog.jpg", "--frames", "3"], "only cameras and streams have a number of frames [--frames]"),
    ],
)
def test_sources_that_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "detect", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has the models files, letterbox, made; name one"),
        ({"model": "none"}, "unknown model: 'none'"),
        ({"model": "made", "version": "7"}, "7"),
        ({"model": "made", "batch": 9}, "accepts 1 to 3 images a request, not 9"),
        ({"model": "made", "batch": 0}, "at least 1 image"),
        ({"model": "made", "score_threshold": 1.5}, "must be between 0 and 1"),
    ],
)
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_mistakes_are_one_sentence(triton: Server, protocol: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DarktrtError, match=said) as caught:
        Client(url(triton, protocol), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", ["none", "system"])
def test_what_the_server_refuses_is_reported_and_the_client_goes_on(triton: Server, memory: Any) -> None:
    with Client(triton.grpc, "made", shared_memory=memory) as client:
        good = {"images": np.zeros((1, 64, 96, 3), np.uint8)}
        with pytest.raises(DarktrtError, match=r"shape|dim"):
            client.run({"images": np.zeros((1, 64, 50, 3), np.uint8)})
        with pytest.raises(DarktrtError, match=r"type|dtype"):
            client.run({"images": np.zeros((1, 64, 96, 3), np.float16)})
        with pytest.raises(DarktrtError, match="score threshold"):
            client.run({**good, "score_threshold": np.array([7], np.float32)})
        assert client.run(good)["boxes"].shape[0] == 1


def test_a_file_that_is_no_image(triton: Server, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    for model in ("made", "files"):
        with Client(triton.grpc, model) as client, pytest.raises(DarktrtError, match="image"):
            client.detect(tmp_path / "a.jpg")


def test_nobody_there_is_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for server in ("127.0.0.1:9", "http://127.0.0.1:9"):
        assert main(["client", "ping", "--server", server]) == 2
        assert "cannot be reached" in capsys.readouterr().err


def test_a_slow_answer_is_given_up(triton: Server) -> None:
    with Client(triton.grpc, "made", timeout=10, shared_memory="system") as client:
        expected = client.run({"images": photos()[0][np.newaxis]})
        (server,) = client._servers.all
        server.transport.timeout = 1e-4
        with pytest.raises(DarktrtError, match=r"no answer within 0\.0001 s"):
            client.run({"images": photos()[3][np.newaxis]})
        server.transport.timeout = 10
        for _ in range(8):  # the late answer does not come into the memory of these
            found = client.run({"images": photos()[0][np.newaxis]})
            np.testing.assert_array_equal(found["scores"], expected["scores"])
    assert regions_of(triton) == []
