"""The costs of convolutions in words, numbers and bars, and the sample that they are measured on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import MADE_CFG, Made, made_image, make
from PIL import Image

from darktrt.calib.graph import tensors_to_calibrate
from darktrt.check import sensitivity as module
from darktrt.check.coco import Accuracy
from darktrt.check.sensitivity import LayerCost, Sensitivity, plot, sensitivity
from darktrt.check.simulate import Change, Convolution, FloatReference, load_network, operations
from darktrt.errors import DarktrtError
from darktrt.onnx_file import load_model
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins, save_model
from darktrt.vision.charts import BLUE, GRAY


def accuracy(ap: float) -> Accuracy:
    return Accuracy(ap, 0.75, 0.5, math.nan, 0.5, 0.5)


def result(judged: bool) -> Sensitivity:
    """Three convolutions, the second of which stays in floating point; the first gains AP by chance."""
    costs = (
        ("/layers.0/Conv", 6, 0.0078125, 0.5625),
        ("/layers.10/Conv", 102, 0.25, 0.375),
        ("/layers.2/Conv", 23, 0.0625, 0.4375),
    )
    layers = tuple(
        LayerCost(Convolution(node, i, line), Change(scores, scores / 2), i == 1, accuracy(ap) if judged else None)
        for i, (node, line, scores, ap) in enumerate(costs)
    )
    return Sensitivity("net", 16, layers, Change(0.125, 0.03125), accuracy(0.5) if judged else None)


def test_a_line_a_convolution() -> None:
    assert result(judged=False).to_table().splitlines() == [
        "rank  convolution      cfg line    scores     heads",
        "   1  /layers.10/Conv       102   0.25000   0.12500  in FP by default",
        "   2  /layers.2/Conv         23   0.06250   0.03125",
        "   3  /layers.0/Conv          6   0.00781   0.00391",
    ]
    assert result(judged=True).to_table().splitlines() == [
        "rank  convolution      cfg line    scores     heads       AP     drop",
        "   1  /layers.10/Conv       102   0.25000   0.12500   0.3750   0.1250  in FP by default",
        "   2  /layers.2/Conv         23   0.06250   0.03125   0.4375   0.0625",
        "   3  /layers.0/Conv          6   0.00781   0.00391   0.5625  -0.0625",
    ]


def test_the_whole_in_a_sentence() -> None:
    assert result(judged=False).summary() == (
        "net: INT8 with 1 convolutions in floating point changes scores by 0.12500, heads by 0.03125, on 16 images"
    )


def test_json_is_for_people_too() -> None:
    """Indented, without NaN, in the order of the table."""
    text = result(judged=True).to_json()
    assert text.startswith('{\n  "network": "net",\n') and text.endswith("}\n") and "NaN" not in text
    values = json.loads(text)
    assert [one["line"] for one in values["layers"]] == [102, 23, 6]
    assert values["accuracy"] == {"ap": 0.5, "ap50": 0.75, "ap75": 0.5, "ap_small": None, "ap_medium": 0.5, "ap_large": 0.5}
    assert json.loads(result(judged=False).to_json())["accuracy"] is None


def test_bars_are_in_the_order_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the drop of AP where it was measured; gray for what stays in floating point."""
    drawn: list[Any] = []
    monkeypatch.setattr(module, "draw_bars", lambda *given: drawn.append(given))
    plot(result(judged=False), "a.png")
    plot(result(judged=True), "a.png")
    (title, plain, path), (_, judged, _) = drawn
    assert title == "net: change of the scores with one convolution in INT8, 16 images" and path == "a.png"
    labels = ["/layers.0/Conv, cfg line 6", "/layers.10/Conv, cfg line 102", "/layers.2/Conv, cfg line 23"]
    for bars in (plain, judged):
        assert [(bar.label, bar.value, bar.colour) for bar in bars] == [
            (labels[0], 0.0078125, BLUE), (labels[1], 0.25, GRAY), (labels[2], 0.0625, BLUE),
        ]  # fmt: skip
    assert [bar.text for bar in plain] == ["0.0078", "0.2500", "0.0625"]
    assert [bar.text for bar in judged] == ["0.0078, AP +0.0625", "0.2500, AP -0.1250", "0.0625, AP -0.0625"]


def test_the_sample_is_sixteen_images_of_seed_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless another one is asked for."""
    asked: list[tuple[Any, ...]] = []

    def find(data: Any, limit: int, seed: int) -> list[Path]:
        asked.append((data, limit, seed))
        raise StopIteration

    monkeypatch.setattr(module, "load_network", lambda _: SimpleNamespace(info=SimpleNamespace(class_names=())))
    monkeypatch.setattr(module, "quantized", lambda *_: None)
    monkeypatch.setattr(module, "find_images", find)
    for options in ({}, {"limit": 3, "seed": 7}):
        with pytest.raises(StopIteration):
            sensitivity("net.onnx", ["photos"], Calibration({}), **options)
    assert asked == [(["photos"], 16, 0), (["photos"], 3, 7)]


def spoilt(made: Made, folder: Path, bias: float, heads: slice) -> tuple[Path, Calibration]:
    """The network with this bias in all filters of some heads, and a scale for every tensor; ``a.png`` is an image."""
    insert_plugins(made.plain, folder / "net.onnx", SurgeryOptions(head="decode", mish="native"))
    model, info = load_model(folder / "net.onnx")
    tensors = [head.tensor for head in info.heads][heads]
    biases = {node.input[2] for node in model.graph.node if node.op_type == "Conv" and node.output[0] in tensors}
    for constant in model.graph.initializer:
        if constant.name in biases:
            constant.CopyFrom(onnx.numpy_helper.from_array(np.full(constant.dims, bias, np.float32), constant.name))
    save_model(model, info, folder / "spoilt.onnx")
    Image.fromarray(made_image(64, 96)).save(folder / "a.png")
    return folder / "spoilt.onnx", Calibration({name: np.float32(0.05) for name in tensors_to_calibrate(model, info)})


def test_a_network_that_finds_nothing_at_all_changes_nothing(made: Made, tmp_path: Path) -> None:
    """All its scores are 0 in float, and INT8 leaves them so; its heads change all the same."""
    network, scales = spoilt(made, tmp_path, -200, slice(None))
    change = FloatReference(load_network(network), [tmp_path / "a.png"]).change(scales, [])
    assert change.scores == 0 and 0 < change.heads < 0.1


@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_one_head_that_is_no_number_is_enough_to_refuse(made: Made, tmp_path: Path, head: int, bias: float) -> None:
    network, _ = spoilt(made, tmp_path, bias, slice(head, head + 1))
    with pytest.raises(DarktrtError, match="its outputs are NaN or infinite; are the weights damaged"):
        FloatReference(load_network(network), [tmp_path / "a.png"])


@pytest.mark.parametrize("batch", [(1, 3, 3), (2, 2, 2)])
def test_a_convolutions_share_of_the_work(tmp_path: Path, batch: tuple[int, int, int]) -> None:
    """Its weights times the cells of its output, of all convolutions in the order of the graph."""
    made = make(tmp_path, MADE_CFG, batch)
    network, _ = spoilt(made, tmp_path, 0, slice(None))
    model = load_model(network)[0]
    shapes = {constant.name: tuple(constant.dims) for constant in model.graph.initializer}
    for value in onnx.shape_inference.infer_shapes(model).graph.value_info:
        shapes[value.name] = tuple(one.dim_value for one in value.type.tensor_type.shape.dim)
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    work = {node.name: math.prod(shapes[node.input[1]]) * math.prod(shapes[node.output[0]][2:]) for node in nodes}
    found = operations(load_network(network))
    assert list(found) == list(work)
    assert found == pytest.approx({name: count / sum(work.values()) for name, count in work.items()})
