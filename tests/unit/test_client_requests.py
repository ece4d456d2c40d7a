"""What a client sends for images and reads of answers, with stand-ins for a server; the real one is in tests/serve."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_hostile_server import INFO, as_json, config_json, http_server, usual
from test_load import remote_model

from darktrt.errors import DarktrtError
from darktrt.serve.client import client as module
from darktrt.serve.client import servers
from darktrt.serve.client.calls import LARGEST_ANSWER, HttpCalls
from darktrt.serve.client.client import Client, EncodedDetector
from darktrt.serve.model_info import TensorInfo
from darktrt.vision.detector import Arrays


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"in_flight": 0}, {"retry_seconds": -0.1}, {"retry_seconds": float("nan")}, {"batch": -1}]
)
def test_numbers_that_no_client_can_have(options: dict[str, Any]) -> None:
    with pytest.raises(DarktrtError, match="at least 1 image a request, 1 request in flight, and 0 seconds to retry"):
        Client("127.0.0.1:9", **options)


def test_the_least_that_a_client_can_have() -> None:
    with http_server(usual()) as url, Client(url, batch=1, in_flight=1, retry_seconds=0) as client:
        assert client.model.name == "made" and client.retries == 0 and client.info.batch == (1, 1, 1)
        client.close()


# --- batches ---


@pytest.mark.parametrize(
    ("triton", "network", "asked", "batch"),
    [
        (8, (1, 2, 4), 1, (1, 1, 1)),
        (8, (4, 4, 4), 8, (1, 8, 8)),
        (0, (1, 2, 4), 1, (1, 1, 1)),
        (0, (1, 2, 4), 4, (1, 4, 4)),
        (0, (2, 3, 4), 1, (2, 2, 2)),
        (0, (2, 3, 4), 3, (2, 3, 3)),
    ],
)
def test_requests_are_of_as_many_images_as_are_asked_for(
    triton: int, network: tuple[int, int, int], asked: int, batch: tuple[int, int, int]
) -> None:
    """Triton's batch counts, and the network's where Triton does not batch; the least of a network is made up to."""
    model = remote_model(max_batch=triton)
    assert module._client_info(replace(model, info=replace(model.info, batch=network)), asked).batch == batch


@pytest.mark.parametrize(("triton", "network", "asked", "range_"), [(8, (1, 1, 1), 9, "1 to 8"), (0, (2, 3, 4), 5, "2 to 4")])
def test_requests_of_more_images_than_a_model_accepts(
    triton: int, network: tuple[int, int, int], asked: int, range_: str
) -> None:
    model = remote_model(max_batch=triton)
    with pytest.raises(DarktrtError, match=f"model 'made' accepts {range_} images a request, not {asked}") as caught:
        module._client_info(replace(model, info=replace(model.info, batch=network)), asked)
    assert caught.value.argument == "batch"


def test_requests_have_a_gibibyte_at_most() -> None:
    side = 1 << 14
    for width, fits in ((side, True), (side + 1, False)):
        images = TensorInfo("images", np.dtype(np.uint8), (side, width, 4))
        model = replace(remote_model(), inputs={"images": images})
        assert side * side * 4 == 4 * LARGEST_ANSWER == 1 << 30
        if fits:
            module._client_info(model, 1)
        else:
            with pytest.raises(DarktrtError, match=r"1 images of its input have 1,073,807,360 bytes; ask for fewer"):
                module._client_info(model, 1)


def test_requests_are_under_way_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are allowed, and answers keep the order of the images."""
    lock, together, running, most, seen = threading.Lock(), threading.Barrier(3), 0, 0, []
    with http_server(usual()) as url, Client(url, batch=2, in_flight=3) as client:

        def detect(images: list[NDArray[np.uint8]]) -> list[int]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
                seen.append(len(images))
                first = len(seen) <= 3
            if first:
                together.wait(20)
            time.sleep(0.05)
            with lock:
                running -= 1
            return [int(image[0, 0, 0]) for image in images]

        monkeypatch.setattr(client.detector, "detect", detect)
        images = [np.full((2, 2, 3), i, np.uint8) for i in range(11)]
        assert client.detect_all(images) == list(range(11))
        assert (most, sorted(seen)) == (3, [1, 2, 2, 2, 2, 2])
        assert client.detect_all([]) == [] and client.detect(images[7]) == 7


# --- places ---


def paths_asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    exchange = HttpCalls._exchange

    async def noted(self: HttpCalls, method: str, path: str, *rest: Any, **body: Any) -> Any:
        asked.append(f"{method} {path}")
        return await exchange(self, method, path, *rest, **body)

    monkeypatch.setattr(HttpCalls, "_exchange", noted)
    return asked


@pytest.mark.parametrize(("version", "place"), [("", "models/made"), ("3", "models/made/versions/3")])
def test_calls_are_of_the_version_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, version: str, place: str) -> None:
    asked = paths_asked(monkeypatch)
    with http_server(usual()) as url, Client(url, "made", version) as client:
        assert client.model.version == version
        client.statistics()
        client.detect(np.zeros((20, 30, 3), np.uint8))
    assert asked == [f"GET {place}/config", f"GET {place}/stats", f"POST {place}/infer"]


def test_the_only_model_need_not_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = paths_asked(monkeypatch)
    with http_server(usual()) as url, Client(url) as client:
        assert client.model.name == "made" and asked == ["POST repository/index", "GET models/made/config"]
    with http_server({**usual(), "index": as_json([])}) as url, pytest.raises(DarktrtError, match="has no model that is ready"):
        Client(url)
    two = [{"name": name, "version": "1", "state": "READY"} for name in ("a", "b")]
    with http_server({**usual(), "index": as_json(two)}) as url:
        with pytest.raises(DarktrtError, match="has the models a, b; name one") as caught:
            Client(url)
        assert caught.value.argument == "model"


def test_models_of_files_are_no_functions_of_tensors() -> None:
    config = {**config_json(), "input": [{"name": "image", "data_type": "TYPE_STRING", "dims": [1]}]}
    with (
        http_server({**usual(), "config": as_json(config)}) as url,
        pytest.raises(DarktrtError, match="model 'made' accepts image files, not tensors; publish it for tensors"),
        module.triton_run(url),
    ):
        pass
    with http_server(usual()) as url, module.triton_run(url, "made", batch=2) as (run, info):
        assert callable(run) and info.batch == (1, 2, 2)


def test_pauses_double_up_to_the_longest_and_differ_between_clients() -> None:
    """Each is half of its length at least: clients of one server that was away do not all come back at one moment."""
    several = [list(islice(servers.iterate_pauses(), 12)) for _ in range(50)]
    longest = [min(servers.FIRST_PAUSE * 2**i, servers.LONGEST_PAUSE) for i in range(12)]
    for pauses in several:
        assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    for i, most in enumerate(longest):
        spread = [pauses[i] for pauses in several]
        assert min(spread) < 0.7 * most and max(spread) > 0.8 * most
    assert (servers.FIRST_PAUSE, servers.LONGEST_PAUSE) == (longest[0], longest[-1]) == (0.05, 2.0)


# --- encoded images ---


@pytest.fixture
def detector() -> tuple[EncodedDetector, list[Arrays]]:
    """One whose model finds an object in the first image of a request, two in the second one, and so on; and the requests."""
    requests: list[Arrays] = []

    def run(inputs: Arrays) -> Arrays:
        requests.append(inputs)
        count = len(inputs["image"])
        found = np.arange(1, count + 1, dtype=np.int32)
        boxes = np.tile(np.array([1, 2, 8, 9], np.float32), (count, 4, 1))
        scores, classes = np.full((count, 4), 0.5, np.float32), np.ones((count, 4), np.int32)
        return {"num_detections": found[:, None], "boxes": boxes, "scores": scores, "classes": classes}

    return EncodedDetector(run, replace(INFO, batch=(1, 3, 3)), 0.1, 0.2), requests


def test_files_are_sent_unchanged_and_arrays_without_loss(
    detector: tuple[EncodedDetector, list[Arrays]], tmp_path: Path
) -> None:
    """With the thresholds; each image has its own detections."""
    one, requests = detector
    file = tmp_path / "a.jpg"
    Image.fromarray(np.full((5, 4, 3), 200, np.uint8)).save(file)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    found = one.detect([file, pixels, str(file), pixels])
    assert [len(detections) for detections in found] == [1, 2, 3, 1]
    assert found[1].to_rows().tolist() == 2 * [[1, 2, 8, 9, 0.5, 1]]
    first, second = (request["image"] for request in requests)
    assert first.shape == (3, 1) and second.shape == (1, 1)
    assert first[0, 0] == first[2, 0] == file.read_bytes()
    for sent in (first[1, 0], second[0, 0]):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sent))), pixels)
    assert requests[0]["score_threshold"] == np.float32(0.1) and requests[0]["iou_threshold"] == np.float32(0.2)


def test_a_full_answer_of_a_server_warns_once(
    detector: tuple[EncodedDetector, list[Arrays]], caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = detector
    one.info = replace(one.info, max_detections=3)
    image = np.zeros((5, 4, 3), np.uint8)
    one.detect([image] * 2)
    assert not caplog.messages
    one.detect([image] * 6)
    (message,) = caplog.messages
    assert message.startswith(f"{one.info.name}: an image has 3 detections, as many as the model outputs")


def test_images_come_back_where_they_are_drawn_into(detector: tuple[EncodedDetector, list[Arrays]], tmp_path: Path) -> None:
    one, _ = detector
    Image.fromarray(np.full((5, 4, 3), 200, np.uint8)).save(tmp_path / "a.png")
    pixels = np.zeros((6, 7, 3), np.uint8)
    ((images, found),) = one.detect_frames([[tmp_path / "a.png", pixels]])
    assert images[0].shape == (5, 4, 3) and images[1] is pixels and [len(each) for each in found] == [1, 2]
    for wanted in (True, False):
        (image,), _ = one.detect_images([tmp_path / "a.png"], wanted)
        assert (image is not None) is wanted
    with pytest.raises(DarktrtError, match=r"none\.jpg: cannot be read: No such file or directory"):
        one.detect([tmp_path / "none.jpg"])
