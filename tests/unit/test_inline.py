"""Portable files with standard ops in place of their plugin nodes: the same bits, known to every command, and OpenVINO."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import SHARED, Array, Made, batch_of_images, run, thresholds

from darktrt.check.runs import onnx_variant
from darktrt.cli import main
from darktrt.convert.export import convert_darknet
from darktrt.engine.describe import describe_onnx
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import METADATA_KEY, DetectorInfo
from darktrt.onnx_file import is_inlined, load_info, load_model
from darktrt.plugins.functions import INLINED_KEY
from darktrt.plugins.ops import DOMAIN
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.detector import NetworkDetector, fit
from darktrt.vision.images import read_image

ROOT = Path(__file__).parents[2]
FORMS: list[dict[str, Any]] = [
    {},
    {"mish": "fused", "head": "decode", "input": "float"},
    {"mish": "native", "thresholds": None},
    {"head": "raw"},
    {"input": "image"},
    {"mark_layers": True},
]


def both(made: Made, folder: Path, **options: Any) -> tuple[Path, Path]:
    """A portable file with functions, and one with standard ops."""
    functions, inlined = folder / "functions.onnx", folder / "inlined.onnx"
    insert_plugins(made.plain, functions, SurgeryOptions(**options))
    report = insert_plugins(made.plain, inlined, SurgeryOptions(**options, inline=True))
    assert report.functions == 0
    return functions, inlined


def inputs_of(info: DetectorInfo) -> dict[str, Array]:
    images: Array = batch_of_images(info, 1)
    if info.input == "float":
        images = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return {"images": images, **(thresholds(0.01) if info.head == "nms" else {})}


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_file_has_standard_ops_and_the_same_bits(made: Made, tmp_path: Path, options: dict[str, Any]) -> None:
    functions, inlined = both(made, tmp_path, **options)
    content = onnx.load(str(inlined))
    assert not content.functions and not any(node.domain == DOMAIN for node in content.graph.node)
    assert [opset.domain for opset in content.opset_import] == [""]
    info = load_info(functions)
    assert load_info(inlined) == info
    inputs = inputs_of(info)
    expected = run(functions, inputs)
    for found in (run(inlined, inputs), run(load_model(inlined)[0], inputs)):
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_reading_restores_the_plugin_nodes(made: Made, tmp_path: Path, options: dict[str, Any]) -> None:
    (functions, _), (inlined, _) = map(load_model, both(made, tmp_path, **options))
    assert list(inlined.graph.node) == list(functions.graph.node)
    assert list(inlined.functions) == list(functions.functions)
    assert list(inlined.graph.initializer) == list(functions.graph.initializer)
    assert [*inlined.graph.input, *inlined.graph.output] == [*functions.graph.input, *functions.graph.output]
    types = [{v.name: v.type for v in model.graph.value_info} for model in (inlined, functions)]
    assert types[0] == types[1]
    assert (list(inlined.opset_import), inlined.ir_version) == (list(functions.opset_import), functions.ir_version)
    assert [p.key for p in inlined.metadata_props] == [METADATA_KEY]


def test_detect_and_check_see_no_difference(made: Made, tmp_path: Path) -> None:
    functions, inlined = both(made, tmp_path)
    image = read_image(ROOT / "docs/astronaut.jpg")
    found = []
    for path in (functions, inlined):
        with OnnxRunner(path) as runner:
            found += NetworkDetector(runner.run, runner.info, 0.01).detect([image])
        assert onnx_variant(path).precision == "fp32"
    assert np.array_equal(found[0].boxes, found[1].boxes) and np.array_equal(found[0].scores, found[1].scores)


def test_inspect_says_that_nodes_are_inlined(made: Made, tmp_path: Path) -> None:
    functions, inlined = both(made, tmp_path)
    assert "plugin nodes  6 MishPlugin, 1 YoloDetectPlugin\n" in describe_onnx(functions)
    assert "plugin nodes  6 MishPlugin, 1 YoloDetectPlugin, inlined in the file\n" in describe_onnx(inlined)
    assert (is_inlined(functions), is_inlined(inlined)) == (False, True)


def test_the_command_inlines(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    assert main(["surgery", str(made.plain), "-o", str(path), "--inline"]) == 0
    assert capsys.readouterr().out == f"{path}: 6 Mish replaced, 2 heads decoded by one node, bodies inlined\n"
    assert is_inlined(path)
    assert main(["surgery", str(path), "-o", str(tmp_path / "again.onnx")]) == 2
    assert "has plugin nodes already" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["!", base64.b64encode(b"\xff\xff").decode(), ""], ids=["text", "bytes", "nothing"])
def test_damaged_nodes_are_refused(made: Made, tmp_path: Path, value: str) -> None:
    _, path = both(made, tmp_path)
    model = onnx.load(str(path))
    next(p for p in model.metadata_props if p.key == INLINED_KEY).value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DarktrtError, match=r"damaged ONNX file|only files for a server have"):
        load_model(path)


def test_nodes_of_another_graph_are_refused(made: Made, tmp_path: Path) -> None:
    _, path = both(made, tmp_path)
    model = onnx.load(str(path))
    foreign = onnx.GraphProto(node=[onnx.helper.make_node("MishPlugin", ["images"], ["nowhere"], domain=DOMAIN)])
    entry = next(p for p in model.metadata_props if p.key == INLINED_KEY)
    entry.value = base64.b64encode(foreign.SerializeToString()).decode()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DarktrtError, match="it lacks an output of an inlined node"):
        load_model(path)


# --- OpenVINO ---


def test_openvino_computes_the_outputs(made: Made, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino, from the extra dev")
    _, path = both(made, tmp_path, head="decode", input="float")
    inputs = inputs_of(load_info(path))
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(inputs)
    for name, expected in run(path, inputs).items():
        assert np.allclose(found[name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not (SHARED / "zoo/yolov4-tiny.weights").is_file(), reason="needs the weights of yolov4-tiny in shared/")
def test_openvino_finds_the_same_objects(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino, from the extra dev")
    plain, path = tmp_path / "plain.onnx", tmp_path / "inlined.onnx"
    convert_darknet(SHARED / "zoo/yolov4-tiny.cfg", SHARED / "zoo/yolov4-tiny.weights", plain, size=(416, 416))
    info = insert_plugins(plain, path, SurgeryOptions(inline=True)).info
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image, _ = fit(read_image(ROOT / "docs/astronaut.jpg"), info)
    inputs = {"images": image[None], **thresholds()}
    found, expected = compiled(inputs), run(path, inputs)
    count = expected["num_detections"].item()
    assert found["num_detections"].item() == count > 0
    for name in ("boxes", "scores", "classes"):
        assert np.allclose(found[name][0, :count], expected[name][0, :count], rtol=1e-3, atol=0.1 if name == "boxes" else 1e-3)
