"""Models that take images of any size, on a real server: asked by plain tritonclient, by the client, and by load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import MADE_CFG, SHARED, made_image, make
from numpy.typing import NDArray
from PIL import Image
from test_client import assert_same, direct, lines, photos, regions_of, save_images, url
from test_docs import blocks, page
from triton_models import LETTERBOX_CFG, ask, encoded, portable_model, server_of

from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.metadata import Thresholds
from darktrt.serve.client.client import Client
from darktrt.serve.config import PythonBackend
from darktrt.serve.doctor import diagnose_repository
from darktrt.serve.load.measure import LoadOptions, measure_load
from darktrt.serve.repository import publish
from darktrt.serve.server import Server
from darktrt.vision.boxes import Detections

grpc = pytest.importorskip("tritonclient.grpc", reason="needs tritonclient: pip install 'darktrt[serve]'")

SCORE = 0.08
SIZES = ((32, 32), (120, 90), (400, 300))
"""Smallest, usual and largest image, the first and the last smaller than the images of some tests."""

Rows = list[tuple[int, float, list[float]]]
"""Class, score and box of each detection."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model files by their names on the server; ``fixed`` has fixed thresholds, ``files`` accepts image files."""
    folder = tmp_path_factory.mktemp("any_size")
    made, letterbox = make(folder, MADE_CFG, batch=(1, 3, 3)), make(folder, LETTERBOX_CFG, batch=(2, 2, 2), name="letterbox")
    cameras = portable_model(made, input="image", image_sizes=SIZES).rename(folder / "cameras.onnx")
    fixed = portable_model(made, input="image", image_sizes=SIZES, thresholds=Thresholds(SCORE, 0.45))
    options = PythonBackend(score_threshold=SCORE, delay=20_000)
    publish(cameras, folder / "repository", options, "cameras")
    publish(cameras, folder / "repository", PythonBackend(score_threshold=SCORE, input="jpeg", instances=2), "files")
    publish(fixed, folder / "repository", PythonBackend(), "fixed")
    boxed = portable_model(letterbox, input="image", image_sizes=SIZES)
    publish(boxed, folder / "repository", PythonBackend(score_threshold=SCORE), "letterbox")
    return {"cameras": cameras, "files": cameras, "fixed": fixed, "letterbox": boxed}


@pytest.fixture(scope="module")
def server(files: dict[str, Path]) -> Iterator[Server]:
    with server_of(files["cameras"].parent / "repository") as server:
        yield server


def ten_lines(server: Server, model: str, image: Path) -> Rows:
    """What the guide's program prints, which has never heard of darktrt."""
    (_, text), _ = blocks(page("serving"), "python3")
    assert len(text.splitlines()) == 10 and "darktrt" not in text
    for old, new in (("localhost:8001", server.grpc), ("street.jpg", str(image)), ("cameras", model)):
        assert f'"{old}"' in text
        text = text.replace(f'"{old}"', repr(new))
    done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    words = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    return [(int(one), float(score), ast.literal_eval(box)) for one, score, box in words]


def assert_rows(found: Rows, expected: Detections) -> None:
    assert [one for one, _, _ in found] == expected.class_ids.tolist()
    np.testing.assert_allclose([score for _, score, _ in found], expected.scores, atol=1e-5)
    np.testing.assert_allclose([box for _, _, box in found], expected.boxes, atol=1e-2)


@pytest.mark.parametrize("model", ["cameras", "fixed", "letterbox"])
def test_ten_lines_without_darktrt(server: Server, files: dict[str, Path], model: str, tmp_path: Path) -> None:
    total = 0
    for path, image in list(zip(save_images(tmp_path), photos(), strict=True))[:3]:
        (expected,) = direct(files[model], [image], SCORE)
        assert_rows(ten_lines(server, model, path), expected)
        total += len(expected)
    assert total >= 5


@pytest.mark.skipif(not (SHARED / "zoo/yolov4-tiny.weights").is_file(), reason="needs the weights of yolov4-tiny in shared/")
def test_ten_lines_find_the_dog(tmp_path: Path) -> None:
    """In two sizes, as ``darktrt detect`` with floats finds it."""
    from darktrt.convert.export import convert_darknet
    from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

    zoo, plain = SHARED / "zoo", tmp_path / "plain.onnx"
    convert_darknet(zoo / "yolov4-tiny.cfg", zoo / "yolov4-tiny.weights", plain, size=(416, 416))
    for form in ("float", "image"):
        insert_plugins(plain, tmp_path / f"{form}.onnx", SurgeryOptions(input=form))  # type: ignore[arg-type]
    publish(tmp_path / "image.onnx", tmp_path / "models", PythonBackend(), "dogs")
    dog = Image.open(SHARED / "data/dog.jpg")
    dog.resize((500, 375)).save(tmp_path / "small.png")
    dog.save(tmp_path / "dog.png")
    with server_of(tmp_path / "models") as server:
        for path in (tmp_path / "dog.png", tmp_path / "small.png"):
            (expected,) = direct(tmp_path / "float.onnx", [np.asarray(Image.open(path))], 0.25)
            assert {"dog", "bicycle"} <= set(expected.names)
            assert_rows(ten_lines(server, "dogs", path), expected)


def column(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None]


def test_thresholds_of_each_image(server: Server, files: dict[str, Path]) -> None:
    image = photos()[1]
    found = ask(server, "cameras", images=np.stack([image] * 2), score_threshold=column(SCORE, 0.12))
    low, high = (direct(files["cameras"], [image], score)[0] for score in (SCORE, 0.12))
    assert found["num_detections"][:, 0].tolist() == [len(low), len(high)] and len(low) > len(high)
    np.testing.assert_allclose(found["boxes"][0, : len(low)], low.boxes, atol=1e-2)


def test_only_images_of_one_size_share_a_batch(server: Server, files: dict[str, Path]) -> None:
    """Requests of different sizes that wait together."""
    images = [photos()[i % 3] for i in range(12)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: ask(server, "cameras", images=images[i][None])}))
        for i in range(len(images))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(direct(files["cameras"], images)):
        assert found[i]["num_detections"].item() == len(expected)
        np.testing.assert_allclose(found[i]["boxes"][0, : len(expected)], expected.boxes, atol=1e-2)


@pytest.mark.parametrize(("width", "height"), [(20, 50), (50, 20), (401, 50), (50, 301)])
def test_images_that_are_too_small_or_too_large(server: Server, width: int, height: int) -> None:
    said = f"an image is {width}x{height}, but the model accepts 32x32 to 400x300"
    image = made_image(height, width)
    with pytest.raises(grpc.InferenceServerException, match=said):
        ask(server, "cameras", images=image[None])
    with pytest.raises(grpc.InferenceServerException, match=f"image 1: .*{said}"):
        ask(server, "files", image=np.array([[encoded(photos()[0])], [encoded(image)]], object))
    with Client(server.grpc, "cameras") as client, pytest.raises(DarktrtError, match=said):
        client.detect(image)


@pytest.mark.parametrize("pixels", [np.zeros((1, 50, 50, 4), np.uint8), np.zeros((50, 50, 3), np.uint8)])
def test_tensors_that_are_no_images(server: Server, pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(grpc.InferenceServerException, match=r"Expected \[-1,-1,-1,3\]|unexpected shape|must be <= 3"):
        ask(server, "cameras", images=pixels)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("memory", ["none", "system"])
@pytest.mark.parametrize("model", ["cameras", "files", "letterbox"])
def test_the_client_sends_what_the_camera_gave(
    server: Server, files: dict[str, Path], protocol: str, memory: Any, model: str, tmp_path: Path
) -> None:
    """And boxes come as the server has them; memory grows for images larger than usual."""
    images = [*photos(), made_image(300, 400, 9)]
    with Client(url(server, protocol), model, score_threshold=SCORE, shared_memory=memory, batch=2) as client:
        found = client.detect_all(images)
        assert_same(client.detect_all(save_images(tmp_path)), found[:-1])
    assert_same(found, direct(files[model], images))
    assert regions_of(server) == []


def test_client_detect_prints_what_detect_prints(
    server: Server, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_images(tmp_path / "in")
    options = [str(tmp_path / "in"), "--score-threshold", str(SCORE), "--json"]
    assert main(["client", "detect", *options, "--server", server.grpc, "--model", "cameras", "--batch", "3"]) == 0
    through = lines(capsys.readouterr().out)
    assert main(["detect", *options, "--model", str(files["cameras"])]) == 0
    for one, other in zip(through, lines(capsys.readouterr().out), strict=True):
        assert one["file"] == other["file"]
        assert [found["class"] for found in one["detections"]] == [found["class"] for found in other["detections"]]
        boxes = [[found["box"] for found in each["detections"]] for each in (one, other)]
        np.testing.assert_allclose(*boxes, atol=1e-2)


@pytest.mark.parametrize("model", ["cameras", "files"])
def test_ping_info_and_load(server: Server, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--server", server.grpc, "--model", model]
    assert main(["client", "ping", *words, "--batch", "2"]) == 0
    assert "answered noise in" in capsys.readouterr().out
    assert main(["client", "info", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["detector"]["image_sizes"] == [list(size) for size in SIZES]
    images = save_images(tmp_path)
    report = measure_load(server.grpc, model, options=LoadOptions((2,), 2, 1, 1, "system", images=tuple(images)))
    assert report.best.failures == 0 and report.best.infer_per_second > 0


def test_doctor(server: Server, files: dict[str, Path]) -> None:
    findings = diagnose_repository(files["cameras"].parent / "repository", files["cameras"])
    assert not [finding.text for finding in findings if finding.bad]
    texts = [finding.text for finding in findings if finding.model == "cameras/1"]
    assert texts[-1].startswith("a first inference agrees with ONNX Runtime: ")
