"""The function bodies of a model's plugin nodes: embedded, dropped, or inlined in place of the nodes, for good or not."""

from __future__ import annotations

import base64
from collections.abc import Collection

import onnx
from onnx import inliner

from darktrt.errors import DarktrtError
from darktrt.plugins.ops import DOMAIN, OPS, OPSET_VERSION, PluginOp, op_from_node

_FIRST_IR_WITH_FUNCTIONS = 8
INLINED_KEY = "darktrt_inlined"
"""Key, in the ``metadata_props`` of a model whose bodies are inlined, of the plugin nodes that :func:`restore_nodes` needs."""


def embed(model: onnx.ModelProto) -> int:
    """Add a function body for each plugin op of the graph to the model, in place; older bodies are replaced.

    Returns:
        The number of bodies.

    Raises:
        DarktrtError: a plugin node is malformed, or two nodes of one op need different bodies.
    """
    bodies: dict[str, onnx.FunctionProto] = {}
    opset = next(opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx"))
    for node in _plugin_nodes(model):
        body = op_from_node(node).body(opset)
        if bodies.setdefault(node.op_type, body) != body:
            raise DarktrtError(f"two {node.op_type} nodes differ in form; a model can hold one detector only")
    drop_bodies(model)
    model.functions.extend(bodies.values())
    model.ir_version = max(model.ir_version, _FIRST_IR_WITH_FUNCTIONS)
    if bodies and all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, OPSET_VERSION))
    return len(bodies)


def drop_bodies(model: onnx.ModelProto) -> int:
    """Remove the bodies of the plugin ops, in place, and return their number; the nodes then need a plugin."""
    others = [function for function in model.functions if function.domain != DOMAIN]
    dropped = len(model.functions) - len(others)
    del model.functions[:]
    model.functions.extend(others)
    return dropped


def inline_bodies(model: onnx.ModelProto, ops: Collection[type[PluginOp]] = tuple(OPS.values())) -> onnx.ModelProto:
    """A copy of the model with standard ops in place of each node of these plugin ops.

    Raises:
        DarktrtError: such a node has no body in the model.
    """
    wanted = {op.op_type for op in ops}
    bodies = {function.name for function in model.functions if function.domain == DOMAIN}
    for node in _plugin_nodes(model):
        if node.op_type in wanted - bodies:
            raise DarktrtError(f"node '{node.name}': {node.op_type} has no body in this model; run surgery again")
    inlined = inliner.inline_selected_functions(model, [(DOMAIN, name) for name in sorted(wanted & bodies)])
    if not _plugin_nodes(inlined):
        standard = [opset for opset in inlined.opset_import if opset.domain != DOMAIN]
        del inlined.opset_import[:]
        inlined.opset_import.extend(standard)
    return inlined


def inline_restorably(model: onnx.ModelProto) -> onnx.ModelProto:
    """As :func:`inline_bodies`, of all plugin nodes; the copy states them in its metadata, for :func:`restore_nodes`.

    Raises:
        DarktrtError: as :func:`inline_bodies`.
    """
    inlined = inline_bodies(model)
    nodes = onnx.GraphProto(node=_plugin_nodes(model)).SerializeToString()
    inlined.metadata_props.add(key=INLINED_KEY, value=base64.b64encode(nodes).decode())
    return inlined


def restore_nodes(model: onnx.ModelProto) -> None:
    """Put the plugin nodes of :func:`inline_restorably` back in place of their bodies; change nothing else, nor other models.

    Raises:
        ValueError: the model does not have the outputs of a node that its metadata states.
    """
    stated = [p for p in model.metadata_props if p.key == INLINED_KEY]
    if not stated:
        return
    plugins = onnx.GraphProto.FromString(base64.b64decode(stated[0].value, validate=True)).node
    plugin_of = {name: i for i, plugin in enumerate(plugins) for name in plugin.output}
    places = {plugin_of[name]: node.output[0] for node in model.graph.node for name in node.output if name in plugin_of}
    if len(places) < len(plugins):
        raise ValueError("it lacks an output of an inlined node")
    nodes = []
    for node in model.graph.node:
        ends = {plugin_of[name] for name in node.output if name in plugin_of}
        nodes += [plugins[i] for i in sorted(ends) if places[i] == node.output[0]] if ends else [node]
    _keep_used(model.graph, nodes)
    for one in stated:
        model.metadata_props.remove(one)


def _keep_used(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Give a graph those of these nodes that its outputs need, and no types of tensors that are gone."""
    used, kept = {value.name for value in graph.output}, []
    for node in reversed(nodes):
        if not used.isdisjoint(node.output):
            used.update(node.input)
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    used.update(name for node in kept for name in node.output)
    types = [value for value in graph.value_info if value.name in used]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.value_info.extend(types)


def _plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]
