"""Simulated INT8 and FP16 in ONNX Runtime on the CPU, and the change of scores and heads that INT8 causes.

Rounding to INT8 levels is exact here, and the rest is float32. An engine adds the same levels as integers and computes the
rest in FP16, so its outputs differ from these only by rounding.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from darktrt.check.variants import insert_variants
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo
from darktrt.onnx_cost import limit_batch
from darktrt.onnx_file import load_model
from darktrt.onnx_session import OnnxSession
from darktrt.plugins.functions import embed
from darktrt.surgery.head import decode_heads
from darktrt.surgery.precision import backbone, ends, halve
from darktrt.surgery.qdq import Calibration, default_fp_layers, quantize
from darktrt.surgery.rewrite import import_graph
from darktrt.vision.detector import Run, fit
from darktrt.vision.images import read_image

_SECTION = re.compile(r"/layers\.(\d+)/")
"""The exporter's node names contain the number of the cfg section."""


@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """A detector in floating point, with its metadata."""

    model: onnx.ModelProto
    info: DetectorInfo


class Convolution(NamedTuple):
    """A convolution of the backbone and the cfg section that it comes from."""

    node: str
    section: int
    line: int


def load_network(path: str | Path) -> OnnxNetwork:
    """Load a detector that can be quantized and can detect.

    Raises:
        DarktrtError: the file is no ONNX file of darktrt, is quantized already, or ends at its raw heads.
    """
    model, info = load_model(path)
    if info.int8_convolutions:
        raise DarktrtError(f"{path}: has Q/DQ nodes already; use the ONNX file without them")
    if info.head == "raw":
        raise DarktrtError(f"{path}: ends at its raw heads; make it with head nms or decode")
    return OnnxNetwork(model, limit_batch(model, info, str(path)))


def convolutions(network: OnnxNetwork) -> list[Convolution]:
    """The convolutions that can be quantized, in graph order."""
    nodes = backbone(import_graph(network.model), network.info)
    return [_convolution(node.name, network.info) for node in nodes if node.op == "Conv"]


def _convolution(node: str, info: DetectorInfo) -> Convolution:
    """The section is found by the number in the node's name, for surgery may have fused its output tensor into another node."""
    number = _SECTION.match(node)
    for layer in info.layers:
        if number and layer.index == int(number[1]):
            return Convolution(node, layer.index, layer.line)
    raise DarktrtError(f"'{node}' belongs to no cfg section of the metadata; convert the network again")


def chosen_fp_layers(network: OnnxNetwork, calibration: Calibration | None = None) -> list[str]:
    """The convolutions that INT8 leaves in floating point: the calibration's, or else the default ones."""
    if calibration and calibration.fp_layers is not None:
        return list(calibration.fp_layers)
    return default_fp_layers(import_graph(network.model), network.info)


def quantized(network: OnnxNetwork, calibration: Calibration, fp_layers: Collection[str]) -> onnx.ModelProto:
    """The network with Q/DQ nodes around every convolution but ``fp_layers``, as INT8 engines are built from it.

    Raises:
        DarktrtError: the calibration lacks a tensor of this network, or ``fp_layers`` names no convolution of it.
    """
    graph = import_graph(network.model)
    quantize(graph, network.info, replace(calibration, fp_layers=tuple(fp_layers)))
    return _exported(graph.toposort())


def halved(network: OnnxNetwork) -> onnx.ModelProto:
    """The network with its backbone in FP16, as FP16 engines are built from it.

    Raises:
        DarktrtError: a weight is too large for FP16.
    """
    graph = import_graph(network.model)
    halve(graph, network.info)
    return _exported(graph.toposort())


def up_to_boxes(network: OnnxNetwork) -> OnnxNetwork:
    """The network cut behind decoding: its outputs are ``boxes (N, A, 4)``, ``scores (N, A, C)`` and the raw heads.

    A network that takes images of any size then begins at its pixels, the input ``images_float``.
    """
    info = network.info
    graph = import_graph(network.model)
    decode_heads(graph, info)
    pixels, heads = ends(graph, info)
    if info.input == "image":
        pixels.inputs.clear()
        graph.inputs[0] = pixels
        info = replace(info, input="float", image_sizes=None)
    graph.outputs += heads
    graph.cleanup(remove_unused_graph_inputs=True)
    return OnnxNetwork(_exported(graph), info)


def _exported(graph: gs.Graph) -> onnx.ModelProto:
    model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    embed(model)
    return model


def session(model: onnx.ModelProto, threads: int = 0) -> Run:
    """The model as a function of its named inputs, in ONNX Runtime on the CPU.

    Args:
        threads: of its own; by default one for each core.

    Raises:
        DarktrtError: ONNX Runtime refuses the model; the function raises it where the inputs do not fit.
    """
    return OnnxSession(model.SerializeToString(), model.graph.name, threads, dequantize_weights=True).run


class Change(NamedTuple):
    """The change of a network's outputs against those in float."""

    scores: float
    """Weighted RMS: sqrt(sum w |s' - s|^2 / sum w) over all anchors of all images, where s and s' are an anchor's vectors
    of class scores (objectness times class, 0..1), in float and changed, and w is the anchor's best float score, which weights
    anchors without a threshold."""
    heads: float
    """Of the raw heads: sqrt(sum (r' - r)^2 / sum r^2) over all elements."""

    @staticmethod
    def of(sums: NDArray[np.float64]) -> Change:
        """The change by its sums ``(images, 5)``, those of :meth:`FloatReference.sums`."""
        scores, weight, heads, strength, _ = sums.sum(0).tolist()
        return Change(math.sqrt(scores / weight) if weight else 0.0, math.sqrt(heads / strength) if strength else 0.0)


class FloatReference:
    """Images and the float network's outputs for them, against which quantized forms of the network are measured.

    It holds the input and the float outputs of every image, 8 MB each for yolov4 at 416 x 416, so it is for tens of images.
    Images run alone and in one thread each, so that the outputs do not depend on the machine's cores; they run side by side.

    Args:
        threads: how many images run side by side; by default one for each core.

    Raises:
        DarktrtError: an image cannot be read, or an output of the float network is NaN.
    """

    def __init__(self, network: OnnxNetwork, images: Sequence[Path], threads: int | None = None) -> None:
        self.network = up_to_boxes(network)
        self.threads = threads or len(os.sched_getaffinity(0))
        self.inputs = [fit(read_image(path), self.network.info)[0] for path in images]
        least = self.network.info.batch[0]  # a network with a larger smallest batch gets each image several times
        run, input_ = session(self.network.model, threads=1), self.network.model.graph.input[0].name
        self.expected = self._each_image(lambda image: [v[0] for v in run({input_: np.stack([image] * least)}).values()])
        if not all(np.isfinite(values).all() for _, *outputs in self.expected for values in outputs):
            raise DarktrtError(f"{network.info.name}: its outputs are NaN or infinite; are the weights damaged?")

    def change(self, calibration: Calibration, fp_layers: Collection[str]) -> Change:
        """The change of the outputs when all convolutions but ``fp_layers`` are quantized."""
        group = [one.node for one in convolutions(self.network) if one.node not in fp_layers]
        return Change.of(self.sums(calibration, [group])[:, 0])

    def sums(self, calibration: Calibration, groups: Sequence[Collection[str]]) -> NDArray[np.float64]:
        """For each group the sums over each image when only its convolutions are quantized, ``(images, groups, 5)``.

        The first four are those of both fractions of :class:`Change`, numerator before denominator. The last one is
        ``sum w |d|^2``, where w is as there, and d is how far the four edges of an anchor's box move, in shares of its width
        and height in float; an edge moves by 1 at most. Boxes that are infinite in float do not count.
        """
        graph = import_graph(self.network.model)
        insert_variants(graph, self.network.info, calibration, groups)
        run, input_ = session(_exported(graph), threads=1), graph.inputs[0].name
        changed = self._each_image(lambda image: list(run({input_: image[np.newaxis]}).values()))
        pairs = zip(self.expected, changed, strict=True)
        return np.array([[_sums(floats, each) for each in zip(*actual, strict=True)] for floats, actual in pairs])

    def _each_image(self, outputs: Callable[[NDArray[Any]], list[NDArray[Any]]]) -> list[list[NDArray[Any]]]:
        """The outputs for each image: boxes, scores and raw heads."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(outputs, self.inputs))


def operations(network: OnnxNetwork) -> dict[str, float]:
    """Each convolution's share of the multiplications of all convolutions, in graph order."""
    cut = up_to_boxes(network)
    graph = import_graph(cut.model)
    nodes = [node for node in backbone(graph, cut.info) if node.op == "Conv"]
    weights = [node.inputs[1].values.size for node in nodes]
    graph.outputs = [node.outputs[0] for node in nodes]
    for output in graph.outputs:
        output.dtype = np.float32
    image = fit(np.zeros((1, 1, 3), np.uint8), cut.info)[0]
    outputs = session(_exported(graph.cleanup()))({cut.model.graph.input[0].name: np.stack([image] * cut.info.batch[0])})
    counts = np.multiply(weights, [values[0, 0].size for values in outputs.values()], dtype=np.float64)
    return dict(zip([node.name for node in nodes], (counts / counts.sum()).tolist(), strict=True))


def _sums(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """The five sums of :meth:`FloatReference.sums` over one image."""
    (boxes, scores, *heads), (moved_boxes, moved_scores, *moved_heads) = expected, actual
    weight = scores.max(1).astype(np.float64)
    moved = np.square(moved_scores - scores, dtype=np.float64).sum(1)
    error = sum(np.square(one - other, dtype=np.float64).sum() for one, other in zip(moved_heads, heads, strict=True))
    strength = sum(np.square(one, dtype=np.float64).sum() for one in heads)
    finite = np.isfinite(boxes).all(1)  # the others are never detections
    shifts = np.abs(moved_boxes[finite] - boxes[finite]) / np.maximum(_sizes(boxes[finite]), 1e-6)
    edges = np.square(np.fmin(shifts, 1), dtype=np.float64).sum(1)
    # no dot product: BLAS splits a long one among threads
    return np.array([(weight * moved).sum(), weight.sum(), error, strength, (weight[finite] * edges).sum()])


def _sizes(boxes: NDArray[Any]) -> NDArray[Any]:
    """Width and height of boxes, twice: ``(A, 4)``."""
    return np.tile(boxes[:, 2:] - boxes[:, :2], 2)
