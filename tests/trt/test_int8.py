"""INT8 by a calibrator on a real TensorRT 8.6 to 10: a calibration cache, batches, and failures while feeding.

Needs onnx, onnx-graphsurgeon and numpy beside TensorRT, neither torch nor ONNX Runtime:

    PYTHONPATH=. python -m pytest --confcutdir=tests/trt tests/trt

DARKTRT_TACTIC_SOURCES is given to every build, as ``--tactic-sources`` is.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from darktrt.calib.bias_correction import ChannelMeans
from darktrt.calib.table import CalibrationTable
from darktrt.calib.trt_calibrator import BatchSource, TableSource
from darktrt.engine import build as build_module
from darktrt.engine.build import build_file
from darktrt.engine.lower import fp_tensors
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target, find_target, gpu_name, installed_version
from darktrt.engine.trt_builder import build
from darktrt.engine.weak_typing import Calibrated
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo, HeadInfo
from darktrt.surgery.qdq import Calibration

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(installed_version("trt") is None, reason="TensorRT is not installed"),
    pytest.mark.skipif(gpu_name() is None, reason="no NVIDIA GPU is usable here"),
]

BATCH, SIDE, CHANNELS, DEPTH = 8, 128, 128, 5
"""Large enough that INT8 and FP16 are about as fast in a convolution of CHANNELS to CHANNELS, on an H200.

TensorRT chooses what it measures as faster: there INT8 for all four of them in two runs of three, FP16 in the third. So these
tests assert that convolutions that must not be INT8 are not, and that the manifest reports the engine.
"""
FP_LAYERS = ("conv_0", f"conv_{DEPTH}")
Arrays = dict[str, NDArray[Any]]


def model(batch: int | str = BATCH) -> tuple[onnx.ModelProto, DetectorInfo]:
    """DEPTH convolutions with LeakyReLU, the first at stride 2, and one that computes a raw head of 3 anchors and 1 class."""
    random, nodes, constants, last = np.random.default_rng(0), [], [], "images"
    for i in range(DEPTH + 1):
        filters, size = (18, 1) if i == DEPTH else (CHANNELS, 3)
        channels, stride, name = 3 if i == 0 else CHANNELS, 2 if i == 0 else 1, f"c{i}"
        spread = (2 / (channels * size * size)) ** 0.5
        weight = random.normal(0, spread, (filters, channels, size, size)).astype(np.float32)
        constants += [numpy_helper.from_array(weight, f"w{i}"), numpy_helper.from_array(np.zeros(filters, np.float32), f"b{i}")]
        pads, strides = [size // 2] * 4, [stride] * 2
        inputs = [last, f"w{i}", f"b{i}"]
        nodes.append(helper.make_node("Conv", inputs, [name], f"conv_{i}", pads=pads, strides=strides))
        last = name
        if i < DEPTH:
            nodes.append(helper.make_node("LeakyRelu", [name], [f"a{i}"], f"leaky_{i}", alpha=0.1))
            last = f"a{i}"
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])
    raw = helper.make_tensor_value_info(last, TensorProto.FLOAT, [batch, 18, SIDE // 2, SIDE // 2])
    made = helper.make_model(helper.make_graph(nodes, "g", [images], [raw], constants), ir_version=8)
    made.opset_import[0].version = 17
    anchors = ((6.0, 9.0), (14.0, 20.0), (30.0, 35.0))
    head = HeadInfo(last, 1, anchors, (0, 1, 2), 1, 1.0, False, SIDE // 2, SIDE // 2)
    batches = (BATCH,) * 3 if batch == BATCH else (1, BATCH, BATCH)
    info = DetectorInfo.from_json(
        json.dumps(
            {
                "name": "made",
                "width": SIDE,
                "height": SIDE,
                "channels": 3,
                "batch": batches,
                "resize": "stretch",
                "mish_count": 0,
                "heads": [vars(head)],
                "nms": {},
                "class_names": ["thing"],
                "parameters": 0,
                "gflops": 0.0,
                "head": "raw",
            }
        ),
        "made",
    )
    helper.set_model_props(made, {METADATA_KEY: info.to_json()})
    return made, info


def images(seed: int) -> Arrays:
    return {"images": np.random.default_rng(seed).random((BATCH, 3, SIDE, SIDE), np.float32)}


def names() -> list[str]:
    return ["images", *(f"{kind}{i}" for i in range(DEPTH) for kind in "ca"), f"c{DEPTH}"]


SCALES = {name: np.float32(1 / 127 if name == "images" else 4 / 127) for name in names()}


@pytest.fixture(scope="module")
def target() -> Target:
    found = find_target("trt")
    if not found.weakly_typed:
        pytest.skip(f"{found} has no INT8 calibrators")
    return found


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> BuildOptions:
    """With measured times kept from test to test."""
    return BuildOptions(
        "int8",
        "trt",
        None,
        os.environ.get("DARKTRT_TACTIC_SOURCES"),
        2,
        tmp_path_factory.mktemp("times") / "timing.cache",
    )


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("int8") / "made.onnx"
    onnx.save(model()[0], str(file))
    return file


def layers_of(plan: bytes, target: Target) -> list[dict[str, Any]]:
    """The engine inspector's layers."""
    trt = target.load()
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers: list[dict[str, Any]] = json.loads(text, strict=False)["Layers"]
    assert all(isinstance(layer, dict) for layer in layers), "the plan was built without its layers' details"
    return layers


def convolutions(plan: bytes, target: Target) -> dict[str, bool]:
    """Every convolution, by its ONNX node's name, and whether it reads INT8 and has INT8 weights."""
    found = {}
    for layer in layers_of(plan, target):
        copies = layer["LayerType"] in ("Reformat", "NoOp") or layer["Name"].startswith("Reformat")
        for name in re.findall(r"\bconv_\d+\b", "" if copies else layer["Name"]):
            kinds = [layer["Inputs"][0]["Format/Datatype"], layer.get("Weights", {}).get("Type", "Int8")]
            found[name] = all("int8" in kind.lower() for kind in kinds if kind != "N/A due to dynamic shapes")
    return found


def test_the_version_in_caches_is_the_librarys_own(target: Target) -> None:
    target.load()
    library = ctypes.CDLL(f"libnvinfer.so.{target.version[0]}")
    assert target.cache_version == str(library.getInferLibVersion())


def assert_fp_layers(found: dict[str, bool], fp_layers: tuple[str, ...]) -> None:
    """All convolutions are found, and those to keep are not in INT8."""
    assert set(found) == {f"conv_{i}" for i in range(DEPTH + 1)}
    assert not any(found[name] for name in fp_layers)


@pytest.mark.parametrize("batch", ["static", "dynamic"])
def test_a_table_needs_no_image(
    target: Target, options: BuildOptions, onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: str
) -> None:
    """TensorRT asks for no batch, and the manifest reports each convolution as the engine does."""
    asked = []
    monkeypatch.setattr(TableSource, "next_batch", lambda *_: asked.append(1))
    if batch == "dynamic":
        onnx_file = tmp_path / "dynamic.onnx"
        onnx.save(model("N")[0], str(onnx_file))
    manifest = build_file(onnx_file, tmp_path / "a.plan", options, Calibration(SCALES))
    assert not asked
    found = convolutions((tmp_path / "a.plan").read_bytes(), target)
    assert_fp_layers(found, FP_LAYERS)
    assert manifest.precision == "int8"
    assert set(manifest.int8_convolutions) == {name for name, int8 in found.items() if int8}
    others = {name for name, int8 in found.items() if not int8}
    assert manifest.other_convolutions == {
        name: "left in FP16" if name in FP_LAYERS else "TensorRT chose FP16, faster here" for name in others
    }


def zero_means() -> dict[str, ChannelMeans]:
    """Channel means by which no mean shifts, of the inputs of all convolutions."""
    graph = model()[0].graph
    channels = {constant.name: constant.dims[1] for constant in graph.initializer if len(constant.dims) == 4}
    zeros = {node.input[0]: np.zeros(channels[node.input[1]]) for node in graph.node if node.op_type == "Conv"}
    return {name: ChannelMeans(zero, zero) for name, zero in zeros.items()}


def test_biases_are_corrected_of_what_runs_in_int8(
    target: Target, options: BuildOptions, onnx_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a build that chooses as the one before it did."""
    calibration = Calibration(SCALES, channel_means=zero_means())
    manifest = build_file(onnx_file, tmp_path / "a.plan", options, calibration)
    assert manifest.corrected_biases == manifest.int8_convolutions
    assert "biases" not in caplog.text


@pytest.mark.parametrize("fp_layers", [None, ("conv_2",), ()], ids=["usual", "one", "none"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_forced_int8_is_in_all_convolutions_that_are_meant(
    target: Target,
    options: BuildOptions,
    onnx_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    batch: int,
    fp_layers: tuple[str, ...] | None,
) -> None:
    """Whatever is faster, at a batch of 1 too; by the engine's own list of layers, with corrected biases."""
    if batch == 1:
        onnx_file = tmp_path / "dynamic.onnx"
        onnx.save(model("N")[0], str(onnx_file))
    forced = replace(options, force_int8=True, batch=(1, batch, BATCH) if batch == 1 else None)
    manifest = build_file(onnx_file, tmp_path / "a.plan", forced, Calibration(SCALES, fp_layers, zero_means()))
    found = convolutions((tmp_path / "a.plan").read_bytes(), target)
    left = FP_LAYERS if fp_layers is None else fp_layers
    assert found == {f"conv_{i}": f"conv_{i}" not in left for i in range(DEPTH + 1)}
    assert set(manifest.int8_convolutions) == set(manifest.corrected_biases) == {name for name, int8 in found.items() if int8}
    assert manifest.force_int8 and not manifest.int8_warning and caplog.messages == []


def test_floating_point_layers_can_be_chosen(target: Target, options: BuildOptions, onnx_file: Path, tmp_path: Path) -> None:
    build_file(onnx_file, tmp_path / "a.plan", options, Calibration(SCALES, ("conv_2",)))
    assert_fp_layers(convolutions((tmp_path / "a.plan").read_bytes(), target), ("conv_2",))


def test_fed_batches_outputs_a_cache_that_goes_round(
    target: Target, options: BuildOptions, onnx_file: Path, tmp_path: Path
) -> None:
    made, info = model()
    fp_layers = fp_tensors(made, info, Calibration(SCALES))
    with BatchSource((images(seed) for seed in range(4)), BATCH) as source:
        plan = build(made.SerializeToString(), info, target, options, Calibrated(source, fp_layers)).plan
    assert source.count == 4
    (tmp_path / "trt.cache").write_bytes(source.cache)
    table = CalibrationTable.load(tmp_path / "trt.cache")
    table.save(tmp_path / "again.cache")
    assert (tmp_path / "again.cache").read_bytes() == source.cache
    assert table.version == target.cache_version
    assert not table.compare(names()).missing
    assert table.scales["images"] == pytest.approx(1 / 127, rel=0.1)
    assert_fp_layers(convolutions(bytes(plan), target), FP_LAYERS)
    build_file(onnx_file, tmp_path / "a.plan", options, Calibration(table.scales))


def fails_at_third(error: Exception) -> Iterator[Arrays]:
    yield from (images(0), images(1))
    raise error


def third(images_array: NDArray[Any]) -> list[Arrays]:
    return [images(0), images(1), {"images": images_array}]


FAILURES: dict[str, tuple[Callable[[], Any], str]] = {
    "exception": (lambda: fails_at_third(OSError("disk gone")), r"calibration batch 3 cannot be read: OSError\('disk gone'\)"),
    "unreadable": (lambda: fails_at_third(DarktrtError("a.jpg: is empty")), "a.jpg: is empty"),
    "shape": (lambda: third(np.zeros((BATCH, SIDE, SIDE, 3), np.float32)), "batch 3: 'images' is .* not "),
    "short": (lambda: third(images(2)["images"][:3]), f"batch 3: .* the images must fill their batches of {BATCH}"),
    "nothing": (list, "there is no batch of images"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_while_feeding_leave_no_plan(
    target: Target, options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Through the whole of a build to a file, with the table's source replaced by one of batches."""
    batches, said = FAILURES[name]
    onnx.save(model()[0], str(tmp_path / "made.onnx"))
    with BatchSource(batches(), BATCH) as source, pytest.raises(DarktrtError, match=said):
        monkeypatch.setattr(build_module, "by_cache", lambda *_: Calibrated(source))
        build_file(tmp_path / "made.onnx", tmp_path / "a.plan", options, Calibration(SCALES))
    assert [file.name for file in tmp_path.iterdir()] == ["made.onnx"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_build_too(
    target: Target, options: BuildOptions, onnx_file: Path, tmp_path: Path, precision: Any
) -> None:
    own = BuildOptions(precision, "trt", None, options.tactic_sources, 0, tmp_path / "timing.cache")
    for _ in range(2):
        assert build_file(onnx_file, tmp_path / "a.plan", own).precision == precision
    assert (tmp_path / "timing.cache").stat().st_size > 0
    assert not any(convolutions((tmp_path / "a.plan").read_bytes(), target).values())
