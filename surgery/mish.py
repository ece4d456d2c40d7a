"""Mish as exporters write it: found in both forms and either operand order, replaced, and joined with what follows it."""

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
    """How many nodes took Mish in."""

    adds: int
    concats: int


def fuse_mish(graph: gs.Graph) -> Fused:
    """Let the adds and concats behind ``MishPlugin`` nodes compute Mish themselves, which spares its output a way to memory.

    An Add takes in one operand that it alone reads, of the other's shape. A Concat of two Mish along the channels takes in
    both where it alone reads one of them: a Mish that others read stays for them, and computing it twice moves no more bytes
    than copying it. Tensors keep their names; those that nobody reads any more are gone. What was fused stays as it is.
    """
    concats = 0
    while found := sum([_fuse_concat(graph, node) for node in list(graph.nodes) if _is_concat_of_two(node)]):
        concats += found  # each may have left another concat, or an add, as the only reader of a Mish
    adds = sum([_fuse_add(graph, node) for node in list(graph.nodes) if node.op == "Add"])
    return Fused(adds, concats)


def _is_concat_of_two(node: gs.Node) -> bool:
    return node.op == "Concat" and node.attrs["axis"] == 1 and len(node.inputs) == 2


def _fuse_concat(graph: gs.Graph, node: gs.Node) -> bool:
    first, second = node.inputs
    mishes = [mish for tensor in node.inputs if (mish := _mish_of(tensor)) is not None]
    if len(mishes) < 2 or not (_only_read_once(graph, first) or _only_read_once(graph, second)):
        return False
    _become(node, MishConcat(), [mish.inputs[0] for mish in mishes])
    for mish in mishes:
        _drop_unread(graph, mish)
    return True


def _fuse_add(graph: gs.Graph, node: gs.Node) -> bool:
    for activated, residual in (node.inputs, node.inputs[::-1]):
        mish = _mish_of(activated)
        if mish is not None and _only_read_once(graph, activated) and _same_shape(activated, residual):
            _become(node, MishAdd(), [mish.inputs[0], residual])
            _drop_unread(graph, mish)
            return True
    return False


def _mish_of(tensor: gs.Tensor) -> gs.Node | None:
    """The ``MishPlugin`` node that gives the tensor."""
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
    """The x of a node that computes Mish of x, as the Mish op or as the Mul of x and tanh(softplus(x)); else None."""
    if node.op == "Mish" and not node.domain:
        return node.inputs[0]
    if node.op != "Mul":
        return None
    for x, gate in (node.inputs, node.inputs[::-1]):
        if _gate_input(gate) is x:
            return x
    return None


def _gate_input(tensor: gs.Tensor) -> gs.Tensor | None:
    """The x of tanh(softplus(x)), else None."""
    for op in ("Tanh", "Softplus"):
        producer = tensor.inputs[0] if tensor.inputs else None
        if producer is None or producer.op != op:
            return None
        tensor = producer.inputs[0]
    return tensor


def _near_miss(graph: gs.Graph) -> str:
    """Why some node that begins like Mish is none, for the error; empty where nothing looks like it."""
    for node in graph.nodes:
        gates = [tensor for tensor in node.inputs if _gate_input(tensor) is not None]
        if gates and mish_input(node) is None:
            verb = (
                "multiplies tanh(softplus(x)) by another x" if node.op == "Mul" else f"takes tanh(softplus(x)) into a {node.op}"
            )
            return f"; '{node.name}' {verb}"
        if node.op == "Softplus" and not any(user.op == "Tanh" for user in node.outputs[0].outputs):
            return f"; '{node.name}' is a Softplus that no Tanh follows"
    return "; the graph and the cfg it came from do not belong together, convert the network again"
