"""INT8 stated in the graph: QuantizeLinear and DequantizeLinear where TensorRT fuses them, scales from a calibration table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from darktrt import DarktrtError, DetectorInfo
from surgery.half import backbone, ends

LEVELS = 127
"""Of one sign: INT8 is used symmetrically, as TensorRT does."""


@dataclass(frozen=True)
class QuantizeReport:
    """The convolutions that compute in INT8 now, and those kept in floating point; names of their nodes, in graph order."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]


def quantize(
    graph: gs.Graph, info: DetectorInfo, scales: Mapping[str, np.float32], keep: Collection[str] | None = None
) -> QuantizeReport:
    """Let every convolution of the backbone but ``keep`` take INT8 inputs and weights.

    Each input tensor gets one pair of QuantizeLinear and DequantizeLinear, whoever reads it; weights are stored as INT8 with a
    scale per output channel, biases stay as they are (TensorRT refuses INT32 ones). TensorRT moves the pairs through max
    pools, concats and upsamples by itself.

    Args:
        scales: amax / 127 of each tensor, by its name in the graph.
        keep: names of convolution nodes to leave in floating point; None for those of :func:`default_keep`.

    Raises:
        DarktrtError: a tensor has no scale, or ``keep`` names no convolution.
    """
    convolutions = _convolutions(graph, info)
    names = {node.name for node in convolutions}
    keep = default_keep(graph, info) if keep is None else keep
    if unknown := sorted(set(keep) - names):
        raise DarktrtError(f"'{unknown[0]}' is no convolution of this network; the names are like '{min(names)}'")
    chosen = [node for node in convolutions if node.name not in keep]
    missing = sorted({node.inputs[0].name for node in chosen} - set(scales))
    if missing:
        raise DarktrtError(
            f"the calibration table has no scale for {len(missing)} tensors of this network, '{missing[0]}' for one; "
            "calibrate this very network"
        )
    dequantized: dict[str, gs.Tensor] = {}
    for node in chosen:
        x = node.inputs[0]
        if x.name not in dequantized:
            dequantized[x.name] = _quantize_activation(graph, x, half_scale(scales[x.name]))
        node.inputs[0] = dequantized[x.name]
        node.inputs[1] = _quantize_weight(graph, node.inputs[1])
    return QuantizeReport(tuple(n.name for n in chosen), tuple(n.name for n in convolutions if n.name in keep))


def default_keep(graph: gs.Graph, info: DetectorInfo) -> list[str]:
    """The first convolution and those that give the raw heads: few operations, and the most to lose."""
    first, heads = ends(graph, info)
    last = _nearest_convolutions(heads)
    return [node.name for node in _convolutions(graph, info) if node.inputs[0] is first or node.name in last]


def _convolutions(graph: gs.Graph, info: DetectorInfo) -> list[gs.Node]:
    return [node for node in backbone(graph, info) if node.op == "Conv"]


def _nearest_convolutions(tensors: Sequence[gs.Tensor]) -> set[str]:
    """Names of the convolutions met first going up from these tensors."""
    waiting, found = list(tensors), set()
    while waiting:
        for node in waiting.pop().inputs:
            if node.op == "Conv":
                found.add(node.name)
            else:
                waiting += node.inputs
    return found


def half_scale(scale: npt.NDArray[np.float32] | np.float32) -> npt.NDArray[np.float32]:
    """Scales as FP16 has them, so that a graph lowered to FP16 quantizes by the same numbers; never 0."""
    rounded: npt.NDArray[np.float32] = np.maximum(np.asarray(scale).astype(np.float16), np.float16(2**-24)).astype(np.float32)
    return rounded


def _quantize_activation(graph: gs.Graph, x: gs.Tensor, scale: npt.NDArray[np.float32]) -> gs.Tensor:
    zero = gs.Constant(f"{x.name}_zero", np.zeros((), np.int8))
    step = gs.Constant(f"{x.name}_scale", np.array(scale, np.float32).reshape(()))
    quantized = gs.Variable(f"{x.name}_int8", np.int8, x.shape)
    result = gs.Variable(f"{x.name}_dequantized", np.float32, x.shape)
    graph.nodes.append(gs.Node("QuantizeLinear", f"{x.name}_quantize", {}, [x, step, zero], [quantized]))
    graph.nodes.append(gs.Node("DequantizeLinear", f"{x.name}_dequantize", {}, [quantized, step, zero], [result]))
    return result


def _quantize_weight(graph: gs.Graph, weight: gs.Constant) -> gs.Tensor:
    values = weight.values.astype(np.float32)
    amax = np.abs(values).max((1, 2, 3))
    scale = half_scale(np.where(amax > 0, amax / LEVELS, 1).astype(np.float32))
    levels = np.clip(np.rint(values / scale[:, None, None, None]), -LEVELS, LEVELS).astype(np.int8)
    stored = gs.Constant(f"{weight.name}_int8", levels)
    step = gs.Constant(f"{weight.name}_scale", scale)
    zero = gs.Constant(f"{weight.name}_zero", np.zeros(len(scale), np.int8))
    result = gs.Variable(f"{weight.name}_dequantized", np.float32, values.shape)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{weight.name}_dequantize", {"axis": 0}, [stored, step, zero], [result]))
    return result
