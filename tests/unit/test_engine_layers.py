"""The precisions of an engine: layer lists as text and JSON, and real engines of TensorRT for RTX."""

from __future__ import annotations

import importlib.util
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import FakeTensorRT
from helpers import Made, files_in
from onnx import numpy_helper, parser

from darktrt.calib.bias_correction import ChannelMeans, corrected_bias
from darktrt.calib.graph import tensors_to_calibrate
from darktrt.calib.table import CalibrationTable
from darktrt.cli import main
from darktrt.engine import target as target_module
from darktrt.engine import timing_cache
from darktrt.engine.build import build_file
from darktrt.engine.describe import describe_plan
from darktrt.engine.layer_list import (
    UNKNOWN,
    EngineLayer,
    asked_for,
    convolution_precisions,
    engine_layers,
    few_in_int8,
    summary,
)
from darktrt.engine.manifest import read_plan_manifest
from darktrt.engine.options import BuildOptions
from darktrt.engine.target import Target
from darktrt.errors import DarktrtError
from darktrt.onnx_file import load_model
from darktrt.pipeline import DropBudget, build_engine
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)",
)
RTX, WEAK, STRONG = Target("rtx", (1, 7, 1)), Target("trt", (8, 6, 0)), Target("trt", (11, 0, 0))


# --- the text of TensorRT for RTX ---


def tensor(kind: str, name: str = "__mye1dconst_myl0") -> str:
    shape = "Dimensions: [1,32,8,8], Strides: [2048,1,256,32], StrideOrder: [3,0,2,1]"
    return f"{{ Name: {name}, {shape}, Datatype: {kind}, Format: (NHWC) Channel major format }}"


def line(name: str, kind: str, given: str, constants: str, metadata: str) -> str:
    """A line of the list; ``given`` and ``constants`` are datatypes, comma-separated."""
    lists = [", ".join(tensor(one) for one in text.split(",") if one) for text in (given, constants)]
    inputs, weights = (f"[ {text}]" if text else "[]" for text in lists)
    tail = f"Outputs: [ {tensor('Int8', 'y')}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    return f"Name: {name}, LayerType: {kind}, Inputs: {inputs}, Constants: {weights}, {tail}"


def nodes(*names: str) -> str:
    return "".join(f"[ONNX Layer: {name}]" for name in names)


LINES = {
    "memset": line("__mye16853_hc_init_myl0_0", "memset", "", "", ""),
    "cast": line("__myl_CastTranMulCastConc_myl0_4", "kgen", "UInt8", "Half,Float", nodes("images_cast", "/layers.0/Conv")),
    "first": line("/layers.0/Conv_myl0_5", "correlation", "Half", "Half,Float,Half", nodes("/layers.0/Conv")),
    "second": line("/layers.1/Conv_myl0_7", "correlation", "Int8", "Int8,Float", nodes("/layers.1/Conv", "w_dequantize")),
    "bias": line("__myl_MulCastAddMulMax_myl0_8", "kgen", "Float", "Half,Half", nodes("/layers.1/Conv", "/layers.1/LeakyRelu")),
    "fused": line(
        "__myl_CorrMulMax_myl0_9", "runtime_fusion", "Half", "Half,Half", nodes("/layers.2/Conv", "/layers.2/LeakyRelu")
    ),
    "matrix": line("__mye8128_myl0_162", "gemm", "Int8", "Int8,Float", nodes("/layers.3/Conv") + "__gemm_from_conv1x1"),
}
ASKED = {"/layers.0/Conv": False, "/layers.1/Conv": True, "/layers.2/Conv": True, "/layers.3/Conv": True}
END = "\n\nI/O Tensors:\n Name: images, IOMode: Input, DataType: UInt8\n\nEngine Metadata:\n Multi-Device: Disabled"


def text_of(**changes: str) -> str:
    return "\n".join(["Layers:", *(LINES | changes).values()]) + END


def found(text: str, target: Target = RTX) -> list[tuple[str, bool | None, str]]:
    return [(one.node.split(".")[1][0], one.int8, one.reason) for one in convolution_precisions(text, ASKED, target)]


def test_the_text_shows_what_each_convolution_became() -> None:
    assert found(text_of()) == [
        ("0", False, "left in FP16"),
        ("1", True, ""),
        ("2", False, "TensorRT computes in FP16"),
        ("3", True, ""),
    ]


CORRELATION = "/layers.1/Conv_myl0_7", "correlation"
STRANGE = {
    "another type of layer": line(CORRELATION[0], "conv", "Int8", "Int8,Float", nodes("/layers.1/Conv")),
    "another datatype": line(*CORRELATION, "Fp8", "Fp8,Float", nodes("/layers.1/Conv")),
    "weights of another datatype": line(*CORRELATION, "Half", "Int4,Float", nodes("/layers.1/Conv")),
    "mixed datatypes": line(*CORRELATION, "Int8", "Half,Float", nodes("/layers.1/Conv")),
    "no weights": line(*CORRELATION, "Int8", "", nodes("/layers.1/Conv")),
    "no input": line(*CORRELATION, "", "Int8", nodes("/layers.1/Conv")),
    "no metadata": line(*CORRELATION, "Int8", "Int8", ""),
    "another field": line(*CORRELATION, "Int8", "Int8", nodes("/layers.1/Conv")).replace("Inputs: ", "In: "),
    "a longer name": line(*CORRELATION, "Int8", "Int8", nodes("/layers.1/Conv_1", "x/layers.1/Conv")),
    "a fusion of what follows": line("__myl_MulMax_myl0_3", "runtime_fusion", "Half", "Half", nodes("/layers.1/Conv")),
    "twice, differently": "\n".join([LINES["second"], line(*CORRELATION, "Half", "Half", nodes("/layers.1/Conv"))]),
    "nothing": "",
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_the_text_lacks_is_unknown(case: str) -> None:
    assert [one[1] for one in found(text_of(second=STRANGE[case]))] == [False, None, False, True]


@pytest.mark.parametrize("text", ["", "Layers:\n", text_of()[1:], text_of().replace("LayerType", "Type"), "{}", "Layers: 7"])
def test_another_text_is_unknown_whole(text: str) -> None:
    assert {one[1:] for one in found(text)} == {(None, UNKNOWN)}


def test_a_layer_listed_twice_alike_is_known() -> None:
    """As for two optimization profiles."""
    assert [one[1] for one in found(text_of(again=LINES["second"]))] == [False, True, False, True]


# --- the JSON of the engine inspector ---


def layer(
    name: str, kind: str = "Int8", data: str = "Thirty-two wide channel vectorized row major Int8 format"
) -> dict[str, Any]:
    return {
        "Name": f"{name} + PWN({name[:9]}/LeakyRelu)",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [1, 32, 8, 8], "Format/Datatype": data}],
        "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [1, 32, 8, 8], "Format/Datatype": data}],
        "ParameterType": "Convolution",
        "Weights": {"Type": kind, "Count": 9216},
        "Bias": {"Type": "Float", "Count": 32},
        "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32",
        "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: {name[:9]}/LeakyRelu]",
    }


def half(name: str) -> dict[str, Any]:
    return layer(name, "Half", "Channel major FP16 format where channel % 8 == 0")


def single(name: str) -> dict[str, Any]:
    return layer(name, "Float", "Channel major FP32 format where channel % 4 == 0")


def copy_to(name: str) -> dict[str, Any]:
    """What brings a tensor into the form of the next layer; of its own it has no metadata."""
    kinds = [{"Name": "x", "Format/Datatype": form} for form in ("Row major linear FP32", "Row major Int8 format")]
    return {
        "Name": f"Reformatting CopyNode for Input Tensor 0 to {name}",
        "LayerType": "Reformat",
        "Inputs": kinds[:1],
        "Outputs": kinds[1:],
        "ParameterType": "Reformat",
        "Metadata": "",
    }


def json_of(*layers: Any) -> str:
    """TensorRT 8.6.0 writes the separators of Metadata as raw control characters, which JSON forbids."""
    return json.dumps({"Layers": layers, "Bindings": ["images", "y"]}).replace("\\u001e", "\x1e")


NAMES = list(ASKED)


def test_the_json_shows_what_each_convolution_became() -> None:
    text = json_of(copy_to(NAMES[0]), half(NAMES[0]), copy_to(NAMES[1]), layer(NAMES[1]), half(NAMES[2]), single(NAMES[3]))
    assert "\x1e" in text
    assert found(text, WEAK) == [
        ("0", False, "left in FP16"),
        ("1", True, ""),
        ("2", False, "TensorRT chose FP16, faster here"),
        ("3", False, "TensorRT chose FP32, faster here"),
    ]
    assert [one[2] for one in found(text, STRONG)[2:]] == ["TensorRT computes in FP16", "TensorRT computes in FP32"]


def test_with_a_dynamic_batch_the_weights_decide() -> None:
    """Of TensorRT 8.6.0."""
    kinds = {"data": "N/A due to dynamic shapes"}
    text = json_of(layer(NAMES[0], "Half", **kinds), layer(NAMES[1], **kinds), layer(NAMES[2], "Half", **kinds))
    assert found(text, WEAK)[:3] == [
        ("0", False, "left in FP16"),
        ("1", True, ""),
        ("2", False, "TensorRT chose FP16, faster here"),
    ]


def test_a_floating_point_layer_in_int8_counts_as_int8() -> None:
    assert found(json_of(layer(NAMES[0])), WEAK)[0] == ("0", True, "")
    assert found(json_of(single(NAMES[0])), WEAK)[0] == ("0", False, "left in FP32")


@pytest.mark.parametrize(
    "changes",
    [
        {"Weights": {}},
        {"Weights": None},
        {"Weights": {"Type": "Half"}},
        {"Weights": {"Type": "FP8"}},
        {"Inputs": []},
        {"Inputs": None},
        {"Inputs": ["x"]},
        {"Inputs": [{"Name": "x"}]},
        {"Metadata": ""},
        {"Metadata": None},
        {"Metadata": "/layers.1/Conv"},
        {"ParameterType": "Scale"},
    ],
)
def test_what_the_json_lacks_is_unknown(changes: dict[str, Any]) -> None:
    assert found(json_of({**layer(NAMES[1]), **changes}), WEAK)[1] == ("1", None, UNKNOWN)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", '{"Layers": []}', '{"Layers": ["/layers.1/Conv"]}', '{"Layers": 3}', '{"Layers": null}'],
)
def test_another_json_is_unknown_whole(text: str) -> None:
    assert {one[1:] for one in found(text, WEAK)} == {(None, UNKNOWN)}


# --- what was asked for ---


def test_what_is_asked_for_is_read_from_the_graph() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[1,8,8,8] x) => (float[1,8,8,8] z)
        <float[8,8,1,1] k, float s, int8 o> {
            q = QuantizeLinear (x, s, o)
            d = DequantizeLinear (q, s, o)
            y = Conv (d, k)
            z = Conv (y, k)
        }"""
    )
    for node, name in zip(model.graph.node, ("quantize", "dequantize", "a", "b"), strict=True):
        node.name = name
    assert asked_for(model) == {"a": True, "b": False}
    assert asked_for(model, fp_layers=["y"]) == {"a": False, "b": True}
    assert asked_for(model, fp_layers=[]) == {"a": True, "b": True}


# --- all layers ---


def test_all_layers_are_read_from_text() -> None:
    found = engine_layers(text_of(), RTX)
    assert [one.kind for one in found] == ["memset", "kgen", "correlation", "correlation", "kgen", "runtime_fusion", "gemm"]
    assert [one.precision for one in found] == ["INT8", "FP16", "FP16", "INT8", "FP16", "FP16", "INT8"]
    second = found[3]
    assert second.name == "/layers.1/Conv_myl0_7"
    assert second.nodes == ("/layers.1/Conv", "w_dequantize")
    assert (second.layout, second.tactic) == ("(NHWC) Channel major format", "__myelin_CASK_STUB")
    assert [one.sections for one in found] == [(), (0,), (0,), (1,), (1,), (2,), (3,)]
    assert engine_layers("{}", RTX) == ()


def test_all_layers_are_read_from_json() -> None:
    reformat = {
        "Name": "Reformatting CopyNode for Input Tensor 0 to /layers.4/Conv",
        "LayerType": "Reformat",
        "Outputs": [{"Name": "y", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
    }
    plugin = {"Name": "/layers.4/Mish", "LayerType": "PluginV2", "Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}
    text = json.dumps({"Layers": [layer("/layers.1/Conv"), reformat, plugin, "only a name"]})
    first, second, third = engine_layers(text, WEAK)
    assert first.nodes == ("/layers.1/Conv", "/layers.1/LeakyRelu")
    assert (first.kind, first.precision, first.sections) == ("CaskConvolution", "INT8", (1,))
    assert first.tactic.startswith("sm80_xmma")
    assert (second.kind, second.precision, second.sections, second.tactic) == ("Reformat", "FP16", (4,), "")
    assert second.layout == "Channel major FP16 format where channel % 8 == 0"
    assert (third.kind, third.precision, third.layout, third.sections) == ("PluginV2", "", "", (4,))
    assert engine_layers("", WEAK) == ()


# --- for people ---


def test_the_summary_groups_by_reason() -> None:
    others = {"a": "left in FP16", "c": "TensorRT chose FP16, faster here", "d": "left in FP16"}
    assert summary(["b"], {}) == "1 of 1 convolutions run in INT8"
    assert summary(["b"], others) == (
        "1 of 4 convolutions run in INT8; left in FP16: a, d; TensorRT chose FP16, faster here: c"
    )
    assert summary(["b"], {"a": UNKNOWN}) == f"at least 1 of 2 convolutions run in INT8; {UNKNOWN}: a"
    for unknown in ({"a": UNKNOWN, "b": UNKNOWN}, {}):
        assert summary([], unknown) == f"how many convolutions run in INT8 is {UNKNOWN}"
    assert summary([], {"a": "left in FP16"}) == "0 of 1 convolutions run in INT8; left in FP16: a"


@pytest.mark.parametrize(
    ("int8", "others", "start"),
    [
        ("ab", {"c": "left in FP16", "d": "left in FP16", "e": "left in FP16"}, ""),
        ("ab", {"c": "TensorRT chose FP16, faster here", "d": "TensorRT computes in FP16"}, ""),
        ("a", {"c": "TensorRT chose FP16, faster here", "d": UNKNOWN}, ""),
        ("", {"a": "left in FP16"}, ""),
        ("", {}, ""),
        ("a", {"c": "TensorRT chose FP16, faster here", "d": "TensorRT computes in FP16", "e": "left in FP16"}, "1 of the 3 "),
        ("", {"c": "TensorRT chose FP16, faster here", "d": "left in FP16"}, "0 of the 1 "),
        ("a", dict.fromkeys("cdef", "TensorRT chose FP16, faster here") | {"g": UNKNOWN}, "at least 1 of the 6 "),
    ],
)
def test_fewer_than_half_of_the_meant_is_few(int8: str, others: dict[str, str], start: str) -> None:
    warning = few_in_int8(int8, others, 4)
    assert (
        warning.startswith(f"{start}convolutions that were to run in INT8 do, at a usual batch of 4; ")
        if start
        else not warning
    )


# --- engines ---


def portable(made: Made, path: Path, **options: Any) -> Calibration:
    """A model with a scale for every tensor."""
    insert_plugins(made.plain, path, SurgeryOptions(**options))
    return Calibration({name: np.float32(0.05) for name in tensors_to_calibrate(*load_model(path))})


@rtx
@pytest.mark.parametrize("form", ["nms", "raw"])
def test_all_but_floating_point_layers_run_in_int8(
    made: Made, folder: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    calibration = portable(made, folder / "a.onnx", head=form)
    CalibrationTable(dict(calibration.scales), "8600").save("a.cache")
    assert main("engine a.onnx -o a.plan --precision int8 --target rtx --calibration a.cache".split()) == 0
    fp_layers = "/layers.0/Conv, /layers.11/Conv, /layers.18/Conv"
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [f"a.plan: 6 of 9 convolutions run in INT8; left in FP16: {fp_layers}"]
    assert err == ""
    manifest = read_plan_manifest("a.plan")
    assert len(manifest.int8_convolutions) == 6
    assert manifest.other_convolutions == dict.fromkeys(fp_layers.split(", "), "left in FP16")
    assert f"\nINT8          6 of 9 convolutions run in INT8; left in FP16: {fp_layers}\n" in describe_plan("a.plan")


@rtx
def test_an_engine_is_reported_layer_by_layer(made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every convolution of the cfg is found in some layer of a real engine, with its line and precision; without a GPU."""
    calibration = portable(made, folder / "a.onnx", head="raw")
    build_file("a.onnx", "a.plan", BuildOptions("int8", "rtx"), calibration)
    assert main("layers a.plan --json a.json".split()) == 0
    rows = json.loads((folder / "a.json").read_text())["layers"]
    lines = {line for row in rows for line in row["cfg_lines"]}
    assert lines >= {section.line for section in made.info.layers if section.kind == "convolutional"}
    assert sum(row["precision"] == "INT8" and row["kind"] in ("correlation", "gemm") for row in rows) >= 6
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


@rtx
def test_floating_point_layers_are_not_counted(made: Made, tmp_path: Path) -> None:
    calibration = portable(made, tmp_path / "a.onnx", head="raw")
    names = [node.name for node in load_model(tmp_path / "a.onnx")[0].graph.node if node.op_type == "Conv"]
    for fp_layers in ([], names[1:5], names):
        chosen = Calibration(calibration.scales, tuple(fp_layers))
        manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("int8", "rtx"), chosen)
        assert list(manifest.other_convolutions) == fp_layers
        assert list(manifest.int8_convolutions) == [name for name in names if name not in fp_layers]


@rtx
def test_an_fp16_engine_counts_nothing(made: Made, tmp_path: Path) -> None:
    portable(made, tmp_path / "a.onnx", head="raw")
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("fp16", "rtx"))
    assert (manifest.int8_convolutions, manifest.other_convolutions, manifest.int8_cost) == ((), {}, None)
    assert "\nINT8          no convolutions\n" in describe_plan(tmp_path / "a.plan")


def full(monkeypatch: pytest.MonkeyPatch, version: str) -> FakeTensorRT:
    trt = FakeTensorRT(version)
    monkeypatch.setattr(target_module, "installed_version", {"trt": version}.get)
    monkeypatch.setattr(target_module, "_load", lambda _: trt)
    monkeypatch.setattr(timing_cache, "gpu_name", lambda: "NVIDIA L4")
    return trt


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_the_engine_inspector_is_asked(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    trt = full(monkeypatch, version)
    calibration = portable(made, tmp_path / "a.onnx", head="raw", mish="native")
    trt.faster_in_half = {"/layers.3/Conv"}
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), calibration)
    assert len(manifest.int8_convolutions) == 5
    fp_layers = dict.fromkeys(("/layers.0/Conv", "/layers.11/Conv", "/layers.18/Conv"), "left in FP16")
    assert manifest.other_convolutions == {**fp_layers, "/layers.3/Conv": "TensorRT chose FP16, faster here"}
    assert read_plan_manifest(tmp_path / "a.plan") == manifest


def test_a_build_with_little_int8_warns_once(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = full(monkeypatch, "10.3.0")
    calibration = portable(made, tmp_path / "a.onnx", head="raw", mish="native")
    names = [node.name for node in load_model(tmp_path / "a.onnx")[0].graph.node if node.op_type == "Conv"]
    meant = [name for name in names if name not in ("/layers.0/Conv", "/layers.11/Conv", "/layers.18/Conv")]
    for count in (3, 4):  # of 6
        trt.faster_in_half = set(meant[:count])
        manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), calibration)
    assert "2 of the 6 convolutions that were to run in INT8 do, at a usual batch of " in manifest.int8_warning
    assert caplog.messages == [f"{tmp_path / 'a.plan'}: {manifest.int8_warning}"]
    assert f"\nfew in INT8   {manifest.int8_warning}\n" in describe_plan(tmp_path / "a.plan")


def test_an_engine_that_does_not_load_is_written_all_the_same(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = full(monkeypatch, "8.6.0")
    calibration = portable(made, tmp_path / "a.onnx", head="raw", mish="native")
    monkeypatch.setattr(trt, "load", lambda _: None)
    manifest = build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), calibration)
    assert manifest.int8_convolutions == ()
    assert set(manifest.other_convolutions.values()) == {UNKNOWN}
    assert len(manifest.other_convolutions) == 9
    assert f"how many convolutions run in INT8 is {UNKNOWN}" in describe_plan(tmp_path / "a.plan")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("int8_convolutions", "a"),
        ("int8_convolutions", [1]),
        ("int8_convolutions", None),
        ("other_convolutions", ["a"]),
        ("other_convolutions", {"a": 1}),
        ("int8_cost", 3),
        ("int8_cost", {"measure": "AP"}),
        ("int8_cost", {"measure": "AP", "drop": "x", "budget": 1.0, "data": "val.json"}),
    ],
)
def test_a_damaged_manifest_is_reported(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    full(monkeypatch, "8.6.0")
    calibration = portable(made, tmp_path / "a.onnx", head="raw", mish="native")
    build_file(tmp_path / "a.onnx", tmp_path / "a.plan", BuildOptions("int8", "trt"), calibration)
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(DarktrtError, match=r"a\.json: is damaged \(.+\); keep the manifest"):
        read_plan_manifest(tmp_path / "a.plan")


@pytest.mark.parametrize(
    "layer",
    [
        {"Name": [1]},
        {"Name": 7, "Metadata": {}},
        {"Inputs": 3, "Weights": [], "Outputs": [[]]},
        {"Metadata": ["[ONNX Layer: a]"]},
        3,
        [],
    ],
)
def test_values_of_other_types_are_left_out_of_a_layer(layer: Any) -> None:
    text = json.dumps({"Layers": [layer, {"Name": "whole"}]})
    *_, whole = layers = engine_layers(text, Target("trt", (8, 6, 0)))
    assert whole.name == "whole"
    assert all(one.name == "" and one.nodes == () for one in layers[:-1])
    assert convolution_precisions(text, {"a": True}, Target("trt", (8, 6, 0)))[0].int8 is None


def test_a_list_that_is_nested_deeply_has_no_layers() -> None:
    assert engine_layers('{"Layers": ' + "[" * 100_000, Target("trt", (8, 6, 0))) == ()


def test_a_section_has_a_number_that_a_cfg_can_have() -> None:
    layer = EngineLayer("a", "b", "", "", (f"/layers.{'9' * 5000}/Conv", "/layers.12/Conv", "/layers.\u0663/Conv"))
    assert layer.sections == (12,)


# --- biases, where TensorRT chooses what runs in INT8 ---


def biases(model: onnx.ModelProto) -> dict[str, list[float]]:
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = (node for node in model.graph.node if node.op_type == "Conv")
    return {node.name: numpy_helper.to_array(stored[node.input[2]]).tolist() for node in nodes}


def shifted(made: Made, path: Path) -> tuple[Calibration, dict[str, list[float]]]:
    """A model with a scale and channel means for every input of a convolution, and its biases if they were all corrected."""
    calibration = portable(made, path, head="raw", mish="native")
    model, _ = load_model(path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    random, channel_means, corrected = np.random.default_rng(0), {}, {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight, bias = (stored[name] for name in node.input[1:])
            means = channel_means.setdefault(node.input[0], ChannelMeans(*random.random((2, weight.shape[1]))))
            step = np.abs(weight).max((1, 2, 3), keepdims=True) / 127
            corrected[node.name] = corrected_bias(bias, weight, np.rint(weight / step) * step, means).tolist()
    return replace(calibration, channel_means=channel_means), corrected


FP_LAYERS = ("/layers.0/Conv", "/layers.11/Conv", "/layers.18/Conv")


def chosen(monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRT, *halves: set[str] | None) -> None:
    """The convolutions that are faster in FP16, by build; None fails."""
    left = iter(halves)

    def build(network: Any, config: Any) -> bytes | None:
        half = next(left)
        trt.faster_in_half = half or set()
        return None if half is None else FakeTensorRT.build(trt, network, config)

    monkeypatch.setattr(trt, "build", build)


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
@pytest.mark.parametrize("cache", ["none", "timing.cache"])
def test_biases_are_corrected_of_what_runs_in_int8(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, cache: str
) -> None:
    """By a second build, which is pinned to the choice of the first, has its times and repeats no warning."""
    trt = full(monkeypatch, version)
    calibration, corrected = shifted(made, folder / "a.onnx")
    calibration = replace(calibration, scales={**calibration.scales, "other": np.float32(1)})
    chosen(monkeypatch, trt, {"/layers.3/Conv"}, {"/layers.7/Conv"})
    manifest = build_file("a.onnx", "a.plan", BuildOptions("int8", "trt", timing_cache=cache), calibration)
    plain = biases(load_model("a.onnx")[0])
    first, second = map(biases, trt.parsed)
    assert first == plain
    assert second.keys() == plain.keys()
    for name, bias in second.items():
        half = name in (*FP_LAYERS, "/layers.3/Conv")
        assert (bias == plain[name]) == half == (name not in manifest.corrected_biases)
        np.testing.assert_allclose(bias, (plain if half else corrected)[name], rtol=1e-5, atol=1e-6)
    assert manifest.corrected_biases == manifest.int8_convolutions
    assert len(manifest.corrected_biases) == 5
    pinned = {one.name: one.precision.name for one in trt.network.layers if one.name in plain}
    assert pinned == {name: "HALF" if name in (*FP_LAYERS, "/layers.3/Conv") else "INT8" for name in plain}
    assert trt.config.timing_cache == b"+measured"
    assert (folder / "timing.cache").exists() == (cache != "none")
    assert caplog.messages == ["1 tensors of the calibration are not in the network: other"]
    assert read_plan_manifest("a.plan") == manifest
    for old, new in zip(trt.parsed[0].graph.node, trt.parsed[1].graph.node, strict=True):
        assert (old.name, old.input[:2], old.output) == (new.name, new.input[:2], new.output)


def test_a_tensorrt_that_does_not_keep_to_its_choice_is_reported(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = full(monkeypatch, "8.6.0")
    calibration, _ = shifted(made, folder / "a.onnx")

    def build(network: Any, config: Any) -> bytes | None:
        trt.disobeys = {"/layers.7/Conv"} if len(trt.parsed) == 2 else set()
        return FakeTensorRT.build(trt, network, config)

    monkeypatch.setattr(trt, "build", build)
    manifest = build_file("a.onnx", "a.plan", BuildOptions("int8", "trt", timing_cache="none"), calibration)
    assert len(trt.parsed) == 2
    assert set(manifest.corrected_biases) - set(manifest.int8_convolutions) == {"/layers.7/Conv"}
    assert caplog.messages == [
        "TensorRT did not keep to the convolutions that had to be in INT8, and the biases of 1 do not fit: /layers.7/Conv"
    ]


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_forced_int8_takes_one_build_that_is_bound_to_it(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    """All but the floating-point layers are in INT8, with corrected biases, although FP16 would be faster for each."""
    trt = full(monkeypatch, version)
    calibration, _ = shifted(made, folder / "a.onnx")
    before = biases(load_model("a.onnx")[0])
    trt.faster_in_half = set(before)
    for fp_layers in (None, ("/layers.3/Conv",), ()):
        trt.parsed.clear()
        given = replace(calibration, fp_layers=fp_layers)
        manifest = build_file("a.onnx", "a.plan", BuildOptions("int8", "trt", timing_cache="none", force_int8=True), given)
        left = FP_LAYERS if fp_layers is None else fp_layers
        meant = [name for name in before if name not in left]
        assert list(manifest.int8_convolutions) == list(manifest.corrected_biases) == meant
        assert manifest.other_convolutions == dict.fromkeys(left, "left in FP16")
        assert len(trt.parsed) == 1
        corrected = biases(trt.parsed[0])
        assert [name for name in before if corrected[name] != before[name]] == meant
        pinned = {
            one.name: one.precision.name for one in trt.network.layers if one.precision is not None and one.name in before
        }
        assert pinned == {**dict.fromkeys(left, "HALF"), **dict.fromkeys(meant, "INT8")}
        assert "OBEY_PRECISION_CONSTRAINTS" in trt.config.asked
    assert manifest.force_int8 and read_plan_manifest("a.plan") == manifest and caplog.messages == []
    assert "\nforced        INT8, also where TensorRT would have found FP16 faster\n" in describe_plan("a.plan")
    free = build_file("a.onnx", "a.plan", BuildOptions("int8", "trt", timing_cache="none"), calibration)
    assert not free.force_int8 and not free.int8_convolutions and "forced" not in describe_plan("a.plan")


def test_forced_int8_of_scales_that_tensorrt_finds(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without channel means, as a calibration cache has none."""
    trt = full(monkeypatch, "8.6.0")
    calibration, _ = shifted(made, folder / "a.onnx")
    trt.faster_in_half = set(biases(load_model("a.onnx")[0]))
    options = BuildOptions("int8", "trt", timing_cache="none", force_int8=True)
    manifest = build_file("a.onnx", "a.plan", options, Calibration(calibration.scales))
    assert len(manifest.int8_convolutions) == 6 and manifest.corrected_biases == ()


def test_forced_int8_that_tensorrt_does_not_keep_to_is_reported(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = full(monkeypatch, "8.6.0")
    calibration, _ = shifted(made, folder / "a.onnx")
    options = BuildOptions("int8", "trt", timing_cache="none", force_int8=True)
    trt.disobeys = {"/layers.7/Conv"}
    build_file("a.onnx", "a.plan", options, calibration)
    assert caplog.messages == [
        "TensorRT did not keep to the convolutions that had to be in INT8, and the biases of 1 do not fit: /layers.7/Conv"
    ]
    caplog.clear()
    monkeypatch.setattr(trt, "load", lambda _: None)  # what is in INT8 is not known then, and was bound all the same
    assert len(build_file("a.onnx", "a.plan", options, calibration).corrected_biases) == 6
    assert caplog.messages == []


def test_forced_int8_without_a_kernel_names_the_way_out(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "8.6.0")
    calibration, _ = shifted(made, folder / "a.onnx")
    monkeypatch.setattr(trt, "build", lambda *_: None)
    for forced in (True, False):
        with pytest.raises(DarktrtError, match=r"TensorRT 8\.6\.0 cannot build the engine: it reported no reason") as caught:
            build_file("a.onnx", "a.plan", BuildOptions("int8", "trt", timing_cache="none", force_int8=forced), calibration)
        assert caught.value.argument == ("force_int8" if forced else None)
        assert ("leave that one in floating point (fp_layers), or do not force INT8" in str(caught.value)) == forced
    assert files_in(folder) == ["a.onnx"]


@pytest.mark.parametrize(("version", "strong"), [("10.3.0", True), ("11.0.0", False)])
def test_nothing_is_to_be_forced_where_the_file_states_types(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, strong: bool
) -> None:
    full(monkeypatch, version)
    calibration, _ = shifted(made, folder / "a.onnx")
    options = BuildOptions("int8", "trt", strongly_typed=strong, force_int8=True)
    with pytest.raises(DarktrtError, match=f"TensorRT {version} computes in INT8 all that Q/DQ nodes .* state, so") as caught:
        build_file("a.onnx", "a.plan", options, calibration)
    assert caught.value.argument == "force_int8"
    images = DropBudget(0.1, ["no such image"])
    with pytest.raises(DarktrtError, match="nothing to force"):  # before the long work of finding layers
        build_engine("a.onnx", "a.plan", options, calibration=calibration, budget=images)


def test_nothing_is_to_be_forced_in_a_model_with_qdq_nodes(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = full(monkeypatch, "8.6.0")
    calibration, _ = shifted(made, folder / "a.onnx")
    insert_plugins(made.plain, "q.onnx", SurgeryOptions(head="raw", mish="native", calibration=calibration))
    with pytest.raises(DarktrtError, match="the model has Q/DQ nodes, which state what is INT8; to force it, build") as caught:
        build_file("q.onnx", "a.plan", BuildOptions("int8", "trt", force_int8=True))
    assert caught.value.argument == "force_int8" and not trt.parsed


def test_one_build_where_there_is_nothing_to_correct(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = full(monkeypatch, "8.6.0")
    calibration, _ = shifted(made, folder / "a.onnx")
    convolutions = set(biases(load_model("a.onnx")[0]))
    nothing: set[str] = set()
    for given, halves in (
        (replace(calibration, channel_means={}), nothing),
        (replace(calibration, fp_layers=tuple(convolutions)), nothing),
        (calibration, convolutions),
    ):
        chosen(monkeypatch, trt, halves)
        manifest = build_file("a.onnx", "a.plan", BuildOptions("int8", "trt", timing_cache="none"), given)
        assert manifest.corrected_biases == ()
        assert caplog.messages == ([f"a.plan: {manifest.int8_warning}"] if halves else [])


def test_biases_stay_where_layers_are_unknown(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = full(monkeypatch, "8.6.0")
    monkeypatch.setattr(trt, "load", lambda _: None)
    calibration, _ = shifted(made, folder / "a.onnx")
    options = BuildOptions("int8", "trt", timing_cache="none")
    assert build_file("a.onnx", "a.plan", options, calibration).corrected_biases == ()
    assert len(trt.parsed) == 1
    assert caplog.messages == [
        "biases of 6 convolutions are not corrected, for TensorRT does not report whether they run in INT8"
    ]


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_a_second_build_that_fails_leaves_nothing(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    trt = full(monkeypatch, version)
    calibration, _ = shifted(made, folder / "a.onnx")
    options = BuildOptions("int8", "trt", timing_cache="none")
    chosen(monkeypatch, trt, set(), None)
    with pytest.raises(DarktrtError, match="cannot build the engine"):
        build_file("a.onnx", "a.plan", options, calibration)
    assert (files_in(folder), len(trt.parsed)) == (["a.onnx"], 2)

    calls = []

    def stopped(*_: object) -> bytes:
        calls.append(files_in(folder))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return b"plan"

    monkeypatch.setattr(trt, "build", stopped)
    with pytest.raises(KeyboardInterrupt):
        build_file("a.onnx", "a.plan", options, calibration)
    assert (files_in(folder), len(calls)) == (["a.onnx"], 2)


def test_biases_of_qdq_nodes_are_reported_too(made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One build, for what is INT8 is known before it."""
    trt = full(monkeypatch, "10.3.0")
    calibration, _ = shifted(made, folder / "a.onnx")
    options = BuildOptions("int8", "trt", timing_cache="none", strongly_typed=True)
    manifest = build_file("a.onnx", "a.plan", options, calibration)
    assert len(trt.parsed) == 1
    assert set(manifest.corrected_biases) == biases(load_model("a.onnx")[0]).keys() - set(FP_LAYERS)
