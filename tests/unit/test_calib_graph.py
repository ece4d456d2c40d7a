"""The tensors to calibrate, and how the nodes of a network relate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from helpers import Made, conv, head, make, net, section

from darktrt.calib.graph import head_inputs, mish_outputs, passing_groups, tensors_to_calibrate
from darktrt.errors import DarktrtError
from darktrt.onnx_file import load_model
from darktrt.surgery.rewrite import SurgeryOptions, save_model, transform


@pytest.fixture(scope="module")
def portable(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network after the default surgery: bytes in, plugin nodes, NMS."""
    path = tmp_path_factory.mktemp("portable") / "portable.onnx"
    model, report = transform(made.model(), made.info, SurgeryOptions())
    save_model(model, report.info, path)
    return path


def test_tensors_are_those_between_image_and_heads(made: Made) -> None:
    model = made.model()
    tensors = tensors_to_calibrate(model, made.info)
    heads = {head.tensor for head in made.info.heads}
    assert tensors[0] == "images"
    assert heads < set(tensors)
    produced = [output for node in model.graph.node for output in node.output]
    assert tensors[1:] == [name for name in produced if name in set(tensors)]
    behind = set(heads)
    for node in model.graph.node:
        if behind & set(node.input) or node.op_type == "Constant":
            behind.update(node.output)
    assert set(produced) - set(tensors) == behind - heads


@pytest.mark.parametrize("options", [{}, {"input": "float"}, {"head": "decode"}, {"head": "raw"}], ids=str)
def test_portable_files_have_plugin_outputs_and_no_mish_internals(made: Made, options: dict[str, Any]) -> None:
    model, report = transform(made.model(), made.info, SurgeryOptions(**options))
    tensors = tensors_to_calibrate(model, report.info)
    assert tensors[0] == ("images" if options.get("input") == "float" else "images_float")
    trunk = [
        n for n in model.graph.node if not n.op_type.startswith("Yolo") and n.op_type not in ("Constant", "Cast", "Transpose")
    ]
    assert tensors[1:] == [n.output[0] for n in trunk if n.output[0] != "images_float"]
    assert sum(n.op_type == "MishPlugin" and n.output[0] in tensors for n in trunk) == made.info.mish_count


def test_integers_and_constants_on_the_way_are_no_activations(made: Made) -> None:
    model = made.model()
    first = model.graph.node[0]
    size, back = (
        onnx.helper.make_node("Shape", ["images"], ["size"]),
        onnx.helper.make_node("Reshape", ["images", "size"], ["again"]),
    )
    first.input[0] = "again"
    nodes = [size, back, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [4]))
    assert tensors_to_calibrate(model, made.info)[:2] == ["images", "again"]


def test_a_tensor_of_undeclared_type_is_an_activation(made: Made) -> None:
    model = made.model()
    expected = tensors_to_calibrate(model, made.info)
    del model.graph.value_info[:]
    model.graph.value_info.extend(onnx.ValueInfoProto(name=name) for name in expected)
    assert tensors_to_calibrate(model, made.info) == expected


@pytest.mark.parametrize("operation", ["Equal", "Greater", "Less"])
def test_comparisons_are_no_activations(made: Made, operation: str) -> None:
    """Some activations choose among values by one; its output is no number."""
    model = made.model()
    first = model.graph.node[0]
    compared = onnx.helper.make_node(operation, ["images", "images"], ["compared"])
    chosen = onnx.helper.make_node("Where", ["compared", "images", "images"], ["chosen"])
    first.input[0] = "chosen"
    nodes = [compared, chosen, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    assert tensors_to_calibrate(model, made.info)[:2] == ["images", "chosen"]


def test_groups_are_tensors_with_common_values(made: Made) -> None:
    """Of the made network: a slice of layer 1's, concats of routes, max pools, the upsampling."""
    model = made.model()
    tensors = tensors_to_calibrate(model, made.info)
    groups = passing_groups(model, made.info, tensors)
    together = {name: set(group) for group in groups for name in group}
    for node in model.graph.node:
        names = [name for name in (*node.input, *node.output) if name in tensors]
        if node.op_type in ("Concat", "MaxPool", "Resize", "Slice", "Split") and len(names) > 1:
            assert all(together[name] == together[names[0]] for name in names), node.name
        elif len(names) > 1:
            assert together.get(names[-1]) is None or together[names[-1]] != together.get(names[0]), node.name
    assert len(groups) >= 2
    assert sum(map(len, groups)) == len(together), "a tensor is in two groups"
    assert passing_groups(model, made.info, []) == []


def test_two_tensors_are_a_group(tmp_path: Path) -> None:
    """A max pool between two convolutions: with one scale its input is quantized once."""
    made = make(tmp_path, net() + conv(8, activation="leaky") + section("maxpool", size=2, stride=2) + head())
    model = made.model()
    assert passing_groups(model, made.info, tensors_to_calibrate(model, made.info)) == [["layer0", "layer1"]]


def test_inputs_of_the_heads(made: Made, portable: Path) -> None:
    result = head_inputs(made.model(), made.info)
    convolutions = {node.output[0]: node.input[0] for node in made.model().graph.node if node.op_type == "Conv"}
    assert result == [convolutions[head.tensor] for head in made.info.heads]
    assert head_inputs(*load_model(portable)) == result
    without = made.model()
    del without.graph.node[:]
    assert head_inputs(without, made.info) == []


def test_outputs_of_mish_that_are_the_only_readers(made: Made, portable: Path) -> None:
    """The input of a plugin node is quantized; standard ops are fused with the convolution before them."""
    model, info = load_model(portable)
    tensors = tensors_to_calibrate(model, info)
    nodes = [node for node in model.graph.node if node.op_type == "MishPlugin"]
    result = mish_outputs(model, tensors)
    assert result == {node.input[0]: node.output[0] for node in nodes} != {}
    first, *others = result
    assert list(mish_outputs(model, [name for name in tensors if name != result[first]])) == others
    assert mish_outputs(model, [first, result[first]]) == {first: result[first]}
    model.graph.node.add(op_type="Relu", input=[first], output=["other"])
    assert list(mish_outputs(model, tensors)) == others
    assert mish_outputs(made.model(), tensors_to_calibrate(made.model(), made.info)) == {}


def test_graph_without_its_head_or_image(made: Made) -> None:
    model = made.model()
    next(n for n in model.graph.node if "head1_raw" in n.output).output[0] = "other"
    with pytest.raises(DarktrtError, match="no tensor 'head1_raw', a head"):
        tensors_to_calibrate(model, made.info)
    model = made.model()
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    with pytest.raises(DarktrtError, match="no tensor 'images'"):
        tensors_to_calibrate(model, made.info)
