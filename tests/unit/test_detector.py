"""A detector's batches: their order, how many are under way, images of several sizes, and what an error leaves behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Made
from PIL import Image

from darktrt.cuda import DeviceImage
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.vision.decode import Decoder, Device
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.images import preprocess


class Network:
    """Finds one box in every frame, whose score is the frame's first level over 255."""

    fits_frames = True
    depth = 3

    def __init__(self, fails_at: int = -1) -> None:
        self.under_way: deque[list[float]] = deque()
        self.batches: list[list[tuple[int, ...]]] = []
        self.most = 0
        self.fails_at = fails_at

    def submit(self, images: Any, inputs: dict[str, Any]) -> None:
        self.batches.append([image.shape for image in images])
        if len(self.batches) - 1 == self.fails_at:
            raise DarktrtError("the GPU fails")
        self.under_way.append([float(image.flat[0]) / 255 for image in images])
        self.most = max(self.most, len(self.under_way))

    def collect(self) -> dict[str, Any]:
        scores = np.array(self.under_way.popleft(), np.float32)[:, None]
        boxes = np.tile(np.array([[[0, 0, 48, 32]]], np.float32), (len(scores), 1, 1))
        classes = np.zeros(scores.shape, np.int32)
        return {"boxes": boxes, "scores": scores, "classes": classes, "num_detections": np.ones((len(scores), 1), np.int32)}


@pytest.fixture
def info(made: Made) -> DetectorInfo:
    return replace(made.info, head="nms", input="float", batch=(1, 2, 4))


def frame(level: int, width: int = 96, height: int = 64) -> Any:
    return np.full((height, width, 3), level, np.uint8)


def levels(results: Sequence[Any]) -> list[int]:
    return [round(float(detections.scores[0]) * 255) for detections in results]


def test_batches_come_in_order_and_overlap(info: DetectorInfo) -> None:
    network = Network()
    batches = [[frame(10), frame(20)], [frame(30)], [frame(40), frame(50), frame(60)], [], [frame(70)], [frame(80)]]
    results = list(NetworkDetector(network, info).detect_batches(batches))
    assert [levels(batch) for batch in results] == [[10, 20], [30], [40, 50, 60], [], [70], [80]]
    assert network.most == 3 and not network.under_way


def test_a_batch_beyond_the_models_runs_in_parts(info: DetectorInfo) -> None:
    network = Network()
    (results,) = NetworkDetector(network, info).detect_batches([[frame(level) for level in range(10)]])
    assert levels(results) == list(range(10)) and [len(batch) for batch in network.batches] == [4, 4, 2]


def test_boxes_are_placed_in_each_image(info: DetectorInfo) -> None:
    frames = [frame(1, 192, 64), frame(2, 96, 128), frame(3, 48, 32)]
    boxes = [one.boxes.tolist() for one in NetworkDetector(Network(), info).detect(frames)]
    assert boxes == [[[0, 0, 96, 32]], [[0, 0, 48, 64]], [[0, 0, 24, 16]]]


def test_frames_are_taken_no_earlier_than_needed(info: DetectorInfo) -> None:
    """A camera's next frame comes only after the last ones were processed."""
    taken = 0

    def frames() -> Iterator[list[Any]]:
        nonlocal taken
        for level in range(20):
            taken += 1
            yield [frame(level)]

    results = NetworkDetector(Network(), info).detect_batches(frames())
    for number, batch in enumerate(results):
        assert levels(batch) == [number] and taken <= number + Network.depth


def test_images_of_one_size_run_together_where_the_model_takes_images(info: DetectorInfo) -> None:
    network = Network()
    info = replace(info, input="image", image_sizes=((32, 32), (96, 64), (200, 100)))
    small, large = (50, 40), (200, 100)
    batch = [frame(1, *small), frame(2, *large), frame(3, *small), frame(4, *large)]
    detector = NetworkDetector(network, info)
    assert levels(detector.detect(batch)) == [1, 2, 3, 4]
    assert sorted(network.batches) == [[(40, 50, 3)] * 2, [(100, 200, 3)] * 2]
    assert detector.detect([frame(1, *small)])[0].boxes.tolist() == [[0, 0, 48, 32]]  # in pixels of the image already
    with pytest.raises(DarktrtError, match="an image is 201x100, but the model accepts 32x32 to 200x100"):
        detector.detect([frame(1, 201, 100)])


def test_after_an_error_the_network_is_idle(info: DetectorInfo) -> None:
    network = Network(fails_at=2)
    detector = NetworkDetector(network, info)
    with pytest.raises(DarktrtError, match="the GPU fails"):
        detector.detect([frame(level) for level in range(12)])
    assert not network.under_way
    assert levels(detector.detect([frame(7)])) == [7]


def test_a_generator_that_is_closed_leaves_the_network_idle(info: DetectorInfo) -> None:
    network = Network()
    results = NetworkDetector(network, info).detect_batches([[frame(level)] for level in range(9)])
    next(results)
    results.close()
    assert not network.under_way


def test_files_and_frames_together(info: DetectorInfo, tmp_path: Path) -> None:
    paths = []
    for level in (10, 20, 30, 40, 50):
        paths.append(tmp_path / f"{level}.png")
        Image.fromarray(frame(level)).save(paths[-1])
    network = Network()
    with NetworkDetector(network, info) as detector:
        assert levels(detector.detect([paths[0], frame(11), str(paths[1]), *paths[2:], frame(60)])) == [
            10,
            11,
            20,
            30,
            40,
            50,
            60,
        ]
        (tmp_path / "40.png").write_bytes(b"")
        with pytest.raises(DarktrtError, match=r"40\.png: is empty"):
            detector.detect([frame(1), *paths])
        assert not network.under_way


@pytest.mark.parametrize("form", ["uint8", "float"])
def test_a_function_gets_what_preprocess_computes(info: DetectorInfo, form: Any) -> None:
    """Smaller batches than the model's are filled up with the first image."""
    given: list[Any] = []
    info = replace(info, input=form, batch=(2, 2, 4), resize="letterbox")

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        given.append(inputs["images"])
        network = Network()
        network.submit(inputs["images"], {})
        return network.collect()

    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    (detections,) = NetworkDetector(run, info).detect([image])
    expected = preprocess(image, info.width, info.height, info.channels, "letterbox", form)[0]
    np.testing.assert_array_equal(given[0], np.stack([expected, expected]))
    assert len(detections) == 1


class Unfitted(Network):
    """An engine whose plugin library cannot fit frames."""

    fits_frames = False


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda inputs: inputs, "ONNX Runtime runs on the CPU and needs images there; decode them on it"),
        (Unfitted(), "the engine's images are fitted on the CPU; decode them on it"),
    ],
)
def test_files_are_decoded_on_the_gpu_only_for_a_network_that_fits_frames(
    info: DetectorInfo, network: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Watched(Decoder):
        def __init__(self, threads: int | None = None, device: Device = "cpu") -> None:
            opened.append(device)
            super().__init__(threads)

    monkeypatch.setattr("darktrt.vision.detector.Decoder", Watched)
    with pytest.raises(DarktrtError, match=message) as caught:
        NetworkDetector(network, info, decoder="gpu")
    assert caught.value.argument == "decoder"
    Image.fromarray(frame(9)).save(tmp_path / "a.png")
    for device in ("auto", "gpu"):
        with NetworkDetector(Network(), info, decoder=device) as detector:
            detector.detect([tmp_path / "a.png"])
    with NetworkDetector(Unfitted(), info, decoder="auto") as detector:
        detector.detect([tmp_path / "a.png"])
    assert opened == ["auto", "gpu", "cpu"]


def test_what_is_no_image(info: DetectorInfo) -> None:
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(DarktrtError, match=r"an image must be \(H, W, 3\) uint8 RGB"):
            NetworkDetector(Network(), info).detect([wrong])


def test_an_image_on_the_gpu_is_as_good(info: DetectorInfo) -> None:
    image = DeviceImage(0x1000, 192, 64, None)

    class OnGpu(Network):
        def submit(self, images: Any, inputs: dict[str, Any]) -> None:
            assert images == [image]
            super().submit([frame(9)], inputs)

    (detections,) = NetworkDetector(OnGpu(), info).detect([image])
    assert detections.boxes.tolist() == [[0, 0, 96, 32]]
