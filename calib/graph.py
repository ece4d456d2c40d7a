"""The tensors of a network that calibration counts, and how its nodes relate them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo

if TYPE_CHECKING:
    import onnx

_MOVING = {"Reshape", "Transpose"}
"""Operations whose output has the values of its input, each once, at other positions."""
_PASSING = {"Concat", "MaxPool", "Resize", "Slice", "Split", *_MOVING}
"""Operations whose output values are input values. (Resize is darknet's upsampling to the nearest pixel.)"""

PIXELS = "images_float"
"""The image as floats in 0..1, in a model whose input is bytes."""


def tensors_to_calibrate(model: onnx.ModelProto, info: DetectorInfo) -> list[str]:
    """The float activations from the image to the raw heads, both included, in the order of the graph.

    A model with uint8 images has nodes before the image as floats in 0..1; their tensors are left out, and so are those of
    decoding and NMS.

    Raises:
        DarktrtError: the graph lacks the image or a head that its metadata names.
    """
    from onnx import TensorProto

    opsets = {opset.domain: opset.version for opset in model.opset_import}
    image = "images" if info.input == "float" else PIXELS
    not_float = {v.name for v in model.graph.value_info if v.type.tensor_type.elem_type not in (0, TensorProto.FLOAT)}
    from_image = {image}
    for node in model.graph.node:
        if from_image.intersection(node.input):
            from_image.update(node.output)
    needed = {
        output for node in nodes_before_heads(model, info) if _gives_floats(node, opsets) for output in node.output if output
    }
    if image not in needed | {i.name for i in model.graph.input}:
        raise DarktrtError(f"{info.name}: the graph has no tensor '{image}' on the way to the heads; convert it again")
    produced = [output for node in model.graph.node for output in node.output if output in needed & from_image]
    return [name for name in dict.fromkeys([image, *produced]) if name not in not_float]


def _gives_floats(node: onnx.NodeProto, opsets: Mapping[str, int]) -> bool:
    """Whether the outputs of an operation can be floats, which those of comparisons, for one, cannot."""
    from onnx import defs

    if not defs.has(node.op_type, node.domain):
        return True
    schema = defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    return "tensor(float)" in schema.outputs[0].types


def nodes_before_heads(model: onnx.ModelProto, info: DetectorInfo, start: str = "") -> list[onnx.NodeProto]:
    """The nodes that compute the raw heads, in the order of the graph.

    Args:
        start: a tensor to take as given, with the nodes before it.

    Raises:
        DarktrtError: the graph lacks a head that its metadata names.
    """
    wanted = {head.tensor for head in info.heads}
    missing = wanted.difference(output for node in model.graph.node for output in node.output)
    if missing:
        raise DarktrtError(f"{info.name}: the graph has no tensor '{sorted(missing)[0]}', a head; convert it again")
    nodes = []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            wanted.update(set(node.input) - {start})
            nodes.append(node)
    return nodes[::-1]


def cut_behind_heads(model: onnx.ModelProto, info: DetectorInfo, outputs: Sequence[str]) -> None:
    """Reduce a model, in place, to the nodes before its raw heads, with these tensors as its outputs.

    A model that takes images of any size then begins at its pixels, the input ``images_float``.

    Raises:
        DarktrtError: an output is not computed by these nodes.
    """
    import onnx

    graph = model.graph
    nodes = nodes_before_heads(model, info, PIXELS if info.input == "image" else "")
    if unknown := set(outputs).difference(output for node in nodes for output in node.output):
        raise DarktrtError(f"{info.name}: '{sorted(unknown)[0]}' is no tensor between the image and the heads")
    del graph.node[:], graph.output[:], graph.input[1:]  # the other inputs are those of NMS
    graph.node.extend(nodes)
    if info.input == "image":
        graph.input[0].CopyFrom(next(value for value in graph.value_info if value.name == PIXELS))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)


def convolution_inputs(model: onnx.ModelProto, info: DetectorInfo) -> list[str]:
    """The input tensors of all convolutions before the raw heads, each once, in the order of the graph."""
    return list(dict.fromkeys(node.input[0] for node in nodes_before_heads(model, info) if node.op_type == "Conv"))


def value_sources(model: onnx.ModelProto, info: DetectorInfo) -> dict[str, str]:
    """Maps each tensor to calibrate to the one that its values come from: itself, or what a [reorg] moves to other positions.

    Between the nodes of a [reorg] are tensors of six dimensions, whose positions are none of the image.

    Raises:
        DarktrtError: as :func:`tensors_to_calibrate`.
    """
    sources = {name: name for name in tensors_to_calibrate(model, info)}
    for node in model.graph.node:
        if node.op_type in _MOVING and {node.input[0], node.output[0]} <= set(sources):
            sources[node.output[0]] = sources[node.input[0]]
    return sources


def passing_groups(model: onnx.ModelProto, info: DetectorInfo, tensors: Sequence[str]) -> list[list[str]]:
    """Groups of two or more of ``tensors`` that operations connect which only choose or move values, in graph order."""
    group_of = {name: [name] for name in tensors}
    for node in nodes_before_heads(model, info):
        if node.op_type in _PASSING:
            known = [name for name in (*node.input, *node.output) if name in group_of]
            for other in known[1:]:
                group = group_of[known[0]]
                if group_of[other] is not group:
                    group.extend(group_of[other])
                    group_of.update(dict.fromkeys(group_of[other], group))
    order = {name: i for i, name in enumerate(tensors)}
    distinct = {id(group): sorted(group, key=order.__getitem__) for group in group_of.values() if len(group) > 1}
    return sorted(distinct.values(), key=lambda group: order[group[0]])


def head_inputs(model: onnx.ModelProto, info: DetectorInfo) -> list[str]:
    """The input tensors of the last convolutions before the raw heads, in the order of the heads."""
    producers = {output: node for node in model.graph.node for output in node.output}
    inputs = []
    for head in info.heads:
        node = producers.get(head.tensor)
        while node is not None and node.op_type != "Conv":  # through an activation
            node = producers.get(node.input[0])
        if node is not None:
            inputs.append(node.input[0])
    return list(dict.fromkeys(inputs))


def mish_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> dict[str, str]:
    """Maps the input tensor of each ``MishPlugin`` node to its output tensor.

    Nodes whose input has another reader or whose tensors are not both among ``tensors`` are left out.
    """
    readers = Counter(name for node in model.graph.node for name in node.input)
    pairs = [(node.input[0], node.output[0]) for node in model.graph.node if node.op_type == "MishPlugin"]
    return {x: y for x, y in pairs if readers[x] == 1 and {x, y} <= set(tensors)}
