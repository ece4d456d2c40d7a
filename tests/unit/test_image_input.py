"""Models that take images of any size: their form, numbers as of images fitted before, calibration, lowering and builds."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from fake_tensorrt import FakeDriver
from helpers import (
    HALF_TOLERANCE,
    MADE_BODY,
    Array,
    Made,
    conv,
    head,
    made_image,
    make,
    net,
    relative_error,
    run,
    session,
    thresholds,
    with_outputs,
)
from onnx import TensorProto
from PIL import Image
from test_engine import PLUGINS, full

from darktrt.calib.channel_means import Range, measure_channel_means
from darktrt.calib.collect import collect
from darktrt.calib.trt_calibrator import BatchSource, image_source
from darktrt.check.agreement import compare
from darktrt.check.runs import load_image, onnx_variant
from darktrt.check.simulate import FloatReference, chosen_fp_layers, load_network, operations
from darktrt.cli import main
from darktrt.engine.bench import random_inputs
from darktrt.engine.build import build_file
from darktrt.engine.describe import describe_onnx, describe_plan
from darktrt.engine.lower import lower
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target
from darktrt.engine.trt_builder import build
from darktrt.engine.weak_typing import GpuCalibration
from darktrt.errors import DarktrtError
from darktrt.metadata import IMAGE_SIZES, METADATA_KEY, DetectorInfo, Thresholds
from darktrt.onnx_file import load_model
from darktrt.pipeline import load_calibration
from darktrt.plugins.ops import DOMAIN, Preprocess, op_from_node
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.boxes import Detections, place_detections
from darktrt.vision.detector import read_outputs
from darktrt.vision.images import preprocess

NO_RTX = importlib.util.find_spec("tensorrt_rtx") is None
rtx = pytest.mark.skipif(NO_RTX, reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")

SIZES = [(1, 1), (7, 200), (64, 96), (97, 61), (300, 500)]
"""Height and width of images: a pixel, a strip, the made network's input, smaller and larger."""
FITTED = ("images_float", "image_size", "placement")
"""What the fitting of images makes."""
PLACED = 4 * 2.0**-24
"""Relative error of a box that was placed in float32, against float64 rounded once: four roundings of half a unit each."""

NETWORKS = {
    "stretched": net(96, 64) + MADE_BODY,
    "letterboxed": net(96, 64, letter_box=1) + MADE_BODY,
    "letterboxed, plain NMS": net(64, 96, letter_box=1) + conv(8, stride=2) + conv(8, stride=4) + head(1, "2,0"),
    "letterboxed, diounms": net(96, 64, letter_box=1) + conv(8, stride=4) + head(nms_kind="diounms", beta_nms=0.3),
    "gray": net(96, 64, channels=1) + MADE_BODY,
    "gray, letterboxed": net(64, 64, channels=1, letter_box=1) + conv(8, stride=4) + head(nms_kind="greedynms"),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("network"), NETWORKS[request.param], batch=(1, 3, 3))


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network in every form of input, as ``float.onnx`` and so on, and ``photos`` of different sizes."""
    folder = tmp_path_factory.mktemp("files")
    for form in ("float", "uint8", "image"):
        insert_plugins(made.plain, folder / f"{form}.onnx", SurgeryOptions(input=form))  # type: ignore[arg-type]
    (folder / "photos").mkdir()
    for i, (height, width) in enumerate([*SIZES[1:], (128, 192)]):
        Image.fromarray(made_image(max(height, 16), width, seed=i)).save(folder / "photos" / f"{i}.png")
    return folder


def photos(files: Path) -> list[Path]:
    return sorted((files / "photos").iterdir())


def info_of(model: onnx.ModelProto) -> DetectorInfo:
    return DetectorInfo.from_json({p.key: p.value for p in model.metadata_props}[METADATA_KEY], "model")


def images_of(height: int, width: int, count: int = 1) -> Array:
    """Different images of one size, ``(count, height, width, 3)``: parts of larger ones."""
    return np.stack([made_image(height + 40, width + 40, seed=i)[:height, :width] for i in range(count)])


# --- form ---


def form(values: Any) -> dict[str, tuple[str, list[object]]]:
    """Type and shape by name."""
    types = {v.name: TensorProto.DataType.Name(v.type.tensor_type.elem_type).lower() for v in values}
    return {v.name: (types[v.name], [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values}


@pytest.mark.parametrize("batch", [(1, 3, 3), (2, 2, 2)])
@pytest.mark.parametrize("kind", ["stretched", "letterboxed"])
def test_images_go_in_and_their_boxes_come_out(tmp_path: Path, kind: str, batch: tuple[int, int, int]) -> None:
    made = make(tmp_path, NETWORKS[kind], batch=batch)
    model = made.transformed(input="image", max_detections=50)
    n = "batch" if batch[0] < batch[2] else 2
    one = ("float", [1])
    assert form(model.graph.input) == {
        "images": ("uint8", [n, "height", "width", 3]),
        "score_threshold": one,
        "iou_threshold": one,
    }
    assert form(model.graph.output) == {
        "num_detections": ("int32", [n, 1]),
        "boxes": ("float", [n, 50, 4]),
        "scores": ("float", [n, 50]),
        "classes": ("int32", [n, 50]),
    }
    info = info_of(model)
    assert (info.input, info.head, info.image_sizes, info.batch) == ("image", "nms", IMAGE_SIZES, batch)
    assert not info.takes_image_size
    (node,) = (node for node in model.graph.node if node.op_type == "PreprocessPlugin")
    assert op_from_node(node) == Preprocess((96, 64), 3, int(kind == "letterboxed"))
    assert list(node.output) == ["images_float", "image_size", "placement"]
    custom = [node.op_type for node in model.graph.node if node.domain == DOMAIN and node.op_type != "MishPlugin"]
    assert custom == ["PreprocessPlugin", "YoloDetectPlugin", "PlaceBoxesPlugin"]
    assert {function.name for function in model.functions} == {*custom, "MishPlugin"}


def test_graphsurgeon_reads_and_writes_it(made: Made) -> None:
    model = made.transformed(input="image")
    again = gs.export_onnx(gs.import_onnx(model), do_type_check=False)
    onnx.checker.check_model(again, full_check=True)
    inputs = {"images": images_of(40, 70), **thresholds(0.01)}
    for name, array in run(model, inputs).items():
        np.testing.assert_array_equal(run(again, inputs)[name], array)


def test_fixed_thresholds_and_marked_layers(made: Made) -> None:
    model = made.transformed(input="image", thresholds=Thresholds(0.01, 0.45), mark_layers=True)
    assert [tensor.name for tensor in model.graph.input] == ["images"]
    inputs = {"images": images_of(40, 70)}
    result, expected = run(model, inputs), run(made.transformed(input="image"), {**inputs, **thresholds(0.01)})
    assert {layer.tensor for layer in made.info.layers} <= set(result)
    for name, array in expected.items():
        np.testing.assert_array_equal(result[name], array)


@pytest.mark.parametrize(
    ("options", "said", "argument"),
    [
        ({"head": "decode"}, "a model with head 'decode' has no boxes to map to images of any size", "head"),
        ({"head": "raw"}, "a model with head 'raw' has no boxes", "head"),
        ({"input": "uint8", "image_sizes": IMAGE_SIZES}, "with the input 'uint8' takes images of one size", "image_sizes"),
        ({"image_sizes": ((64, 64), (32, 64), (99, 99))}, "64x64 32x64 99x99: write smallest, usual and", "image_sizes"),
        ({"image_sizes": ((0, 1), (32, 64), (99, 99))}, "0x1 32x64 99x99: write smallest, usual and", "image_sizes"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, argument: str) -> None:
    with pytest.raises(DarktrtError, match=said) as caught:
        SurgeryOptions(**{"input": "image", **options})
    assert caught.value.argument == argument


def test_two_channels_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path, net(channels=2) + conv(8, stride=4) + head())
    with pytest.raises(DarktrtError, match="channels must be 1 or 3, not 2"):
        made.transformed(input="image")


def test_the_command_line(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, output = str(made.plain), str(tmp_path / "a.onnx")
    sizes = ["--image-sizes", "32", "640x480", "1920x1080"]
    assert main(["surgery", plain, "-o", output, "--input", "image", *sizes]) == 0
    _, info = load_model(output)
    assert info.image_sizes == ((32, 32), (640, 480), (1920, 1080))
    assert "32 x 32 to 1920 x 1080, usually 640 x 480, fitted into 96 x 64, 3 channels, image" in describe_onnx(output)
    capsys.readouterr()
    assert main(["surgery", plain, "-o", output, *sizes]) == 2
    assert capsys.readouterr().err == (
        "darktrt surgery: a model with the input 'uint8' takes images of one size [--image-sizes]\n"
    )
    assert main(["surgery", plain, "-o", output, "--input", "image", "--image-sizes", "32", "640 x 480", "64"]) == 2
    assert "--image-sizes 640 x 480: write a side like 416, or WIDTHxHEIGHT" in capsys.readouterr().err
    assert main(["surgery", plain, "-o", output, "--input", "image", "--head", "raw"]) == 2
    assert "has no boxes to map to images of any size [--head]" in capsys.readouterr().err


# --- numbers ---


@dataclass(frozen=True)
class Form:
    """A model that is ready to run on images of every size."""

    info: DetectorInfo
    session: onnxruntime.InferenceSession

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, dict(inputs)), strict=True))


@pytest.fixture(scope="module")
def forms(network: Made) -> dict[str, Form]:
    """The network with images and with floats as its input, and what TensorRT for RTX gets of the former, by precision."""
    models = {form: network.transformed(input=form) for form in ("image", "float")}
    for precision in ("fp32", "fp16"):
        model = network.transformed(input="image")
        models[precision] = lower(model, info_of(model), TARGETS["rtx"], precision)
    models = {name: model if name == "float" else with_outputs(model, FITTED) for name, model in models.items()}
    return {name: Form(info_of(model), session(model)) for name, model in models.items()}


def expected_detections(form: Form, images: Array, limits: Thresholds) -> list[Detections]:
    """By the network with float input, of images fitted and boxes placed in NumPy."""
    info = form.info
    fitted = [preprocess(image, info.width, info.height, info.channels, info.resize, "float") for image in images]
    sizes = [placement.inner_size for _, placement in fitted]
    outputs = form.run(info.model_inputs(np.stack([pixels for pixels, _ in fitted]), sizes, limits))
    found = []
    for i, (_, placement) in enumerate(fitted):
        rows = read_outputs({name: values[i] for name, values in outputs.items()}, info, limits, sizes[i], "made")
        found.append(place_detections(*rows, placement, info.class_names))
    return found


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_detections_are_those_of_images_fitted_before(forms: dict[str, Form], height: int, width: int) -> None:
    """The same scores and classes, bit for bit, in a batch of different images; boxes to the rounding of float32."""
    limits = Thresholds(0.01, 0.3)
    images = images_of(height, width, 3)
    result = forms["image"].run(forms["image"].info.model_inputs(images, [], limits))
    for i, expected in enumerate(expected_detections(forms["float"], images, limits)):
        count = int(result["num_detections"][i, 0])
        assert count == len(expected.scores) > 0
        np.testing.assert_array_equal(result["scores"][i, :count], expected.scores)
        np.testing.assert_array_equal(result["classes"][i, :count], expected.class_ids)
        np.testing.assert_allclose(result["boxes"][i, :count], expected.boxes, rtol=PLACED, atol=PLACED)
        assert not any(result[name][i, count:].any() for name in ("boxes", "scores", "classes"))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_are_those_of_images_fitted_before(network: Made, height: int, width: int) -> None:
    """And so are the heads behind them; the sizes in the letterbox and the placement are exact."""
    names = [*FITTED, *(h.tensor for h in network.info.heads)]
    images, info = images_of(height, width, 2), network.info
    result = run(with_outputs(network.transformed(input="image"), names), {"images": images, **thresholds()})
    pairs = [preprocess(image, info.width, info.height, info.channels, info.resize, "float") for image in images]
    pixels, placement = np.stack([pixels for pixels, _ in pairs]), pairs[0][1]
    assert result["images_float"].tobytes() == pixels.tobytes()
    assert result["image_size"].tolist() == [list(placement.inner_size)] * 2
    rows = [placement.offset_x, placement.offset_y], [placement.scale_x, placement.scale_y], [width, height]
    assert result["placement"].tobytes() == np.array([row * 2 for row in rows], np.float32).tobytes()
    plain = run(with_outputs(network.model(), names[3:]), {"images": pixels})
    for name in names[3:]:
        np.testing.assert_array_equal(result[name], plain[name])


def test_a_static_batch_is_filled_up(tmp_path: Path) -> None:
    made, limits = make(tmp_path, NETWORKS["letterboxed"], batch=(4, 4, 4)), Thresholds(0.01, 0.3)
    model = made.transformed(input="image")
    result = run(model, info_of(model).model_inputs(images_of(50, 31, 2), [], limits))
    assert len(result["boxes"]) == 4
    for i in (2, 3):
        for values in result.values():
            np.testing.assert_array_equal(values[i], values[0])


# --- calibration ---


def test_it_is_calibrated_on_the_pixels_of_the_float_form(files: Path) -> None:
    """Images have different sizes; only the name of the image's tensor is that of the uint8 form."""
    images = photos(files)
    result, expected = (collect(files / f"{name}.onnx", images) for name in ("image", "float"))
    as_bytes = collect(files / "uint8.onnx", images)
    assert list(result.histograms) == list(as_bytes.histograms)
    assert ["images_float", *list(expected.histograms)[1:]] == list(result.histograms)
    for one, other in zip(result.histograms.values(), expected.histograms.values(), strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
    assert any((one.counts != as_bytes.histograms[name].counts).any() for name, one in result.histograms.items())


@pytest.fixture(scope="module")
def calibrations(files: Path) -> dict[str, Path]:
    """Calibrations of both forms of byte input."""
    for name in ("image", "uint8"):
        arguments = ["calib", "run", str(files / f"{name}.onnx"), str(files / "photos"), "-o", str(files / f"{name}.calib")]
        assert main(arguments) == 0
    return {name: files / f"{name}.calib" for name in ("image", "uint8")}


def test_a_calibration_serves_both_forms(made: Made, files: Path, calibrations: dict[str, Path], tmp_path: Path) -> None:
    scales = [load_calibration(path).scales for path in calibrations.values()]
    assert scales[0].keys() == scales[1].keys()
    assert scales[0] != scales[1], "the pixels of the image form are not rounded"
    for name, calibration in calibrations.items():
        for form_ in ("image", "uint8"):
            output = tmp_path / f"{form_}-{name}.onnx"
            arguments = ["surgery", str(made.plain), "-o", str(output), "--input", form_, "--qdq"]
            assert main([*arguments, "--calibration", str(calibration)]) == 0
            assert load_model(output)[1].int8_convolutions == 5


def test_channel_means_are_those_of_the_float_form(files: Path) -> None:
    histograms = collect(files / "image.onnx", photos(files))
    ranges = {name: Range(np.float32(0.02), one.exponent) for name, one in histograms.histograms.items()}
    ranges["images"] = ranges["images_float"]
    result, expected = (
        measure_channel_means(files / f"{name}.onnx", photos(files), ranges).channel_means(ranges)
        for name in ("image", "float")
    )
    assert ["images", *list(result)[1:]] == list(expected)
    for one, other in zip(result.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_int8_changes_scores_as_in_the_float_form(files: Path) -> None:
    histograms = collect(files / "image.onnx", photos(files))
    scales = {name: np.float32(0.02) for name in histograms.histograms}
    changes = []
    for name in ("image", "float"):
        network = load_network(files / f"{name}.onnx")
        reference = FloatReference(network, photos(files))
        calibration = Calibration({**scales, "images": np.float32(0.02)})
        changes.append((reference.change(calibration, chosen_fp_layers(network)), reference.change(calibration, [])))
        assert sum(operations(network).values()) == pytest.approx(1)
    assert changes[0] == changes[1]
    assert changes[0][1].scores > 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr("ctypes.CDLL", lambda _: fake)
    return fake


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorrt_calibrates_on_images_fitted_to_bytes(tmp_path: Path, files: Path, channels: int) -> None:
    """Of one size, as it must; the model's own fitting changes none of their pixels, one or three channels."""
    made = make(tmp_path, net(96, 64, channels=channels, letter_box=1) + MADE_BODY)
    model = made.transformed(input="image")
    image, as_bytes = info_of(model), info_of(made.transformed(input="uint8"))
    model = with_outputs(model, ["images_float"])
    pairs = zip(image_source(photos(files), image)._batches, image_source(photos(files), as_bytes)._batches, strict=True)
    for batch, other in pairs:
        assert set(batch) == {"images", "score_threshold", "iou_threshold"}
        assert batch["images"].shape == (1, 64, 96, 3)
        pixels = run(with_outputs(made.transformed(input="uint8"), ["images_float"]), dict(other))["images_float"]
        assert run(model, dict(batch))["images_float"].tobytes() == pixels.tobytes()


# --- comparing ---


def test_it_agrees_with_the_other_forms(files: Path) -> None:
    variants = [onnx_variant(files / f"{name}.onnx", name=name) for name in ("uint8", "image", "float")]
    images = [load_image(path, variants[0].info) for path in photos(files)]
    agreement = compare(variants, images, thresholds=Thresholds(0.01, 0.45))
    assert agreement.passed, agreement.to_table()
    for one in agreement.variants:
        assert max(error.worst for error in one.tensors.values()) == 0
        assert one.detections and one.detections.expected > 0 and one.detections.iou == 1.0


def test_random_images_to_time_have_the_usual_size(files: Path) -> None:
    info = load_model(files / "image.onnx")[1]
    inputs = random_inputs(replace(info, image_sizes=((1, 1), (30, 20), (64, 64))), 2)
    assert inputs["images"].shape == (2, 20, 30, 3) and set(inputs) == {"images", "score_threshold", "iou_threshold"}


# --- lowering ---

TARGETS = {
    "8.6": Target("trt", (8, 6, 1)),
    "10.3": Target("trt", (10, 3, 0)),
    "10.14": Target("trt", (10, 14, 1)),
    "10.14, strong": Target("trt", (10, 14, 1)).typed_strongly(),
    "11": Target("trt", (11, 0, 0)),
    "rtx": Target("rtx", (1, 7, 1)),
}


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", TARGETS)
def test_levels_are_cast_to_the_type_of_the_precision(made: Made, name: str, precision: Any) -> None:
    """The one cast that reads uint8; pixels, placement and boxes stay float32 whatever the precision."""
    target = TARGETS[name]
    model = made.transformed(input="image", mish="plugin")
    model = lower(model, info_of(model), target, precision)
    kinds = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    assert kinds == (
        {} if name == "rtx" else {"MishPlugin": 6, "PreprocessPlugin": 1, "YoloDetectPlugin": 1, "PlaceBoxesPlugin": 1}
    )
    assert len(model.functions) == (0 if target.bodies in ("drop", "inline") else 4)
    if target.bodies == "drop":
        return
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    levels = TensorProto.FLOAT if precision == "fp32" else TensorProto.FLOAT16
    assert (types["images"], types["images_levels"]) == (TensorProto.UINT8, levels)
    readers = [node.op_type for node in model.graph.node if "images" in node.input]
    assert readers == ["Cast"]
    inner = ("images_float", "image_size", "placement", "network_boxes", "boxes", "scores")
    assert {types[tensor] for tensor in inner if tensor in types} == {TensorProto.FLOAT}
    assert {"images_float", "placement", "network_boxes"} <= types.keys()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_lowering_for_rtx_changes_no_pixel(forms: dict[str, Form], height: int, width: int, precision: str) -> None:
    """Half holds levels exactly, and the arithmetic on them is float32; boxes move as heads in half move them."""
    inputs = {"images": images_of(height, width), **thresholds(0.01)}
    expected, result = forms["image"].run(inputs), forms[precision].run(inputs)
    for name in FITTED if precision == "fp16" else expected:
        np.testing.assert_array_equal(result[name], expected[name])
    if precision == "fp16":
        assert result["boxes"].dtype == np.float32
        assert relative_error(result["scores"][0, :1], expected["scores"][0, :1]) <= 5 * HALF_TOLERANCE


# --- builds ---


def test_full_tensorrt_gets_ranges_of_sizes(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "8.6.1", plugins=PLUGINS)
    source, plan = tmp_path / "a.onnx", tmp_path / "a.plan"
    sizes = ((40, 32), (640, 480), (1920, 1080))
    insert_plugins(made.plain, source, SurgeryOptions(input="image", image_sizes=sizes))
    manifest = build_file(source, plan, BuildOptions("fp16", "auto"))
    assert trt.config.profiles == [{"images": [(1, 32, 40, 3), (3, 480, 640, 3), (3, 1080, 1920, 3)]}]
    assert {"PlaceBoxesPlugin:1", "PreprocessPlugin:1", "YoloDetectPlugin:1"} < set(manifest.plugins)
    assert manifest.info.image_sizes == sizes
    assert "40 x 32 to 1920 x 1080, usually 640 x 480" in describe_plan(plan)
    others = ((64, 64), (64, 64), (64, 64))
    manifest = build_file(source, plan, BuildOptions("fp16", "auto", batch=(1, 2, 2), image_sizes=others))
    assert trt.config.profiles == [{"images": [(1, 64, 64, 3), (2, 64, 64, 3), (2, 64, 64, 3)]}]
    assert manifest.info.image_sizes == others


def test_a_static_batch_has_ranges_of_sizes_too(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "10.3.0", plugins=PLUGINS)
    static = make(tmp_path, made.cfg.read_text(), batch=(2, 2, 2))
    insert_plugins(static.plain, tmp_path / "a.onnx", SurgeryOptions(input="image"))
    build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "auto"))
    assert trt.config.profiles == [{"images": [(2, 32, 32, 3), (2, 720, 1280, 3), (2, 4096, 4096, 3)]}]


def test_sizes_of_an_engine_that_has_one_are_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, "8.6.1", plugins=PLUGINS)
    options = BuildOptions("fp16", "auto", image_sizes=IMAGE_SIZES)
    with pytest.raises(DarktrtError, match="the model accepts only images fitted to 96x64; run surgery again") as caught:
        build_file(files / "uint8.onnx", tmp_path / "a.plan", options)
    assert caught.value.argument == "image_sizes"
    with pytest.raises(DarktrtError, match="64x64 32x32 99x99: write smallest"):
        BuildOptions(image_sizes=((64, 64), (32, 32), (99, 99)))


def test_int8_by_a_calibration(
    files: Path,
    calibrations: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every tensor of the calibration is in the network, whichever form it was calibrated with."""
    for calibration in calibrations.values():
        trt = full(monkeypatch, "8.6.1", plugins=PLUGINS)
        arguments = ["engine", str(files / "image.onnx"), "-o", str(tmp_path / "a.plan"), "--target", "trt"]
        sizes = ["--image-sizes", "32", "96x64", "128"]
        assert main([*arguments, "--precision", "int8", "--calibration", str(calibration), *sizes]) == 0
        assert trt.config.profiles == [{"images": [(1, 32, 32, 3), (3, 64, 96, 3), (3, 128, 128, 3)]}]
        assert trt.config.calibration_profile == {"images": [(3, 64, 96, 3)] * 3}
        assert caplog.messages == []


def test_int8_by_tensorrts_own_calibration(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: FakeDriver
) -> None:
    trt = full(monkeypatch, "8.6.1", plugins=PLUGINS)
    info = load_model(files / "image.onnx")[1]
    with image_source(photos(files), info) as source:
        build_file(files / "image.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), GpuCalibration(source))
    assert trt.config.calibration_profile == {"images": [(1, 64, 96, 3)] * 3}
    assert source.count == len(photos(files))
    odd = BatchSource([info.model_inputs(images_of(60, 96), [], Thresholds())], batch=1)
    with pytest.raises(DarktrtError, match=r"'images' is \(1, 60, 96, 3\) uint8, not \(1, 64, 96, 3\) uint8"), odd as source:
        build_file(files / "image.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), GpuCalibration(source))


@pytest.mark.parametrize("bodies", [False, True])
def test_a_weakly_typed_engine_fits_and_places_in_float32(made: Made, monkeypatch: pytest.MonkeyPatch, bodies: bool) -> None:
    """By layers pinned to it; the plugin that fits images states its types itself."""
    trt = full(monkeypatch, "10.14.1", plugins=PLUGINS)
    target = Target("trt", (10, 14, 1))
    model = made.transformed(input="image", mish="native")
    info = info_of(model)
    target = target.without_plugins() if bodies else target
    lowered = lower(model, info, target, "fp16")
    build(lowered.SerializeToString(), info, target, BuildOptions("fp16"))
    pinned = [layer for layer in trt.network.layers if layer.precision is not None]
    assert {layer.precision.name for layer in pinned} == {"FLOAT"}
    if not bodies:
        assert [layer.name for layer in pinned] == ["yolo_detect", "place_boxes"]
        return
    names = {"images_float", "image_size", "placement", "boxes"}
    assert all(trt.network.by_output(name).precision.name == "FLOAT" for name in names)
    for node in lowered.graph.node:
        if node.op_type == "Conv":
            assert trt.network.by_output(node.output[0]).precision is None


@rtx
@pytest.mark.parametrize(("precision", "batch"), [("fp32", "dynamic"), ("fp16", "static"), ("int8", "dynamic")])
def test_rtx_builds_it(tmp_path: Path, files: Path, calibrations: dict[str, Path], precision: Any, batch: str) -> None:
    """INT8 from a calibration; the next test has Q/DQ nodes in the file."""
    made = make(tmp_path, net(96, 64) + MADE_BODY, batch=(2, 2, 2) if batch == "static" else (1, 2, 4))
    source, plan = tmp_path / "a.onnx", tmp_path / "a.plan"
    insert_plugins(made.plain, source, SurgeryOptions(input="image"))
    arguments = ["engine", str(source), "-o", str(plan), "--target", "rtx", "--precision", precision]
    assert main([*arguments, *(["--calibration", str(calibrations["image"])] if precision == "int8" else [])]) == 0
    assert plan.stat().st_size > 10_000


@rtx
def test_rtx_builds_every_network_and_qdq_nodes(network: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, quantized = tmp_path / "a.onnx", tmp_path / "q.onnx"
    insert_plugins(network.plain, source, SurgeryOptions(input="image"))
    Image.fromarray(made_image(128, 192)).save(tmp_path / "0.png")
    histograms = collect(source, [tmp_path / "0.png"])
    calibration = Calibration({name: np.float32(0.02) for name in histograms.histograms})
    report = insert_plugins(network.plain, quantized, SurgeryOptions(input="image", calibration=calibration))
    if report.int8 and report.int8.quantized:
        build_file(quantized, tmp_path / "q.plan", BuildOptions("int8", "rtx"))
    build_file(source, tmp_path / "a.plan", BuildOptions("fp16", "rtx"))
