"""The function bodies of a model's plugin nodes: embedded, dropped, or inlined in place of the nodes."""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import inliner

from darktrt.errors import DarktrtError
from darktrt.plugins.ops import DOMAIN, OPS, OPSET_VERSION, PluginOp, op_from_node

_FIRST_IR_WITH_FUNCTIONS = 8


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


def _plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]
