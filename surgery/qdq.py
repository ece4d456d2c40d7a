"""INT8 stated in the graph: QuantizeLinear and DequantizeLinear where TensorRT fuses them, scales from a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from darktrt.calib.bias_correction import ChannelMeans, corrected_bias
from darktrt.errors import DarktrtError, quote
from darktrt.metadata import DetectorInfo
from darktrt.surgery.precision import backbone, ends

_MOST_HALF = float(np.finfo(np.float16).max)
LEVELS = 127
"""Of one sign: the quantization is symmetric, as TensorRT's."""


@dataclass(frozen=True)
class Calibration:
    """The result of a calibration: scales, floating-point layers and channel means."""

    scales: Mapping[str, np.float32]
    """The INT8 scale of each tensor, amax / 127."""
    fp_layers: tuple[str, ...] | None = None
    """Node names of the convolutions to leave in floating point; None for those of :func:`default_fp_layers`."""
    channel_means: Mapping[str, ChannelMeans] = field(default_factory=dict)
    """The channel means of tensors before and after quantization, by which biases are corrected; may lack tensors."""
    sha256: str = ""
    """Of the file that all this comes from, for an engine's manifest."""
    model_sha256: str = ""
    """Of the ONNX file that was calibrated; empty where it is not known, as of a TensorRT cache."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """The hashes of cfg and weights of that network, as far as they are known."""
    images: frozenset[str] = frozenset()
    """The SHA-256 of the images that it was calibrated on, as far as they are known."""


@dataclass(frozen=True)
class QuantizeReport:
    """The precision of each convolution of the backbone."""

    quantized: tuple[str, ...]
    """Node names of the convolutions in INT8, in graph order."""
    fp_layers: tuple[str, ...]
    """Node names of the convolutions in floating point, in graph order."""


def quantize(graph: gs.Graph, info: DetectorInfo, calibration: Calibration) -> QuantizeReport:
    """Quantize the inputs and weights of every convolution of the backbone except the floating-point layers, in place.

    Each input tensor gets one pair of QuantizeLinear and DequantizeLinear for all its readers. Weights are stored as INT8 with
    a scale per output channel. Biases stay in floating point (TensorRT refuses INT32 ones) and are corrected by the channel
    means. TensorRT moves the pairs through max pools, concats and upsamples by itself. Activations, Mish as one node among
    them, have floating-point inputs; the pair behind them is fused into their output. Residual adds stay in floating point:
    quantized inputs would add rounding errors block after block to the sum that all later blocks read.

    Raises:
        DarktrtError: the calibration is of other weights, a tensor has no scale, a weight is NaN or infinite, or ``fp_layers``
            contains a name that is no convolution.
    """
    report = choose_precisions(graph, info, calibration)
    dequantized: dict[str, gs.Tensor] = {}  # convolutions may share inputs and weights
    for node in [node for node in _convolutions(graph, info) if node.name in report.quantized]:
        x, weight = node.inputs[:2]
        if not np.isfinite(weight.values).all():
            raise DarktrtError(f"the weights of '{quote(node.name)}' are NaN or infinite; convert the network again")
        if x.name not in dequantized:
            dequantized[x.name] = _quantize_activation(graph, x, half_scale(calibration.scales[x.name]))
        step = half_scale(_steps(weight.values))
        levels = _levels(weight.values, step)
        if x.name in calibration.channel_means:
            _correct_bias(node, _restored(levels, step), calibration.channel_means[x.name])
        if weight.name not in dequantized:
            dequantized[weight.name] = _quantized_weight(graph, weight, levels, step)
        node.inputs[0] = dequantized[x.name]
        node.inputs[1] = dequantized[weight.name]
    return report


def choose_precisions(graph: gs.Graph, info: DetectorInfo, calibration: Calibration) -> QuantizeReport:
    """The convolutions that :func:`quantize` quantizes, and those that it leaves in floating point; ``graph`` stays as it is.

    Raises:
        DarktrtError: as :func:`quantize`.
    """
    _check_weights(info, calibration)
    convolutions = _convolutions(graph, info)
    fp_layers = fp_layer_names(graph, info, calibration.fp_layers)
    chosen = [node for node in convolutions if node.name not in fp_layers]
    _check_scales(graph, chosen, calibration.scales)
    return QuantizeReport(tuple(n.name for n in chosen), tuple(n.name for n in convolutions if n.name in fp_layers))


def _check_weights(info: DetectorInfo, calibration: Calibration) -> None:
    own, calibrated = info.sources.get("weights"), calibration.sources.get("weights")
    if own and calibrated and own != calibrated:
        raise DarktrtError(
            f"the calibration is of a network with other weights ({quote(calibrated, 20)}, not {quote(own, 20)}); calibrate "
            "this very network, or export the scales as a TensorRT cache to use them as they are",
            "calibration",
        )


def _check_scales(graph: gs.Graph, convolutions: Sequence[gs.Node], scales: Mapping[str, np.float32]) -> None:
    missing = sorted({node.inputs[0].name for node in convolutions} - set(scales))
    if not missing:
        return
    foreign = len(set(scales).difference(graph.tensors()))
    hint = (
        f"; {foreign} of its {len(scales)} tensors are unknown here, is it of another network?"
        if 2 * foreign > len(scales)
        else ""
    )
    raise DarktrtError(
        f"the calibration has no scale for {len(missing)} tensors of this network, '{missing[0]}' among them{hint}; "
        "calibrate this very network"
    )


def fp_layer_names(graph: gs.Graph, info: DetectorInfo, fp_layers: tuple[str, ...] | None) -> list[str]:
    """The convolutions to leave in floating point: ``fp_layers``, or :func:`default_fp_layers` where that is None.

    Raises:
        DarktrtError: ``fp_layers`` contains a name that is no convolution.
    """
    names = {node.name for node in _convolutions(graph, info)}
    if unknown := sorted(set(fp_layers or ()) - names):
        raise DarktrtError(
            f"'{quote(unknown[0])}' is no convolution of this network; the names are like '{min(names)}'", argument="fp_layers"
        )
    return default_fp_layers(graph, info) if fp_layers is None else list(fp_layers)


def default_fp_layers(graph: gs.Graph, info: DetectorInfo) -> list[str]:
    """The first convolution and those that compute the raw heads: few operations, and the largest loss by INT8."""
    first, heads = ends(graph, info)
    last = _nearest_convolutions(heads)
    return [node.name for node in _convolutions(graph, info) if node.inputs[0] is first or node.name in last]


def _convolutions(graph: gs.Graph, info: DetectorInfo) -> list[gs.Node]:
    return [node for node in backbone(graph, info) if node.op == "Conv"]


def _nearest_convolutions(tensors: Sequence[gs.Tensor]) -> set[str]:
    """Names of the convolutions nearest above these tensors."""
    waiting, nearest = list(tensors), set()
    while waiting:
        for node in waiting.pop().inputs:
            if node.op == "Conv":
                nearest.add(node.name)
            else:
                waiting += node.inputs
    return nearest


def half_scale(scale: npt.NDArray[np.float32] | np.float32) -> npt.NDArray[np.float32]:
    """Scales rounded to FP16, so that a graph lowered to FP16 quantizes by the same numbers; neither 0 nor infinite."""
    rounded: npt.NDArray[np.float32] = np.clip(np.asarray(scale), 2.0**-24, _MOST_HALF).astype(np.float16).astype(np.float32)
    return rounded


def _quantize_activation(graph: gs.Graph, x: gs.Tensor, scale: npt.NDArray[np.float32]) -> gs.Tensor:
    zero = gs.Constant(f"{x.name}_zero", np.zeros((), np.int8))
    step = gs.Constant(f"{x.name}_scale", np.array(scale, np.float32).reshape(()))
    quantized = gs.Variable(f"{x.name}_int8", np.int8, x.shape)
    result = gs.Variable(f"{x.name}_dequantized", np.float32, x.shape)
    graph.nodes.append(gs.Node("QuantizeLinear", f"{x.name}_quantize", {}, [x, step, zero], [quantized]))
    graph.nodes.append(gs.Node("DequantizeLinear", f"{x.name}_dequantize", {}, [quantized, step, zero], [result]))
    return result


def _steps(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The scale ``(O,)`` of each output channel of a weight ``(O, I, kh, kw)``: amax / 127."""
    amax = np.abs(weight.astype(np.float32)).max((1, 2, 3))
    return np.where(amax > 0, amax / LEVELS, 1).astype(np.float32)


def _levels(weight: npt.NDArray[np.float32], step: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """INT8 levels of a weight ``(O, I, kh, kw)`` by these scales ``(O,)``."""
    values = weight.astype(np.float32)
    levels: npt.NDArray[np.int8] = np.clip(np.rint(values / step[:, None, None, None]), -LEVELS, LEVELS).astype(np.int8)
    return levels


def _restored(levels: npt.NDArray[np.int8], step: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return levels * step[:, None, None, None]


def _correct_bias(node: gs.Node, quantized: npt.NDArray[np.float32], means: ChannelMeans) -> None:
    weight = node.inputs[1].values
    if len(node.inputs) > 2 and not isinstance(node.inputs[2], gs.Constant):
        raise DarktrtError(f"the bias of '{quote(node.name)}' is no constant; convert the network again")
    old = node.inputs[2].values if len(node.inputs) > 2 else np.zeros(len(weight), np.float32)
    bias = gs.Constant(f"{node.name}_bias_corrected", corrected_bias(old, weight, quantized, means, node.attrs.get("group", 1)))
    node.inputs = [*node.inputs[:2], bias]


def correct_biases(model: onnx.ModelProto, channel_means: Mapping[str, ChannelMeans]) -> None:
    """Correct the biases of convolutions that a weakly typed TensorRT computes in INT8, in place.

    Such a TensorRT quantizes weights as the Q/DQ nodes here do, but by scales in FP32.

    Args:
        channel_means: of the inputs of those convolutions, by the names of their nodes.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.name in channel_means:
            weight = numpy_helper.to_array(stored[node.input[1]])
            old = numpy_helper.to_array(stored[node.input[2]]) if len(node.input) > 2 else np.zeros(len(weight), np.float32)
            step = _steps(weight)
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            bias = corrected_bias(old, weight, _restored(_levels(weight, step), step), channel_means[node.name], groups)
            name = f"{node.name}_bias_corrected"
            model.graph.initializer.append(numpy_helper.from_array(bias, name))
            node.input[:] = [*node.input[:2], name]


def _quantized_weight(
    graph: gs.Graph, weight: gs.Constant, levels: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]
) -> gs.Tensor:
    stored = gs.Constant(f"{weight.name}_int8", levels)
    step = gs.Constant(f"{weight.name}_scale", scale)
    zero = gs.Constant(f"{weight.name}_zero", np.zeros(len(scale), np.int8))
    result = gs.Variable(f"{weight.name}_dequantized", np.float32, levels.shape)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{weight.name}_dequantize", {"axis": 0}, [stored, step, zero], [result]))
    return result
