"""Mish as exporters write it, in both forms and either operand order: replaced by plugin nodes and fused with their readers."""

from __future__ import annotations

from typing import NamedTuple

import onnx_graphsurgeon as gs

from darktrt.errors import DarktrtError
from darktrt.plugins.ops import DOMAIN, Mish, MishAdd, MishConcat, PluginOp


def replace_mish(graph: gs.Graph, expected: int) -> int:
    """Replace every Mish by a ``MishPlugin`` node and return their number.

    Raises:
        DarktrtError: the number is not ``expected``; the message names a node that resembles Mish and the difference.
    """
    matches = [(node, x) for node in graph.nodes if (x := mish_input(node)) is not None]
    if len(matches) != expected:
        raise DarktrtError(f"surgery: found {len(matches)} of {expected} Mish{_near_miss(graph)}")
    for node, x in matches:
        output = node.outputs[0]
        node.outputs.clear()
        name = node.name.removesuffix("Mul") + "Mish"
        graph.nodes.append(gs.Node(Mish.op_type, name, Mish().attributes(), [x], [output], domain=DOMAIN))
    return len(matches)


class Fused(NamedTuple):
    """The number of nodes that compute the Mish before them too."""

    adds: int
    concats: int


def fuse_mish(graph: gs.Graph) -> Fused:
    """Fuse ``MishPlugin`` nodes into the adds and concats behind them, so that Mish's output is neither written nor read.

    An Add is fused with a Mish whose only reader it is and whose shape is that of the other operand. A Concat of two Mish
    along the channels is fused with both where it is the only reader of one of them: a Mish with other readers stays for
    them, and computing it twice moves no more bytes than copying it. Tensors keep their names; tensors without readers are
    removed. Nodes that are fused already stay as they are.
    """
    concats = 0
    while fused := _fuse_concats(graph):
        concats += fused  # each may have left another concat, or an add, as the only reader of a Mish
    adds = 0
    for node in list(graph.nodes):
        adds += _fuse_add(graph, node)
    return Fused(adds, concats)


def _fuse_concats(graph: gs.Graph) -> int:
    """Fuse every concat that can be fused now, and return their number."""
    fused = 0
    for node in list(graph.nodes):
        fused += _fuse_concat(graph, node)
    return fused


def _fuse_concat(graph: gs.Graph, node: gs.Node) -> bool:
    """Fuse a concat of two Mish; return whether the node is one and can be fused."""
    if node.op != "Concat" or node.attrs["axis"] != 1 or len(node.inputs) != 2:
        return False
    first, second = node.inputs
    mishes = [mish for tensor in node.inputs if (mish := _mish_of(tensor)) is not None]
    if len(mishes) < 2 or not (_only_read_once(graph, first) or _only_read_once(graph, second)):
        return False
    _become(node, MishConcat(), [mish.inputs[0] for mish in mishes])
    for mish in mishes:
        _drop_unread(graph, mish)
    return True


def _fuse_add(graph: gs.Graph, node: gs.Node) -> bool:
    """Fuse an add of a Mish; return whether the node is one and can be fused."""
    if node.op != "Add":
        return False
    for activated, residual in (node.inputs, node.inputs[::-1]):
        mish = _mish_of(activated)
        if mish is not None and _only_read_once(graph, activated) and _same_shape(activated, residual):
            _become(node, MishAdd(), [mish.inputs[0], residual])
            _drop_unread(graph, mish)
            return True
    return False


def _mish_of(tensor: gs.Tensor) -> gs.Node | None:
    """The ``MishPlugin`` node whose output the tensor is, or None."""
    producer = tensor.inputs[0] if tensor.inputs else None
    return producer if producer is not None and producer.op == Mish.op_type else None


def _only_read_once(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return len(tensor.outputs) == 1 and all(tensor is not output for output in graph.outputs)


def _same_shape(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Whether both shapes are known, an open batch by its name, and equal."""
    return bool(a.shape) and a.shape == b.shape and all(a.shape)


def _become(node: gs.Node, op: PluginOp, inputs: list[gs.Tensor]) -> None:
    node.name = node.name.removesuffix(node.op) + op.op_type.removesuffix("Plugin")
    node.op, node.domain, node.attrs = op.op_type, DOMAIN, op.attributes()
    node.inputs = inputs


def _drop_unread(graph: gs.Graph, node: gs.Node) -> None:
    (output,) = node.outputs
    if not output.outputs and all(output is not other for other in graph.outputs):
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes.remove(node)


def mish_input(node: gs.Node) -> gs.Tensor | None:
    """The x of a node that computes Mish of x, as the Mish op or as the Mul of x and tanh(softplus(x)); otherwise None."""
    if node.op == "Mish" and not node.domain:
        return node.inputs[0]
    if node.op != "Mul":
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        if _gate_input(gate) is x:
            return x
    return None


def _gate_input(tensor: gs.Tensor) -> gs.Tensor | None:
    """The x of tanh(softplus(x)), otherwise None."""
    for op in ("Tanh", "Softplus"):
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or producer.op != op:
            return None
        tensor = producer.inputs[0]
    return tensor


def _near_miss(graph: gs.Graph) -> str:
    """How a node that resembles Mish differs from it, for an error message."""
    for node in graph.nodes:
        gates = [tensor for tensor in node.inputs if _gate_input(tensor) is not None]
        if gates and mish_input(node) is None:
            if node.op == "Mul":
                return f"; '{node.name}' multiplies tanh(softplus(x)) by another x"
            return f"; '{node.name}' is a {node.op} of tanh(softplus(x)), not a Mul"
        if node.op == "Softplus" and not any(user.op == "Tanh" for user in node.outputs[0].outputs):
            return f"; '{node.name}' is a Softplus that no Tanh follows"
    return "; the graph and the cfg it came from do not belong together, convert the network again"
