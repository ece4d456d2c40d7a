"""Mish as exporters write it: found in both forms and either operand order, then replaced."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from darktrt import DarktrtError
from plugins.ops import DOMAIN, Mish

SWAPS = ("leaky", "relu", "relu6", "swish", "hardswish")
"""Activations that can take the place of Mish, for networks retrained so."""


def replace_mish(graph: gs.Graph, expected: int, activation: str | None = None) -> int:
    """Replace every Mish by a ``MishPlugin`` node, or by ``activation``, and return how many.

    Raises:
        DarktrtError: the count is not ``expected``; the message names a node that looks like Mish and says what it lacks.
    """
    matches = [(node, x) for node in graph.nodes if (x := mish_input(node)) is not None]
    if len(matches) != expected:
        raise DarktrtError(f"surgery: found {len(matches)} of {expected} Mish{_near_miss(graph)}")
    for node, x in matches:
        output = node.outputs[0]
        node.outputs.clear()
        name = node.name.removesuffix("Mul") + "Mish"
        if activation is None:
            attributes = Mish().attributes()
            graph.nodes.append(gs.Node(Mish.op_type, name, attributes, [x], [output], domain=DOMAIN))
        else:
            _append_activation(graph, activation, name, x, output)
    return len(matches)


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


def _append_activation(graph: gs.Graph, activation: str, name: str, x: gs.Tensor, output: gs.Tensor) -> None:
    if activation == "swish":
        gate = gs.Variable(f"{name}_gate", np.float32)
        graph.nodes.append(gs.Node("Sigmoid", f"{name}_gate", {}, [x], [gate]))
        graph.nodes.append(gs.Node("Mul", name, {}, [x, gate], [output]))
        return
    if activation == "relu6":
        limits = [gs.Constant(f"{name}_{part}", np.array(value, np.float32)) for part, value in (("low", 0), ("high", 6))]
        graph.nodes.append(gs.Node("Clip", name, {}, [x, *limits], [output]))
        return
    op, attributes = {"leaky": ("LeakyRelu", {"alpha": 0.1}), "relu": ("Relu", {}), "hardswish": ("HardSwish", {})}[activation]
    graph.nodes.append(gs.Node(op, name, attributes, [x], [output]))
