"""The memory and the work of an ONNX graph, from the sizes that it declares: nothing of it is run or allocated for that.

Like ``onnx_file`` it stands below the rooms but for :mod:`darktrt.plugins.ops`, which says what the plugin nodes take.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx
from onnx import helper

from darktrt.errors import DarktrtError
from darktrt.memory import MOST_BATCH_BYTES, MOST_NETWORK_BYTES, MOST_OPERATIONS, gibibytes, most_at_once, network_bytes
from darktrt.metadata import DetectorInfo
from darktrt.plugins.ops import DOMAIN, Preprocess, op_from_node

_SMALL = 64
"""Numbers of a constant whose values may state a shape; larger ones are weights."""
_MOST_SLICES = 256
"""On a way through a network; each takes an inference of shapes."""


@dataclass(frozen=True)
class Cost:
    """The cost of a network on one image."""

    weights: int
    """Bytes."""
    tensors: int
    """Bytes of the tensors in use at once."""
    operations: int
    """2 per multiply-add."""


def check_sizes(model: onnx.ModelProto, info: DetectorInfo) -> None:
    """See that no size is below 0: onnx's shape inference ends the process at a slice that reads such a tensor.

    Inference runs up to the first slices, and from there to the next ones as long as there are some.

    Raises:
        ValueError: a size is below 0, or more slices follow on each other than in any network.
    """
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        _check_value(value)
    skeleton = _skeleton(model, info)
    nodes = list(skeleton.graph.node)
    before = _slices_before(nodes, {"Slice", *(one.name for one in model.functions if _slices(one.node))})
    if (most := max(before, default=0)) > _MOST_SLICES:
        raise ValueError(f"{most} slices follow on each other")
    for stage in range(most + 1):
        del skeleton.graph.node[:]
        skeleton.graph.node.extend(node for node, slices in zip(nodes, before, strict=True) if slices <= stage)
        for value in onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph.value_info:
            _check_value(value)


def _check_value(value: onnx.ValueInfoProto) -> None:
    if any(dim.dim_value < 0 for dim in value.type.tensor_type.shape.dim):
        raise ValueError(f"'{value.name}' has a size below 0")


def _slices(nodes: Sequence[onnx.NodeProto]) -> bool:
    return any(node.op_type == "Slice" for node in nodes)


def _slices_before(nodes: Sequence[onnx.NodeProto], ops: set[str]) -> list[int]:
    """The largest number of nodes with these ops on a way from an input through each node, itself included."""
    behind: dict[str, int] = {}
    result = []
    for node in nodes:
        result.append(max((behind.get(name, 0) for name in node.input), default=0) + (node.op_type in ops))
        behind |= dict.fromkeys(node.output, result[-1])
    return result


def check_cost(model: onnx.ModelProto, info: DetectorInfo, where: str) -> None:
    """See that a network on one image stays within the memory and the work that darktrt may spend; ``where`` names it.

    Raises:
        DarktrtError: it does not.
        ValueError: the size of a tensor is not known before the network runs.
    """
    cost = cost_of(model, info)
    needed = network_bytes(cost.weights, cost.tensors)
    if needed > MOST_NETWORK_BYTES:
        raise DarktrtError(
            f"{where}: would take {gibibytes(needed)} of memory for an image, more than {gibibytes(MOST_NETWORK_BYTES)}; "
            "convert the network for smaller images"
        )
    if cost.operations > MOST_OPERATIONS:
        raise DarktrtError(
            f"{where}: would take {cost.operations / 1e9:,.0f} billion operations for an image, more than "
            f"{MOST_OPERATIONS / 1e9:,.0f}; convert the network for smaller images"
        )


def limit_batch(model: onnx.ModelProto, info: DetectorInfo, where: str) -> DetectorInfo:
    """The metadata with the largest batch that a CPU may run at once: as many images as the memory of one network allows.

    A model with a larger smallest batch keeps that, if it takes no more than half of the machine's memory.

    Raises:
        DarktrtError: it takes more; ``where`` names the model.
    """
    cost = cost_of(model, info)
    least, usual, most = info.batch
    needed = network_bytes(cost.weights, 0) + least * cost.tensors
    if needed > max(MOST_BATCH_BYTES, (there := _machine_bytes()) // 2):
        raise DarktrtError(
            f"{where}: a batch of {least} images takes {gibibytes(needed)} of memory, and this machine has {gibibytes(there)}; "
            "make the model for smaller batches",
            "batch",
        )
    affordable = (MOST_BATCH_BYTES - network_bytes(cost.weights, 0)) // max(1, cost.tensors)
    largest = min(most, max(least, affordable))
    return replace(info, batch=(least, min(usual, largest), largest))


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cost_of(model: onnx.ModelProto, info: DetectorInfo) -> Cost:
    """The cost of a network.

    Raises:
        ValueError: the size of a tensor depends on values.
    """
    shapes = _shapes(model, info)
    sizes = {name: prod(shape) * itemsize for name, (shape, itemsize) in shapes.items()}
    numbers = {name: prod(shape) for name, (shape, _) in shapes.items()}
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: sizes[value.name] for value in model.graph.input if value.name in sizes}
    steps: list[tuple[Mapping[str, int], Sequence[str]]] = [(inputs, ())]
    for index, node in enumerate(model.graph.node):
        made = {name: sizes.get(name, 0) for name in node.output if name}
        if node.domain == DOMAIN:
            read = [numbers[name] for name in node.input if name in numbers]
            made[f"\0{index}"] = 4 * op_from_node(node).working_numbers(read)
        steps.append((made, [name for name in node.input if name not in constants]))
    weights = sum(_bytes(tensor.dims, tensor.data_type) for tensor in model.graph.initializer)
    dims = {name: shape for name, (shape, _) in shapes.items()}
    return Cost(weights, most_at_once(steps), sum(_operations(node, dims) for node in model.graph.node))


def tensor_bytes(model: onnx.ModelProto, info: DetectorInfo, names: Iterable[str]) -> int:
    """The bytes of these tensors together, for one image."""
    shapes = _shapes(model, info)
    return sum(prod(shape) * itemsize for shape, itemsize in (shapes[name] for name in names if name in shapes))


_Shapes = dict[str, tuple[tuple[int, ...], int]]
"""Of every tensor the shape for one image, and the bytes of a number."""


def _shapes(model: onnx.ModelProto, info: DetectorInfo) -> _Shapes:
    inferred = onnx.shape_inference.infer_shapes(_skeleton(model, info), strict_mode=True, data_prop=True)
    known: _Shapes = {tensor.name: (tuple(tensor.dims), 4) for tensor in model.graph.initializer}
    for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            known[value.name] = (tuple(dim.dim_value for dim in kind.shape.dim), _itemsize(kind.elem_type))
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known and node.domain != DOMAIN:
                raise ValueError(f"the size of '{name}', which {node.op_type} outputs, is not stated by the file")
    return known


def _skeleton(model: onnx.ModelProto, info: DetectorInfo) -> onnx.ModelProto:
    """The graph for one image of the largest size, without its weights and without what it says about shapes of its own."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = bare.graph
    graph.name = "skeleton"
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.output)
    for node in model.graph.node:
        if node.op_type == Preprocess.op_type and node.domain == DOMAIN:
            graph.input.extend(_preprocessed(node, info))
        else:
            graph.node.append(node)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    width, height = info.image_sizes[2] if info.image_sizes else (info.width, info.height)
    for value in model.graph.input:
        graph.input.append(value)
        for axis, dim in enumerate(graph.input[-1].type.tensor_type.shape.dim):
            if dim.dim_param or (axis == 0 and value.name in ("images", "image_size")):
                dim.dim_value = {"height": height, "width": width}.get(dim.dim_param, 1)
    return bare


def _preprocessed(node: onnx.NodeProto, info: DetectorInfo) -> Iterator[onnx.ValueInfoProto]:
    op = op_from_node(node)
    assert isinstance(op, Preprocess)
    if op.input_size != (info.width, info.height) or op.channels != info.channels:
        raise ValueError(f"'{node.name}' fits images into {op.input_size}, not into the network's input")
    shapes = ((1, info.channels, info.height, info.width), (1, 2), (3, 4))
    for name, shape in zip(node.output, shapes, strict=True):
        yield helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _itemsize(kind: int) -> int:
    return helper.tensor_dtype_to_np_dtype(kind).itemsize


def _bytes(dims: Sequence[int], kind: int) -> int:
    return prod(dims) * _itemsize(kind)


def _operations(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of a node: those of its multiply-adds, or the numbers that a pool reads."""
    outputs = prod(shapes.get(node.output[0], ())) if node.output else 0
    if node.op_type in ("Conv", "ConvTranspose"):
        return 2 * outputs * prod(shapes[node.input[1]][1:])
    if node.op_type in ("MatMul", "Gemm"):
        return 2 * outputs * max(shapes[node.input[0]], default=1)
    kernel = [attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape"]
    return outputs * prod(kernel[0]) if kernel else 0
