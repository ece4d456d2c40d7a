"""Further outputs of a model: tensors that it computes anyway."""

from __future__ import annotations

from collections.abc import Collection

import onnx


def add_outputs(model: onnx.ModelProto, names: Collection[str]) -> int:
    """Make tensors outputs of a model, in place, in the order of the graph.

    Args:
        names: tensors to add; those that the model does not compute or that are outputs already are left out.

    Returns:
        The number of outputs added.
    """
    # Polygraphy's loader for that would drop the types of the outputs that the model has.
    typed = {value.name: value for value in model.graph.value_info}
    present = {value.name for value in model.graph.output}
    added = [name for node in model.graph.node for name in node.output if name in names and name not in present]
    model.graph.output.extend(typed.get(name, onnx.ValueInfoProto(name=name)) for name in added)
    return len(added)
