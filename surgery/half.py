"""FP16 by the graph itself, for builders that follow the types of the ONNX file."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from darktrt import DarktrtError, DetectorInfo

_FLOAT_INPUTS = {"Resize": {1, 2}}
"""Inputs that ONNX wants in float32 whatever the type of the data: regions and scales of Resize."""


def halve(graph: gs.Graph, info: DetectorInfo) -> int:
    """Let everything between the image, as float, and the raw heads compute in FP16; return the number of nodes that now do.

    Decoding and NMS stay FP32: box coordinates do not fit FP16's 11 bits. Inputs and outputs keep their types.

    Raises:
        DarktrtError: a weight is too large for FP16.
    """
    tensors = graph.tensors()
    start = tensors.get("images_float") or tensors["images"]
    heads = [tensors[head.tensor] for head in info.heads]
    backbone = _between(start, heads)
    for node in backbone:
        for i, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and i not in _FLOAT_INPUTS.get(node.op, ()):
                node.inputs[i] = _half_constant(tensor)
        for tensor in node.outputs:
            tensor.dtype = np.float16
    _cast_start(graph, start, backbone)
    for head in heads:
        _cast_head(graph, head)
    return len(backbone)


def _between(start: gs.Tensor, ends: list[gs.Tensor]) -> list[gs.Node]:
    """The nodes on any way from ``start`` to ``ends``."""
    found: dict[int, gs.Node] = {}
    waiting = [tensor for tensor in ends if tensor is not start]
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) not in found:
                found[id(node)] = node
                waiting += [tensor for tensor in node.inputs if tensor is not start]
    return list(found.values())


def _half_constant(constant: gs.Constant) -> gs.Constant:
    values = constant.values.astype(np.float32)
    if np.isfinite(values).all() and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise DarktrtError(f"'{constant.name}' holds {np.abs(values).max():g}, too large for FP16; use --precision fp32")
    return gs.Constant(f"{constant.name}_half", values.astype(np.float16))


def _cast_start(graph: gs.Graph, start: gs.Tensor, backbone: list[gs.Node]) -> None:
    half = gs.Variable(f"{start.name}_half", np.float16, start.shape)
    inside = {id(node) for node in backbone}
    for node in [node for node in start.outputs if id(node) in inside]:
        node.inputs = [half if tensor is start else tensor for tensor in node.inputs]
    graph.nodes.append(gs.Node("Cast", half.name, {"to": onnx.TensorProto.FLOAT16}, [start], [half]))


def _cast_head(graph: gs.Graph, head: gs.Tensor) -> None:
    """Let the head's own name stay with the FP32 tensor that decoding and the outputs see."""
    half = gs.Variable(f"{head.name}_half", np.float16, head.shape)
    producer = head.inputs[0]
    producer.outputs = [half if tensor is head else tensor for tensor in producer.outputs]
    head.dtype = np.float32
    graph.nodes.append(gs.Node("Cast", half.name, {"to": onnx.TensorProto.FLOAT}, [half], [head]))
