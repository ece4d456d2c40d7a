"""The model behind Triton's Python backend, with a stand-in for the server's module."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import MADE_CFG, Made, conv, head, made_image, make, net, run, thresholds
from numpy.typing import NDArray
from PIL import Image

from darktrt.engine.runtime import OnnxRunner, PlanRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo, Thresholds
from darktrt.serve import backend
from darktrt.serve.backend import TritonPythonModel
from darktrt.serve.model_info import ModelInfo
from darktrt.serve.rows import MOST_BYTES, Result, Row, RowRunner, gather
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision import decode
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.images import Placement

SCORE = 0.02
"""Low, for networks of random weights find little."""


def portable_model(made: Made, folder: Path, **options: Any) -> Path:
    path = folder / "model.onnx"
    insert_plugins(made.plain, path, SurgeryOptions(**options))
    return path


# --- rows ---


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uint8, batch 1 to 3."""
    return portable_model(made, tmp_path_factory.mktemp("portable"))


def rows_of(info: DetectorInfo, pairs: list[tuple[float, float]]) -> list[Row]:
    return [Row(made_image(info.height, info.width, i), Thresholds(*pair)) for i, pair in enumerate(pairs)]


def single(path: Path, row: Row) -> dict[str, NDArray[Any]]:
    """The model's outputs for one image by itself."""
    return {
        k: v[0]
        for k, v in run(path, {"images": row.image[None], **thresholds(row.thresholds.score, row.thresholds.iou)}).items()
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_rows_of_different_thresholds_get_their_own(portable: Path, count: int) -> None:
    pairs = [(SCORE, 0.45), (0.3, 0.45), (SCORE, 0.1), (0.3, 0.45), (SCORE, 0.45), (SCORE, 0.45), (SCORE, 0.45)][:count]
    with OnnxRunner(portable) as runner:
        rows = rows_of(runner.info, pairs)
        results = RowRunner(runner).run(rows)
    counts = []
    for row, result in zip(rows, results, strict=True):
        expected = single(portable, row)
        counts.append(int(expected["num_detections"].item()))
        for name, array in expected.items():
            np.testing.assert_allclose(result.outputs[name][result.index], array, atol=1e-4, err_msg=name)
    assert len(set(counts)) > 1 or count < 3


class Counting:
    """A runner that records its batches and outputs the first pixel of every image."""

    def __init__(self, info: DetectorInfo) -> None:
        self.info = info
        self.batches: list[tuple[int, float]] = []
        self.memory = np.zeros((info.batch[2], *info.input_shape), info.input_dtype)
        self.answer = np.zeros((info.batch[2], 1), np.int32)

    def buffer(self, batch: int) -> NDArray[Any]:
        self.memory[:] = 77
        return self.memory[:batch]

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        images = inputs["images"]
        assert np.shares_memory(images, self.memory), "the batch was copied once more"
        self.batches.append((len(images), float(inputs["score_threshold"].item())))
        self.answer[: len(images)] = images[:, 0, 0, :1]
        return dict.fromkeys(("num_detections", "boxes", "scores", "classes"), self.answer[: len(images)])


def test_rows_run_in_as_few_and_as_large_batches_as_the_model_takes(portable: Path) -> None:
    with OnnxRunner(portable) as runner:
        info = runner.info
    counting = Counting(info)
    rows = [
        replace(row, image=np.full_like(row.image, i)) for i, row in enumerate(rows_of(info, [(0.5, 0.4), (0.25, 0.4)] * 4))
    ]
    results = RowRunner(counting).run(rows)
    assert [result.outputs["boxes"][result.index].item() for result in results] == list(range(8))
    assert counting.batches == [(3, 0.25), (1, 0.25), (3, 0.5), (1, 0.5)]


def test_a_static_batch_is_filled_up(portable: Path) -> None:
    with OnnxRunner(portable) as runner:
        counting = Counting(replace(runner.info, batch=(4, 4, 4)))
    row = Row(np.full(counting.info.input_shape, 5, np.uint8), Thresholds(0.5, 0.4))
    assert [result.outputs["boxes"][result.index].item() for result in RowRunner(counting).run([row] * 5)] == [5] * 5
    assert counting.batches == [(4, 0.5), (4, 0.5)] and (counting.memory[1:] == 0).all()


def test_what_ran_together_is_not_copied_again() -> None:
    outputs = {"boxes": np.arange(12.0).reshape(4, 3)}
    together = gather([Result(outputs, 1), Result(outputs, 2)])["boxes"]
    assert np.shares_memory(together, outputs["boxes"]) and (together == outputs["boxes"][1:3]).all()
    apart = gather([Result(outputs, 2), Result(outputs, 1)])["boxes"]
    assert (apart == outputs["boxes"][[2, 1]]).all()
    other = {"boxes": np.zeros((1, 3))}
    assert (gather([Result(outputs, 0), Result(other, 0)])["boxes"] == [[0, 1, 2], [0, 0, 0]]).all()


# --- requests ---


class Tensor:
    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class Request:
    def __init__(self, *outputs: str, **inputs: NDArray[Any]) -> None:
        self._outputs, self._inputs = outputs or ("num_detections", "boxes", "scores", "classes", "detections"), inputs

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def requested_output_names(self) -> tuple[str, ...]:
        return self._outputs


class Response:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: str | None = None) -> None:
        self.error = error
        self.arrays = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that there is only inside the server."""
    module = SimpleNamespace(Tensor=Tensor, InferenceResponse=Response, TritonError=str)
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: {"triton_python_backend_utils": module}[name])


def arguments(model: Path, info: DetectorInfo, form: str = "tensor", kind: str = "CPU") -> dict[str, str]:
    """The argument of ``initialize`` for a model in version 1 of a repository."""
    parameters = {
        "darktrt": info.to_json(),
        "score_threshold": str(SCORE),
        "iou_threshold": "0.45",
        "cuda_graph": "false",
    }
    encoded = {"name": "image", "data_type": "TYPE_STRING", "dims": [1]}
    tensor = {"name": "images", "data_type": "TYPE_UINT8", "dims": list(info.input_shape)}
    config = {
        "input": [encoded if form == "jpeg" else tensor],
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
        "instance_group": [{"count": 1}],
    }
    folder = model.parent.parent
    return {
        "model_config": json.dumps(config),
        "model_repository": str(folder),
        "model_version": model.parent.name,
        "model_instance_kind": kind,
        "model_instance_device_id": "1",
    }


def started(made: Made, folder: Path, form: str = "tensor", **options: Any) -> tuple[TritonPythonModel, Path, DetectorInfo]:
    (folder / "1").mkdir()
    path = portable_model(made, folder / "1", **options)
    with OnnxRunner(path) as runner:
        info = runner.info
    model = TritonPythonModel()
    model.initialize(arguments(path, info, form))
    return model, path, info


@pytest.fixture
def tensors(made: Made, tmp_path: Path) -> Iterator[tuple[TritonPythonModel, Path, DetectorInfo]]:
    model, path, info = started(made, tmp_path)
    yield model, path, info
    model.finalize()


def column(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None]


def test_requests_of_different_thresholds_in_one_batch(tensors: tuple[TritonPythonModel, Path, DetectorInfo]) -> None:
    model, path, info = tensors
    images = np.stack([made_image(info.height, info.width, i) for i in range(4)])
    requests = [
        Request(images=images[:1]),
        Request(images=images[1:3], score_threshold=column(0.3, SCORE)),
        Request(images=images[3:], iou_threshold=column(0.1)),
    ]
    pairs = [[(SCORE, 0.45)], [(0.3, 0.45), (SCORE, 0.45)], [(SCORE, 0.1)]]
    for request, pair, response in zip(requests, pairs, model.execute(requests), strict=True):
        given = request.inputs()[0].as_numpy()
        assert response.error is None and len(response.arrays) == 4
        for i, (score, iou) in enumerate(pair):
            expected = run(path, {"images": given[i : i + 1], **thresholds(score, iou)})
            for name, array in expected.items():
                np.testing.assert_allclose(response.arrays[name][i], array[0], atol=1e-4, err_msg=name)


def test_only_what_was_asked_for_is_answered(tensors: tuple[TritonPythonModel, Path, DetectorInfo]) -> None:
    model, _, info = tensors
    response = model.execute([Request("scores", images=np.zeros((1, *info.input_shape), np.uint8))])[0]
    assert list(response.arrays) == ["scores"]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["score_threshold", "iou_threshold"])
def test_a_wrong_threshold_is_the_error_of_its_own_request(
    tensors: tuple[TritonPythonModel, Path, DetectorInfo], name: str, value: float
) -> None:
    model, _, info = tensors
    images = np.zeros((1, *info.input_shape), np.uint8)
    good, bad = model.execute([Request(images=images), Request(images=images, **{name: column(value)})])
    words = {"score_threshold": "score", "iou_threshold": "IoU"}[name]
    assert (
        good.error is None and bad.error == f"the {words} threshold is {value:g}; it must be between 0 and 1" and not bad.arrays
    )


def test_a_model_that_fails_is_the_error_of_every_request(
    tensors: tuple[TritonPythonModel, Path, DetectorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, info = tensors

    def fail(_: Any) -> Any:
        raise DarktrtError("the GPU is gone")

    monkeypatch.setattr(model._runner, "run", fail)
    images = np.zeros((1, *info.input_shape), np.uint8)
    found = model.execute([Request(images=images), Request(images=images, score_threshold=column(2))])
    assert [response.error for response in found] == ["the GPU is gone", "the score threshold is 2; it must be between 0 and 1"]


def test_an_image_whose_results_are_no_numbers_is_the_error_of_its_request(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of damaged weights; the others in the batch are answered."""
    model, _, _ = started(made, tmp_path, "jpeg")
    run = model._runner.run

    def damaged(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = run(inputs)
        outputs["boxes"][0, 0] = np.nan
        return outputs

    monkeypatch.setattr(model._runner, "run", damaged)
    files = [np.array([[encoded(made_image(50, 60, i))]], object) for i in range(2)]
    bad, good = model.execute([Request(image=file) for file in files])
    assert bad.error and "boxes must be finite" in bad.error
    assert good.error is None and good.arrays["num_detections"].item() > 0


LETTERBOX = net(96, 64, letter_box=1) + conv(8, stride=2) + conv(16, stride=2) + head(nms_kind="diounms", beta_nms=0.6)


@pytest.mark.parametrize(("cfg", "options"), [(MADE_CFG, {}), (LETTERBOX, {"input": "float"})], ids=["uint8", "letterbox"])
def test_files_are_detected_as_the_command_does_it(tmp_path: Path, cfg: str, options: dict[str, Any]) -> None:
    """Boxes in pixels of images of different sizes, for bytes and for their base64."""
    model, path, info = started(make(tmp_path, cfg, batch=(2, 2, 2), name="net"), tmp_path, "jpeg", **options)
    images = [made_image(70, 150, 1), made_image(200, 90, 2), made_image(31, 47, 3)]
    files = [encoded(image) for image in images]
    texts = [files[0], base64.b64encode(files[1]), files[2]]
    response = model.execute([Request(image=np.array(texts, object)[:, None])])[0]
    with OnnxRunner(path) as runner:
        expected = NetworkDetector(runner.run, info, SCORE, 0.45).detect(images)
    assert response.error is None and min(len(found) for found in expected) > 0
    for i, found in enumerate(expected):
        count = response.arrays["num_detections"][i].item()
        np.testing.assert_allclose(response.arrays["boxes"][i, :count], found.boxes, atol=1e-2)
        np.testing.assert_allclose(response.arrays["scores"][i, :count], found.scores, atol=1e-4)
        assert response.arrays["classes"][i, :count].tolist() == found.class_ids.tolist()
        assert not response.arrays["boxes"][i, count:].any()
        assert response.arrays["boxes"].shape[1] == response.arrays["scores"].shape[1] == max(map(len, expected))
        listed = json.loads(response.arrays["detections"][i, 0])
        assert [one["class"] for one in listed] == found.names
        np.testing.assert_allclose([one["box"] for one in listed], found.boxes, atol=1e-2)
    model.finalize()


def test_images_of_a_request_may_have_different_numbers_of_detections(portable: Path) -> None:
    """All have as many rows as the one with the most; zeros stand behind the detections of the others."""
    with OnnxRunner(portable) as runner:
        info = runner.info
    placement = Placement(100, 80, 1.0, 1.0, 0.0, 0.0)
    counts = [1, 0, 3, 2]
    boxes = np.tile(np.array([1, 2, 50, 60], np.float32), (4, 3, 1))
    scores, classes = np.full((4, 3), 0.5, np.float32), np.full((4, 3), 2, np.int32)
    values = {"num_detections": np.array(counts, np.int32)[:, None], "boxes": boxes, "scores": scores, "classes": classes}
    names = ("num_detections", "boxes", "scores", "classes", "detections")
    request = backend.EncodedRequest([], frozenset(names))
    found = request.outputs([Result(values, i, placement) for i in range(4)], info)
    assert tuple(found) == names
    assert found["num_detections"].tolist() == [[1], [0], [3], [2]]
    for name, value in (("boxes", [1, 2, 50, 60]), ("scores", 0.5), ("classes", 2)):
        expected = np.zeros((4, 3, *np.shape(value)))
        for i, count in enumerate(counts):
            expected[i, :count] = value
        assert found[name].tolist() == expected.tolist() and found[name].dtype == values[name].dtype
    assert [len(json.loads(text)) for text in found["detections"][:, 0]] == counts
    few = backend.EncodedRequest([], frozenset(["scores"])).outputs([Result(values, 1, placement)], info)
    assert list(few) == ["scores"] and few["scores"].shape == (1, 0)


def encoded(image: NDArray[np.uint8], form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


def bomb(length: int) -> bytes:
    """A JPEG of few bytes that says it has so many columns and rows."""
    file = bytearray(encoded(np.zeros((8, 8, 3), np.uint8), "JPEG"))
    frame = file.index(b"\xff\xc0")
    file[frame + 5 : frame + 9] = length.to_bytes(2, "big") * 2
    return bytes(file)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "image 0: is empty"),
        (b"\x00\x01\x02 no image", r"image 0: is not an image in a format read here \(BMP"),
        (b"bm8gcGljdHVyZQ==", "image 0: is not an image"),
        (encoded(made_image(64, 64), "JPEG")[:700], "image 0: cannot be decoded"),
        (bomb(60000), "image 0: has too many pixels to be safe"),
        (bomb(10000), "image 0: has 10000x10000 pixels, more than 64,000,000"),
        (b"\xff" * MOST_BYTES, "image 0: is not an image"),
        (b"\xff" * (MOST_BYTES + 1), "has 33,554,433 bytes, more than 33,554,432"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image in a format read here"),
    ],
    ids=["empty", "bytes", "base64", "cut", "bomb", "many pixels", "largest", "too large", "postscript"],
)
def test_files_that_are_refused(made: Made, tmp_path: Path, file: bytes, said: str) -> None:
    model, _, _ = started(made, tmp_path, "jpeg")
    good = encoded(made_image(40, 60))
    bad, fine = model.execute([Request(image=np.array([[file]], object)), Request(image=np.array([[good]], object))])
    with pytest.raises(DarktrtError, match=said):
        raise DarktrtError(bad.error)
    assert fine.error is None and fine.arrays["boxes"].shape[0] == 1


def test_fixed_thresholds_need_none(made: Made, tmp_path: Path) -> None:
    model, path, info = started(made, tmp_path, thresholds=Thresholds(SCORE, 0.3))
    images = made_image(info.height, info.width, 4)[None]
    found, expected = model.execute([Request(images=images)])[0], run(path, {"images": images})
    np.testing.assert_allclose(found.arrays["scores"], expected["scores"], atol=1e-5)


# --- plans ---


def test_a_plan_runs_on_the_gpu_of_its_instance(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library beside it, and a CUDA graph if the config says so."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(backend, "PlanRunner", lambda *arguments: given.append(arguments))
    (tmp_path / "model.plan").touch()
    backend.make_runner(tmp_path, 4, 2, cuda_graph=True)
    (tmp_path / "libdarktrt_plugins.so").touch()
    backend.make_runner(tmp_path, 4, 2, cuda_graph=True)
    plan = tmp_path / "model.plan"
    assert given == [(plan, None, True, 2), (plan, tmp_path / "libdarktrt_plugins.so", True, 2)]


@pytest.mark.parametrize(("stated", "graph"), [("true", True), ("false", False)])
@pytest.mark.parametrize(("kind", "gpu"), [("GPU", 1), ("CPU", None)])
def test_an_instance_runs_what_its_config_states(
    portable: Path, monkeypatch: pytest.MonkeyPatch, stated: str, graph: bool, kind: str, gpu: int | None
) -> None:
    """On its GPU, with a CUDA graph or without, and with its share of the cores."""
    given: list[tuple[Any, ...]] = []
    runner = OnnxRunner(portable)
    monkeypatch.setattr(backend, "make_runner", lambda *arguments: given.append(arguments) or runner)
    monkeypatch.setattr(backend.os, "cpu_count", lambda: 12)
    words = arguments(portable, runner.info, kind=kind)
    config = json.loads(words["model_config"])
    config["parameters"]["cuda_graph"]["string_value"] = stated
    config["instance_group"] = [{"count": 2, "gpus": [0, 1]}, {"count": 1}]
    model = TritonPythonModel()
    model.initialize({**words, "model_config": json.dumps(config)})
    model.finalize()
    assert given == [(portable.parent, 12 // 5, gpu, graph)]


@pytest.mark.parametrize(("cores", "share"), [(None, 1), (1, 1), (2, 1), (12, 4)])
def test_an_instance_has_a_core_at_least(
    portable: Path, monkeypatch: pytest.MonkeyPatch, cores: int | None, share: int
) -> None:
    given: list[int] = []
    runner = OnnxRunner(portable)
    monkeypatch.setattr(backend, "make_runner", lambda _, threads, *__: given.append(threads) or runner)
    monkeypatch.setattr(backend.os, "cpu_count", lambda: cores)
    words = arguments(portable, runner.info)
    config = {**json.loads(words["model_config"]), "instance_group": [{"count": 3, "gpus": []}]}
    model = TritonPythonModel()
    model.initialize({**words, "model_config": json.dumps(config)})
    model.finalize()
    assert given == [share]


class Plan(PlanRunner):
    """An engine that fits frames; nothing of it is run."""

    fits_frames = True

    def __init__(self) -> None:
        pass


class PlanOfTensors(Plan):
    fits_frames = False


class Graphics:
    """Stands for the driver of a GPU."""

    made: list[Graphics]

    def __init__(self, gpu: int) -> None:
        self.gpu, self.inside, self.closed = gpu, False, False
        Graphics.made.append(self)

    @contextmanager
    def current(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("gpu", "number"), [(None, 0), (2, 2)])
def test_images_are_decoded_on_the_gpu_of_an_engine_that_fits_them(
    monkeypatch: pytest.MonkeyPatch, gpu: int | None, number: int
) -> None:
    """Where nvImageCodec is installed; for every other model on the CPU."""
    given: list[tuple[Any, ...]] = []
    Graphics.made = []

    def decoder(*arguments: Any) -> str:
        given.append((*arguments, any(one.inside for one in Graphics.made)))
        return "a decoder"

    monkeypatch.setattr(backend, "Driver", Graphics)
    monkeypatch.setattr(decode, "Decoder", decoder)
    assert backend.make_decoder(Plan(), 3, gpu) == "a decoder"
    (driver,) = Graphics.made
    assert given == [(3, "auto", True)] and (driver.gpu, driver.inside, driver.closed) == (number, False, True)
    backend.make_decoder(PlanOfTensors(), 3, gpu)
    assert given[1:] == [(3, False)] and Graphics.made == [driver]


def test_images_of_any_size_must_be_of_one_that_the_model_accepts(portable: Path) -> None:
    """Their sides are not confused."""
    with OnnxRunner(portable) as runner:
        info = replace(runner.info, input="image", image_sizes=((10, 20), (30, 40), (100, 50)))
    config = {
        "input": [{"name": "images", "data_type": "TYPE_UINT8", "dims": [-1, -1, 3]}],
        "parameters": {"darktrt": {"string_value": info.to_json()}},
    }
    model = ModelInfo.from_config(config, "config")
    (row,) = backend.tensor_rows({"images": np.zeros((1, 50, 100, 3), np.uint8)}, model)
    assert row.image.shape == (50, 100, 3) and row.image_size == (1, 1) and row.thresholds == Thresholds()
    with pytest.raises(DarktrtError, match="an image is 50x100, but the model accepts 10x20 to 100x50"):
        backend.tensor_rows({"images": np.zeros((1, 100, 50, 3), np.uint8)}, model)


def test_requests_state_what_a_letterboxed_image_covers(tmp_path: Path) -> None:
    """Which the distance in NMS depends on: width, then height, of each image."""
    made = make(tmp_path, LETTERBOX, batch=(1, 2, 2), name="net")
    model, path, info = started(made, tmp_path)
    images = np.stack([made_image(info.height, info.width, i) for i in range(2)])
    sizes = np.array([[96, 20], [30, 64]], np.float32)
    found = model.execute([Request(images=images, image_size=sizes)])[0]
    expected = run(path, {"images": images, "image_size": sizes, **thresholds(SCORE)})
    assert expected["num_detections"].min() > 0
    for name, array in expected.items():
        np.testing.assert_allclose(found.arrays[name], array, atol=1e-4, err_msg=name)
    model.finalize()


def test_an_onnx_file_on_a_gpu_needs_an_onnx_runtime_for_it(portable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DarktrtError, match="knows no GPU; install onnxruntime-gpu"):
        OnnxRunner(portable, 1, gpu=0)
