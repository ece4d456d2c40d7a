"""FP16 stated in the graph, for builders that follow the types of the ONNX file."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo

_FLOAT_INPUTS = {"Resize": {1, 2}}
"""Inputs that are float32 in ONNX whatever the type of the data: regions and scales of Resize."""


def halve(graph: gs.Graph, info: DetectorInfo) -> int:
    """Convert the backbone, from the image as float to the raw heads, to FP16; return the number of its nodes.

    Decoding and NMS stay FP32: box coordinates do not fit FP16's 11 bits. Inputs and outputs keep their types.

    Raises:
        DarktrtError: a weight is too large for FP16.
    """
    start, heads = ends(graph, info)
    nodes = backbone(graph, info)
    halves: dict[int, gs.Constant] = {}  # by the constant's identity, for nodes may share one
    for node in nodes:
        for i, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and i not in _FLOAT_INPUTS.get(node.op, ()):
                if id(tensor) not in halves:
                    halves[id(tensor)] = _half_constant(tensor)
                node.inputs[i] = halves[id(tensor)]
        for tensor in node.outputs if node.op != "QuantizeLinear" else ():
            tensor.dtype = np.float16
    _cast_start(graph, start, nodes)
    for head in heads:
        _cast_head(graph, head, nodes)
    return len(nodes)


def ends(graph: gs.Graph, info: DetectorInfo) -> tuple[gs.Tensor, list[gs.Tensor]]:
    """The ends of the backbone: the image as float ``(N, C, H, W)``, and the raw heads in cfg order."""
    tensors = graph.tensors()
    return tensors.get("images_float") or tensors["images"], [tensors[head.tensor] for head in info.heads]


def backbone(graph: gs.Graph, info: DetectorInfo) -> list[gs.Node]:
    """The nodes on all paths from the image to the raw heads, in graph order."""
    start, heads = ends(graph, info)
    visited: set[int] = set()
    waiting = list(heads)
    while waiting:
        tensor = waiting.pop()
        for node in tensor.inputs if tensor is not start else ():
            if id(node) not in visited:
                visited.add(id(node))
                waiting += node.inputs
    return [node for node in graph.nodes if id(node) in visited]


def _half_constant(constant: gs.Constant) -> gs.Constant:
    values = constant.values.astype(np.float32)
    if np.isfinite(values).all() and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise DarktrtError(f"'{constant.name}' holds {np.abs(values).max():g}, too large for FP16; use fp32")
    return gs.Constant(f"{constant.name}_half", values.astype(np.float16))


def _cast_start(graph: gs.Graph, start: gs.Tensor, nodes: list[gs.Node]) -> None:
    half = gs.Variable(f"{start.name}_half", np.float16, start.shape)
    inside = {id(node) for node in nodes}
    for node in [node for node in start.outputs if id(node) in inside]:
        node.inputs = [half if tensor is start else tensor for tensor in node.inputs]
    graph.nodes.append(gs.Node("Cast", half.name, {"to": onnx.TensorProto.FLOAT16}, [start], [half]))


def _cast_head(graph: gs.Graph, head: gs.Tensor, nodes: list[gs.Node]) -> None:
    """Insert a cast to FP32 behind the head: its name stays with the FP32 tensor, for decoding and the outputs; other layers
    read the FP16 tensor."""
    half = gs.Variable(f"{head.name}_half", np.float16, head.shape)
    producer = head.inputs[0]
    producer.outputs = [half if tensor is head else tensor for tensor in producer.outputs]
    inside = {id(node) for node in nodes}
    for node in [node for node in head.outputs if id(node) in inside]:
        node.inputs = [half if tensor is head else tensor for tensor in node.inputs]
    head.dtype = np.float32
    graph.nodes.append(gs.Node("Cast", half.name, {"to": onnx.TensorProto.FLOAT}, [half], [head]))
