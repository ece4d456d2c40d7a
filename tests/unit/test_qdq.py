"""INT8 by Q/DQ nodes: where they stand, what they compute, and that TensorRT for RTX builds them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from helpers import (
    RESIDUAL_CFG,
    Array,
    Made,
    as_float,
    batch_of_images,
    conv,
    files_in,
    head,
    make,
    net,
    relative_error,
    run,
    section,
    thresholds,
    with_outputs,
)
from onnx import TensorProto, numpy_helper
from PIL import Image

from darktrt.calib.bias_correction import ChannelMeans
from darktrt.calib.graph import tensors_to_calibrate
from darktrt.calib.table import CalibrationTable
from darktrt.cli import main
from darktrt.engine.layer_list import asked_for, convolution_precisions
from darktrt.engine.lower import lower
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target
from darktrt.engine.trt_builder import build
from darktrt.errors import DarktrtError
from darktrt.pipeline import load_calibration
from darktrt.surgery.qdq import Calibration, default_fp_layers, half_scale, quantize
from darktrt.surgery.rewrite import SurgeryOptions, transform

RTX = Target("rtx", (1, 7, 1))
INT8_TOLERANCE = 0.25
"""Of the raw heads of a small random network: a few per cent a layer, seven layers, worst element against the largest."""


@pytest.fixture(scope="module")
def scales(made: Made) -> dict[str, np.float32]:
    return scales_of(made)


def scales_of(made: Made) -> dict[str, np.float32]:
    """amax / 127 of every tensor over a few images."""
    names = tensors_to_calibrate(made.model(), made.info)
    outputs = [name for name in names if name != "images"]
    images = as_float(batch_of_images(made.info, 3))
    values = run(with_outputs(made.model(), outputs), {"images": images}) | {"images": images}
    return {name: np.float32(np.abs(values[name]).max() / 127) for name in names}


def quantized(
    made: Made, scales: dict[str, np.float32], fp_layers: tuple[str, ...] | None = None
) -> tuple[onnx.ModelProto, object]:
    options = SurgeryOptions(head="raw", input="float", calibration=Calibration(scales, fp_layers))
    model, report = transform(made.model(), made.info, options)
    onnx.checker.check_model(model, full_check=True)
    return model, report.int8


def convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Conv"]


def test_all_but_the_first_and_the_heads_are_quantized(made: Made, scales: dict[str, np.float32]) -> None:
    model, report = quantized(made, scales)
    producers = {output: node for node in model.graph.node for output in node.output}
    heads = {head.tensor for head in made.info.heads}
    for node in convolutions(model):
        inputs = [producers.get(name) for name in node.input[:2]]
        fp_layers = node.input[0] == "images" or heads & set(node.output)
        assert [i is not None and i.op_type == "DequantizeLinear" for i in inputs] == [not fp_layers, not fp_layers], node.name
    assert len(report.fp_layers) == 3  # type: ignore[attr-defined]
    assert len(report.quantized) + 3 == len(convolutions(model))  # type: ignore[attr-defined]


def test_a_tensor_is_quantized_once_however_many_read_it(made: Made, scales: dict[str, np.float32]) -> None:
    model, _ = quantized(made, scales, ())
    sources = Counter(node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert set(sources.values()) == {1}
    assert set(sources) == {node.input[0] for node in convolutions(made.model())}


def test_weights_are_int8_with_a_scale_a_filter(made: Made, scales: dict[str, np.float32]) -> None:
    model, _ = quantized(made, scales, ())
    plain = {i.name: numpy_helper.to_array(i) for i in made.model().graph.initializer}
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    weights = [name for name, values in plain.items() if values.ndim == 4]
    for name in weights:
        levels, scale = stored[f"{name}_int8"], stored[f"{name}_scale"]
        assert levels.dtype == np.int8
        assert scale.shape == (len(levels),)
        assert set(np.abs(levels.astype(int)).max((1, 2, 3))) <= {126, 127}  # 126 where FP16 rounds the scale up
        restored = levels.astype(np.float32) * scale[:, None, None, None]
        assert (np.abs(restored - plain[name]) <= 0.51 * scale[:, None, None, None]).all()
        assert name not in stored


def test_raw_heads_stay_near(made: Made, scales: dict[str, np.float32]) -> None:
    images = {"images": as_float(batch_of_images(made.info, 3))}
    exact = run(transform(made.model(), made.info, SurgeryOptions(head="raw", input="float"))[0], images)
    for fp_layers in (None, ()):
        result = run(quantized(made, scales, fp_layers)[0], images)
        for name, expected in exact.items():
            assert 0 < relative_error(result[name], expected) < INT8_TOLERANCE


def test_wrong_scales_are_noticed(made: Made, scales: dict[str, np.float32]) -> None:
    """The tolerance above detects a table of other numbers."""
    images = {"images": as_float(batch_of_images(made.info, 3))}
    exact = run(transform(made.model(), made.info, SurgeryOptions(head="raw", input="float"))[0], images)
    result = run(quantized(made, {name: np.float32(scale / 8) for name, scale in scales.items()})[0], images)
    assert max(relative_error(result[name], exact[name]) for name in exact) > INT8_TOLERANCE


def test_scales_survive_fp16() -> None:
    values = np.geomspace(1e-9, 1e9, 999).astype(np.float32)
    rounded = half_scale(values)
    assert rounded.dtype == np.float32
    assert (rounded > 0).all()
    assert np.isfinite(rounded).all()
    np.testing.assert_array_equal(rounded, rounded.astype(np.float16))


@pytest.mark.parametrize("already", [False, True])
def test_tensorrt_for_rtx_builds_int8(made: Made, scales: dict[str, np.float32], already: bool) -> None:
    """From a model without and with Q/DQ nodes; the input of every convolution but the floating-point layers is INT8."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    table = {**scales, "images_float": scales["images"]}
    model, report = transform(made.model(), made.info, SurgeryOptions(calibration=Calibration(table) if already else None))
    lowered = lower(model, report.info, RTX, "int8", None if already else Calibration(table))
    onnx.checker.check_model(lowered, full_check=True)
    graph = onnx.shape_inference.infer_shapes(lowered, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    for node in lowered.graph.node:
        if node.op_type == "QuantizeLinear":
            assert (types[node.input[0]], types[node.output[0]]) == (TensorProto.FLOAT16, TensorProto.INT8)
    assert sum(node.op_type == "QuantizeLinear" for node in lowered.graph.node) > 0
    plan, layers, _ = build(lowered.SerializeToString(), report.info, RTX, BuildOptions("int8"))
    assert len(plan) > 10_000
    asked = asked_for(lowered)
    assert sorted(asked.values()) == [False] * 3 + [True] * 6
    assert {one.node: one.int8 for one in convolution_precisions(layers, asked, RTX)} == asked


# --- sections and options that few networks have ---


RARE_CFG = (
    net(96, 64)
    + conv(8, stride=2, antialiasing=1)
    + conv(16, activation="leaky")
    + conv(16, activation="leaky")
    + conv(16, activation="relu", share_index=2)
    + section("batchnorm")
    + section("activation", activation="swish")
    + section("maxpool", size=2, stride=2, antialiasing=2)
    + conv(16, activation="leaky", xnor=1, bin_output=1)
    + conv(32, activation="leaky", xnor=1)
    + section("maxpool", maxpool_depth=1, out_channels=16)
    + conv(16, stride=1, binary=1)
    + section("route_lhalf", layers="-1,-2")
    + conv(16)
    + section("implicit", filters=16)
    + section("scale_channels", **{"from": -2})
    + section("upsample", stride=-2)
    + head()
)


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("rare"), RARE_CFG, batch=(1, 3, 3))


def test_convolutions_that_share_weights_share_them_in_int8_too(rare: Made) -> None:
    """Their inputs differ, and with them the corrections of their biases."""
    scales = scales_of(rare)
    names = [node.input[0] for node in convolutions(rare.model())]
    means = {name: ChannelMeans(np.full(16, 0.1), np.full(16, 0.2 + i)) for i, name in enumerate(names[3:5])}
    calibration = Calibration(scales, (), means)
    model, _ = transform(rare.model(), rare.info, SurgeryOptions(head="raw", input="float", calibration=calibration))
    onnx.checker.check_model(model, full_check=True)
    first, second = convolutions(model)[3:5]
    assert [first.name, second.name] == ["/layers.2/Conv", "/layers.3/Conv"]
    assert first.input[1] == second.input[1] == "model.layers.2.weight_dequantized"
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    assert not np.array_equal(stored[first.input[2]], stored[second.input[2]])
    assert sum(node.output[0] == first.input[1] for node in model.graph.node) == 1


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_tensorrt_for_rtx_builds_rare_sections(rare: Made, precision: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    table = scales_of(rare)
    calibration = Calibration({**table, "images_float": table["images"]}) if precision == "int8" else None
    model, report = transform(rare.model(), rare.info, SurgeryOptions())
    lowered = lower(model, report.info, RTX, precision, calibration)
    onnx.checker.check_model(lowered, full_check=True)
    plan, layers, _ = build(lowered.SerializeToString(), report.info, RTX, BuildOptions(precision))
    assert len(plan) > 10_000
    if calibration:
        asked = asked_for(lowered)
        assert {one.node: one.int8 for one in convolution_precisions(layers, asked, RTX)} == asked


# --- forms of Mish ---


FORMS = ("plugin", "fused", "native", "auto")


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("residual"), RESIDUAL_CFG, batch=(1, 3, 3))


@pytest.mark.parametrize("form", FORMS)
def test_a_table_serves_every_form_of_mish(residual: Made, form: str) -> None:
    """Q/DQ nodes stand at the same tensors, with the same numbers, and nothing that is detected differs."""
    table = scales_of(residual)
    calibration = Calibration({**table, "images_float": table["images"]}, ())
    given = {"images": batch_of_images(residual.info, 3), **thresholds(0.05)}

    def of(mish: str) -> tuple[list[tuple[str, ...]], dict[str, Array]]:
        model = residual.transformed(mish=mish, calibration=calibration)
        quantizers = [tuple(node.input) for node in model.graph.node if node.op_type == "QuantizeLinear"]
        return sorted(quantizers), run(model, given)

    (nodes, result), (expected_nodes, expected) = of(form), of("plugin")
    assert nodes == expected_nodes
    assert len(nodes) > 5
    assert expected["num_detections"].min() > 0
    for name, array in result.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5)


def test_q_dq_behind_what_took_mish_in(residual: Made) -> None:
    table = scales_of(residual)
    model = residual.transformed(mish="fused", input="float", calibration=Calibration(table, ()))
    producers = {output: node for node in model.graph.node for output in node.output}
    read = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] != "images"]
    result = Counter(producers[name].op_type for name in read)
    assert result == Counter(MishAddPlugin=2, MishConcatPlugin=1, MishPlugin=5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_tensorrt_for_rtx_builds_every_form_of_mish(residual: Made, form: Any, precision: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    table = scales_of(residual)
    calibration = Calibration({**table, "images_float": table["images"]}) if precision == "int8" else None
    model, report = transform(residual.model(), residual.info, SurgeryOptions(mish=form))
    lowered = lower(model, report.info, RTX, precision, calibration)
    onnx.checker.check_model(lowered, full_check=True)
    assert not [node for node in lowered.graph.node if node.domain]
    plan, layers, _ = build(lowered.SerializeToString(), report.info, RTX, BuildOptions(precision))
    assert len(plan) > 10_000
    if calibration:
        asked = asked_for(lowered)
        assert {one.node: one.int8 for one in convolution_precisions(layers, asked, RTX)} == asked


def test_mistakes_are_reported(made: Made, scales: dict[str, np.float32]) -> None:
    graph = gs.import_onnx(made.model())
    with pytest.raises(DarktrtError, match=r"no scale for \d+ tensors of this network, '.+' among them"):
        quantize(graph, made.info, Calibration({}, ()))
    with pytest.raises(DarktrtError, match="'/no/Conv' is no convolution of this network"):
        quantize(graph, made.info, Calibration(scales, ("/no/Conv",)))
    damaged = gs.import_onnx(made.model())
    next(node for node in damaged.nodes if node.op == "Conv").inputs[1].values[0, 0, 0, 0] = np.nan
    with pytest.raises(DarktrtError, match=r"the weights of '/layers\.0/Conv' are NaN or infinite; convert the network again"):
        quantize(damaged, made.info, Calibration(scales, ()))
    model, report = transform(made.model(), made.info, SurgeryOptions())
    with pytest.raises(DarktrtError, match="INT8 needs a calibration"):
        lower(model, report.info, RTX, "int8")
    assert len(default_fp_layers(graph, made.info)) == 3


def test_from_images_to_an_int8_engine(made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    Path("photos").mkdir()
    for i, image in enumerate(batch_of_images(made.info, 3)):
        Image.fromarray(image).save(f"photos/{i}.png")
    for command in (
        f"surgery {made.plain} -o portable.onnx",
        "calib run portable.onnx photos -o calibration.calib",
        "engine portable.onnx -o int8.plan --precision int8 --calibration calibration.calib",
        f"surgery {made.plain} -o qdq.onnx --qdq --calibration calibration.calib",
        "calib merge calibration.calib -o merged.calib",
        "calib show calibration.calib --plot histograms.png",
        "calib export calibration.calib -o calibration.cache",
    ):
        assert main(command.split()) == 0, capsys.readouterr().err
    output = capsys.readouterr()
    before = files_in(folder), Path("portable.onnx").read_bytes()
    for command in (
        "calib run portable.onnx photos -o portable.onnx",
        "calib merge calibration.calib -o calibration.calib",
        "calib export calibration.calib -o calibration.calib",
        "calib show calibration.calib --plot calibration.calib",
    ):
        assert main(command.split()) == 2
        assert "is given twice and would be overwritten" in capsys.readouterr().err
    assert (files_in(folder), Path("portable.onnx").read_bytes()) == before
    assert "3 images are few to calibrate on" in output.err
    assert "convolutions in INT8; in floating point: " in output.out
    assert Path("merged.calib").read_bytes() == Path("calibration.calib").read_bytes()
    assert CalibrationTable.load("calibration.cache").scales == load_calibration("calibration.calib").scales
    assert Path("calibration.cache").read_text().startswith("TRT-8600-EntropyCalibration2\n")
    assert {"int8.plan", "int8.json", "qdq.onnx", "histograms.png"} <= set(files_in(folder))
