"""Weakly typed networks (TensorRT 8.6 to 10): the precision of layers, and INT8 by a calibrator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from darktrt.calib.trt_calibrator import BatchSource, Source
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo

if TYPE_CHECKING:
    from darktrt.engine.trt_types import Config, Tensor, TensorRT, TrtLayer, TrtNetwork

_POINTWISE = {"ACTIVATION", "ELEMENTWISE", "UNARY", "SCALE", "PARAMETRIC_RELU"}
_NOT_PINNED = {"CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE"}
"""Types of layers whose precision cannot be chosen."""


@dataclass(frozen=True)
class Calibrated:
    """INT8 by a calibrator: the source of its scales, and the outputs of convolutions of fixed precision."""

    source: Source
    fp_layers: tuple[str, ...] = ()
    """Outputs of the convolutions in FP16."""
    int8: tuple[str, ...] = ()
    """Outputs of the convolutions in INT8."""


@dataclass(frozen=True)
class GpuCalibration:
    """INT8 by scales that TensorRT itself chooses during the build, from images on the GPU."""

    images: BatchSource
    fp_layers: tuple[str, ...] | None = None
    """As in :class:`darktrt.surgery.qdq.Calibration`."""


class NetworkMap:
    """A parsed TensorRT network and its backbone, the layers between the image and the raw heads.

    Raises:
        DarktrtError: the network lacks the tensor of a head.
    """

    def __init__(self, network: TrtNetwork, info: DetectorInfo) -> None:
        self.layers = [network.get_layer(i) for i in range(network.num_layers)]
        self.heads = [head.tensor for head in info.heads]
        produced = {tensor.name: i for i, layer in enumerate(self.layers) for tensor in outputs(layer)}
        self._producers: Mapping[str, int] = produced
        self.image = "images_float" if "images_float" in produced else "images"
        if missing := [head for head in self.heads if head not in produced]:
            raise DarktrtError(f"{info.name}: TensorRT's network has no tensor '{missing[0]}', a head; convert it again")
        self.backbone = self._backbone()
        self._fits_images = info.input == "image"

    def _backbone(self) -> set[int]:
        backbone: set[int] = set()
        waiting = list(self.heads)
        while waiting:
            name = waiting.pop()
            layer = self._producers.get(name)
            if layer is not None and layer not in backbone and name != self.image:
                backbone.add(layer)
                waiting += [tensor.name for tensor in inputs(self.layers[layer])]
        return backbone

    def behind_heads(self) -> list[TrtLayer]:
        """The layers that decode, in order."""
        return [self.layers[i] for i in self._decoding()]

    def _decoding(self) -> list[int]:
        decoding, reached = [], set(self.heads)
        for i, layer in enumerate(self.layers):  # TensorRT's parser adds them in the order of the graph
            if i not in self.backbone and reached.intersection(tensor.name for tensor in inputs(layer)):
                reached.update(tensor.name for tensor in outputs(layer))
                decoding.append(i)
        return decoding

    def before_image(self) -> list[TrtLayer]:
        """The layers that fit images of any size into the input, where they are standard ops; none for other input forms."""
        others = self.backbone.union(self._decoding())
        before = [layer for i, layer in enumerate(self.layers) if i not in others]
        return [layer for layer in before if not layer.type.name.startswith("PLUGIN")] if self._fits_images else []

    def fp_layers(self, convolutions: Iterable[str]) -> list[TrtLayer]:
        """The layers with these outputs and the activations that follow them, in order."""
        fp_layers, reached = [], set(convolutions)
        for i in sorted(self.backbone):
            layer = self.layers[i]
            follows = layer.type.name in _POINTWISE and reached.intersection(tensor.name for tensor in inputs(layer))
            if follows or reached.intersection(tensor.name for tensor in outputs(layer)):
                reached.update(tensor.name for tensor in outputs(layer))
                fp_layers.append(layer)
        return fp_layers

    def producers(self, tensors: Iterable[str]) -> list[TrtLayer]:
        """The layers with these outputs."""
        return [self.layers[self._producers[name]] for name in tensors if name in self._producers]

    def activations(self) -> list[str]:
        """The float tensors from the image to the raw heads, both included: those with INT8 scales."""
        layers = [self.layers[i] for i in sorted(self.backbone) if self.layers[i].type.name != "CONSTANT"]
        return [self.image, *(tensor.name for layer in layers for tensor in outputs(layer) if _is_float(tensor))]


def set_precision(trt: TensorRT, config: Config, network: NetworkMap, int8: bool, calibrated: Calibrated | None = None) -> None:
    """Let TensorRT compute the backbone in FP16, or in INT8 and FP16, with fixed precisions for some layers.

    Decoding and NMS stay in FP32: box coordinates do not fit the 11 bits of FP16. So do standard ops that fit images into the
    input; the plugin for that states its types itself. The floating-point layers of ``calibrated`` are in FP16. TensorRT must
    obey these precisions or fail; if it only had to prefer them, it would ignore them silently.

    The other convolutions, except those that ``calibrated`` fixes in INT8, are free: TensorRT chooses for each the precision
    that it measures as faster, reformatting included. INT8 is not forced by default, for its purpose is speed. With
    TensorRT 8.6.0 on an H100 and optimization level 1 that is INT8 for all 106 in yolov4 at 608 x 608, for 10 or 11 of 14
    in yolov4-tiny-mish and for 8 of 14 in yolov4-tiny at 416 x 416. :mod:`darktrt.engine.layer_list` reads the choice.
    """
    flags = trt.BuilderFlag
    for flag in (flags.FP16, *([flags.INT8] if int8 else []), flags.OBEY_PRECISION_CONSTRAINTS):
        config.set_flag(flag)
    for layer in (*network.before_image(), *network.behind_heads()):
        if layer.type.name not in _NOT_PINNED and any(map(_is_float, outputs(layer))):
            layer.precision = trt.DataType.FLOAT
            for i, tensor in enumerate(outputs(layer)):
                if _is_float(tensor):
                    layer.set_output_type(i, trt.DataType.FLOAT)
    if calibrated:
        for layer in network.fp_layers(calibrated.fp_layers):
            layer.precision = trt.DataType.HALF
        for layer in network.producers(calibrated.int8):
            layer.precision = trt.DataType.INT8


def inputs(layer: TrtLayer) -> list[Tensor]:
    tensors = (layer.get_input(i) for i in range(layer.num_inputs))
    return [tensor for tensor in tensors if tensor is not None]  # optional ones may be left out


def outputs(layer: TrtLayer) -> list[Tensor]:
    return [layer.get_output(i) for i in range(layer.num_outputs)]


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype.name in ("FLOAT", "HALF")
