"""Torch modules for darknet's layers, built by the type of their record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from darktrt.convert import cfg
from darktrt.convert.cfg import Layer
from darktrt.convert.shapes import Shape, step_of, unblurred
from darktrt.convert.weights import LayerWeights, binarize, fold


def _hard_mish(x: Tensor) -> Tensor:
    # hard_mish_yashas of activations.c: x above 0, x * x / 2 + x down to -2, else 0
    negative = x.clamp(-2, 0)
    return negative * negative / 2 + negative + functional.relu(x)


def _normalize_channels(x: Tensor) -> Tensor:
    positive = functional.relu(x)
    return positive / (positive.sum(1, keepdim=True) + 0.0001)


def _normalize_channels_softmax(x: Tensor) -> Tensor:
    # shifting by the maximum changes nothing but the weight of the 0.0001, which darknet adds to the sum
    exponential = torch.exp(x)
    return exponential / (exponential.sum(1, keepdim=True) + 0.0001)


def _normalize_channels_softmax_maxval(x: Tensor) -> Tensor:
    return _normalize_channels_softmax(x - x.amax(1, keepdim=True))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "logistic": torch.sigmoid,
    "loggy": lambda x: 2 * torch.sigmoid(x) - 1,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "elu": functional.elu,
    "selu": lambda x: 1.0507 * functional.relu(x) + 1.0507 * 1.6732 * (torch.exp(x.clamp(max=0)) - 1),
    "gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.797885 * x + 0.035677 * x * x * x)),
    "relie": lambda x: functional.leaky_relu(x, 0.01),
    "ramp": lambda x: functional.relu(x) + 0.1 * x,
    "leaky": lambda x: functional.leaky_relu(x, 0.1),
    "revleaky": lambda x: functional.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "stair": lambda x: torch.where(torch.floor(x) % 2 == 0, torch.floor(x / 2), x - torch.floor(x) + torch.floor(x / 2)),
    "plse": lambda x: 0.125 * x.clamp(-4, 4) + 0.5 + 0.01 * (x - x.clamp(-4, 4)),
    "hardtan": lambda x: x.clamp(-1, 1),
    "lhtan": lambda x: x.clamp(0, 1) + 0.001 * (x - x.clamp(0, 1)),
    "swish": lambda x: x * torch.sigmoid(x),
    "mish": lambda x: x * torch.tanh(functional.softplus(x)),
    "hard_mish": _hard_mish,
    "normalize_channels": _normalize_channels,
    "normalize_channels_softmax": _normalize_channels_softmax,
    "normalize_channels_softmax_maxval": _normalize_channels_softmax_maxval,
}
"""By darknet's name; formulas of activations.h, where relu6 and hard_mish mean what their GPU code does."""


class DarknetLayer(nn.Module):
    """A layer: called with one tensor ``(N, C, H, W)`` per source of its record."""

    def load(self, weights: LayerWeights) -> None:
        """Take the layer's arrays from a weights file; layers without weights have none."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        result: Tensor = super().__call__(*inputs)
        return result


class Convolution(DarknetLayer):
    """Convolution with batch normalisation folded in, then the activation, then the blur."""

    def __init__(self, layer: cfg.Convolutional, channels: int) -> None:
        super().__init__()
        self.record = layer
        self.activation = ACTIVATIONS[layer.activation]
        self.blur = Blur(layer, layer.filters)
        shape = (layer.filters, channels // layer.groups, layer.size, layer.size)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(layer.filters), requires_grad=False)

    def load(self, weights: LayerWeights) -> None:
        weight, bias = fold(weights)
        if self.record.binary_weights:
            signs, means = binarize(weight)
            weight = signs * means[:, None, None, None]
        self.weight.data, self.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.blur(self.activation(self.convolve(x)))

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution without the activation."""
        return self._convolve(x, self.bias)

    def _convolve(self, x: Tensor, bias: Tensor) -> Tensor:
        r = self.record
        stride, padding = (1, 1) if r.blur else (r.stride_y, r.stride_x), r.padding * r.dilation
        return functional.conv2d(x, self.weight, bias, stride, padding, r.dilation, r.groups)


class BinaryConvolution(Convolution):
    """A convolution of signs by signs (XNOR-Net), times the mean magnitude of each filter's weights.

    As ``detector test`` computes it (``gemm_nn_custom_bin_mean_transposed``), where padding counts as -1. An input is 1 above
    0 here and else 0, as padding is, weights are twice their signs, and ``offset`` makes up for both; these are whole numbers,
    so the sums are exact and no sign of a later layer can turn by their rounding. darknet's CPU code computes rubbish where 32
    does not divide the input's channels and the size is not 3 with stride 1; here that is as everywhere else.
    """

    def __init__(self, layer: cfg.Convolutional, channels: int) -> None:
        super().__init__(layer, channels)
        self.offset = nn.Parameter(torch.empty(layer.filters), requires_grad=False)
        self.means = nn.Parameter(torch.empty(1, layer.filters, 1, 1), requires_grad=False)

    def load(self, weights: LayerWeights) -> None:
        weight, bias = fold(weights)
        signs, means = binarize(weight)
        self.weight.data, self.offset.data = torch.from_numpy(2 * signs), torch.from_numpy(-signs.sum((1, 2, 3)))
        self.means.data, self.bias.data = torch.from_numpy(means).reshape(1, -1, 1, 1), torch.from_numpy(bias)

    def convolve(self, x: Tensor) -> Tensor:
        positive = functional.relu(torch.sign(x))
        return self._convolve(positive, self.offset) * self.means + self.bias.reshape(1, -1, 1, 1)


class Blur(DarknetLayer):
    """The blur of ``antialiasing``: each channel by 1 2 1 in both directions, or by the mean of 2 x 2; it has the strides."""

    weight: Tensor

    def __init__(self, layer: cfg.Convolutional | cfg.Pool, channels: int) -> None:
        super().__init__()
        self.size, self.strides, self.channels = layer.blur, (layer.stride_y, layer.stride_x), channels
        side = torch.tensor([1.0, 2.0, 1.0] if layer.blur == 3 else [1.0, 1.0])
        kernel = torch.outer(side, side)
        self.register_buffer("weight", (kernel / kernel.sum()).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.size:
            return x
        return functional.conv2d(x, self.weight, None, self.strides, 1 if self.size == 3 else 0, 1, self.channels)


class BatchNormalization(DarknetLayer):
    """[batchnorm] as a factor and an offset for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.empty(1, channels, 1, 1), requires_grad=False)
        self.offset = nn.Parameter(torch.empty(1, channels, 1, 1), requires_grad=False)

    def load(self, weights: LayerWeights) -> None:
        one = np.ones((len(weights["bias"]), 1, 1, 1), np.float32)
        factor, offset = fold({**weights, "weight": one})
        self.factor.data = torch.from_numpy(factor).reshape(1, -1, 1, 1)
        self.offset.data = torch.from_numpy(offset).reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


class Activating(DarknetLayer):
    """[activation]; every activation is what it is behind a convolution, where darknet's CPU code has 0 for some."""

    def __init__(self, layer: cfg.Activation) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class Pooling(DarknetLayer):
    """[maxpool] and [local_avgpool] as darknet pads: ``padding // 2`` left and top, what the output needs right and below."""

    def __init__(self, layer: cfg.Pool, source: Shape) -> None:
        super().__init__()
        self.kernel = (layer.size, layer.size)
        self.strides = (1, 1) if layer.blur else (layer.stride_y, layer.stride_x)
        before, output = layer.padding // 2, unblurred(layer, source)
        after = (
            max(0, (out - 1) * stride + layer.size - side - before)
            for out, stride, side in zip(output.spatial, self.strides, source.spatial, strict=True)
        )
        self.pads = (before, before, *after)
        self.pool = MaxPool if layer.kind == "maxpool" else AveragePool
        self.blur = Blur(layer, source.channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool.apply(x, self.kernel, self.strides, self.pads)  # type: ignore[no-untyped-call]
        return self.blur(pooled)


class ChannelPooling(DarknetLayer):
    """Output channel g is the largest of the input channels g, g + n, g + 2n, ... for n outputs; a last round may be short."""

    def __init__(self, layer: cfg.ChannelPool, source: Shape) -> None:
        super().__init__()
        self.count = layer.out_channels
        self.rounds, self.rest = divmod(source.channels, layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        cuts = [x[:, i * self.count : (i + 1) * self.count] for i in range(self.rounds)]
        largest = functools.reduce(torch.maximum, cuts)
        if not self.rest:
            return largest
        common = torch.maximum(largest[:, : self.rest], x[:, self.rounds * self.count :])
        return torch.cat([common, largest[:, self.rest :]], 1)


class MaxPool(torch.autograd.Function):
    """ONNX MaxPool, whose pads (top, left, bottom, right) may differ between edges; torch's may not."""

    onnx_op: ClassVar[str] = "MaxPool"
    onnx_attributes: ClassVar[dict[str, int]] = {}

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
    ) -> Tensor:
        top, left, bottom, right = pads
        return functional.max_pool2d(functional.pad(x, (left, right, top, bottom), value=-torch.inf), kernel, strides)

    @classmethod
    def symbolic(
        cls, g: Any, x: Any, kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
    ) -> Any:
        return g.op(cls.onnx_op, x, kernel_shape_i=kernel, strides_i=strides, pads_i=pads, **cls.onnx_attributes)


class AveragePool(MaxPool):
    """ONNX AveragePool that does not count the padding."""

    onnx_op = "AveragePool"
    onnx_attributes: ClassVar[dict[str, int]] = {"count_include_pad_i": 0}

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, int, int, int]
    ) -> Tensor:
        top, left, bottom, right = pads
        pair = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        means = functional.avg_pool2d(functional.pad(pair, (left, right, top, bottom)), kernel, strides)
        return means[:, :-1] / means[:, -1:]


class GlobalAveragePool(DarknetLayer):
    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, 1)


class Upsampling(DarknetLayer):
    def __init__(self, layer: cfg.Upsample) -> None:
        super().__init__()
        self.stride, self.reverse = layer.stride, layer.reverse
        self.scale = layer.scale * layer.stride**2 if layer.reverse else layer.scale

    def forward(self, x: Tensor) -> Tensor:
        if self.reverse:
            resized = functional.avg_pool2d(x, self.stride)
        else:
            resized = functional.interpolate(x, scale_factor=float(self.stride), mode="nearest")
        return resized if self.scale == 1 else resized * self.scale


class Routing(DarknetLayer):
    """Cuts group ``group_id`` from each input, then concatenates the cuts."""

    def __init__(self, layer: cfg.Route, sources: Sequence[Shape]) -> None:
        super().__init__()
        sizes = [source.channels // layer.groups for source in sources]
        self.cuts = [slice(layer.group_id * size, (layer.group_id + 1) * size) for size in sizes]
        self.whole = layer.groups == 1

    def forward(self, *inputs: Tensor) -> Tensor:
        cuts = inputs if self.whole else [x[:, cut] for x, cut in zip(inputs, self.cuts, strict=True)]
        return cuts[0] if len(cuts) == 1 else torch.cat(list(cuts), 1)


class Residual(DarknetLayer):
    """[shortcut]: the sum, weighted or not, of the common first channels, in the shape of the first input.

    Of a larger input it adds every second position, or third, ...
    """

    def __init__(self, layer: cfg.Shortcut, sources: Sequence[Shape]) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[layer.activation]
        self.normalization = layer.normalization
        self.total = sources[0].channels
        self.channels = [min(source.channels, self.total) for source in sources]
        self.wider = [source.channels > self.total for source in sources]
        self.steps = [step_of(source, sources[0]) for source in sources]
        count = self.total if layer.weights_type == "per_channel" else 1
        weight = None if layer.weights_type == "none" else nn.Parameter(torch.empty(len(sources), count), requires_grad=False)
        self.weight: nn.Parameter | None = weight

    def load(self, weights: LayerWeights) -> None:
        if self.weight is None:
            return
        weight = torch.from_numpy(weights["weight"].copy())
        # as fuse_conv_batchnorm (network.c) folds it: relu is clamped at 0.001, and 0.0001 is added to the sum
        if self.normalization == "relu":
            weight = weight.clamp(min=0.001)
        elif self.normalization == "softmax":
            weight = torch.exp(weight - weight.amax(0))
        if self.normalization != "none":
            weight = weight / (weight.sum(0) + 0.0001)
        self.weight.data = weight

    def forward(self, *inputs: Tensor) -> Tensor:
        total = self._weighted(0, inputs[0])
        for i, x in enumerate(inputs[1:], start=1):
            common = self.channels[i]
            cut = x[:, :common] if self.wider[i] else x
            cut = cut[:, :, :: self.steps[i], :: self.steps[i]] if self.steps[i] > 1 else cut
            term = self._weighted(i, cut)
            if common < self.total:
                total = torch.cat([total[:, :common] + term, total[:, common:]], 1)
            else:
                total = total + term
        return self.activation(total)

    def _weighted(self, i: int, x: Tensor) -> Tensor:
        return x if self.weight is None else x * self.weight[i, : self.channels[i]].reshape(1, -1, 1, 1)


class Product(DarknetLayer):
    """[sam] and [scale_channels]: the product of both inputs, broadcast, then the activation."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]

    def forward(self, factors: Tensor, x: Tensor) -> Tensor:
        return self.activation(x * factors)


class Constant(DarknetLayer):
    """[implicit]: the same ``(1, C, H, 1)`` for every image of a batch."""

    def __init__(self, layer: cfg.Implicit) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, layer.filters, layer.atoms, 1), requires_grad=False)

    def load(self, weights: LayerWeights) -> None:
        self.weight.data = torch.from_numpy(weights["weight"].copy())[None, :, :, None]

    def forward(self) -> Tensor:
        return self.weight


class Identity(DarknetLayer):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Reorganization(DarknetLayer):
    """[reorg3d] is space to depth; [reorg] is too, but reads its input as if that were the larger, shallower image."""

    def __init__(self, layer: cfg.Reorg, source: Shape, output: Shape) -> None:
        super().__init__()
        s = self.stride = layer.stride
        self.reverse, self.output = layer.reverse, output
        if layer.kind == "reorg":
            self.view = source if layer.reverse else Shape(source.channels // s**2, source.height * s, source.width * s)
        else:
            self.view = output if layer.reverse else source

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        s, (c, h, w) = self.stride, (self.view.channels, self.view.height, self.view.width)
        if self.reverse:
            moved = x.reshape(-1, s, s, c // s**2, h, w).permute(0, 3, 4, 1, 5, 2)
        else:
            moved = x.reshape(-1, c, h // s, s, w // s, s).permute(0, 3, 5, 1, 2, 4)
        return moved.reshape(-1, self.output.channels, self.output.height, self.output.width)


class YoloHead(DarknetLayer):
    """Decodes one head, as darknet's yolo_layer.c, region_layer.c and gaussian_yolo_layer.c do (``get_yolo_box`` and so on).

    From the raw tensor ``(N, A * (5 + classes), H, W)``, 9 + classes for a [Gaussian_yolo], to
    ``(N, A * H * W, 4 + classes)``: x1 y1 x2 y2 in pixels of the network input, then objectness times class, and times
    certainty; anchor-major, then rows, then columns.
    """

    anchors: Tensor
    corner: Tensor
    cell: Tensor

    def __init__(self, layer: cfg.Yolo, source: Shape, network: cfg.Network) -> None:
        super().__init__()
        self.record, self.source = layer, source
        sizes = torch.tensor(network.anchors(layer))
        self.register_buffer("anchors", sizes.reshape(-1, 2, 1), persistent=False)
        rows, columns = torch.meshgrid(torch.arange(source.height), torch.arange(source.width), indexing="ij")
        grid = torch.stack([columns.reshape(-1), rows.reshape(-1)])
        # the offset that scale_x_y needs is part of the cell's corner, so that decoding adds once
        self.register_buffer("corner", grid - (layer.scale_x_y - 1) / 2, persistent=False)
        cell = torch.tensor([[network.width / source.width], [network.height / source.height]])
        self.register_buffer("cell", cell, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        fields, count = self.record.anchor_channels, len(self.record.mask)
        raw = x.reshape(-1, count, fields, self.source.height * self.source.width)
        uncertain = self.record.head_kind == "Gaussian_yolo"
        if uncertain:
            uncertainty = torch.sigmoid(raw[:, :, 1:8:2]).mean(2, keepdim=True)
            raw = torch.cat([raw[:, :, 0:8:2], raw[:, :, 8:]], 2)
        if self.record.new_coords:
            active, sizes = raw, (2 * raw[:, :, 2:4]).square() * self.anchors
        else:
            active, sizes = torch.sigmoid(raw), torch.exp(raw[:, :, 2:4]) * self.anchors
        centres = (active[:, :, 0:2] * self.record.scale_x_y + self.corner) * self.cell
        classes = torch.softmax(raw[:, :, 5:], 2) if self.record.head_kind == "region" else active[:, :, 5:]
        scores = active[:, :, 4:5] * classes
        if uncertain:
            scores = scores * (1 - uncertainty)
        decoded = torch.cat([centres - sizes / 2, centres + sizes / 2, scores], 2)
        boxes = count * self.source.height * self.source.width
        return decoded.transpose(2, 3).reshape(-1, boxes, 4 + self.record.classes)


@singledispatch
def build(layer: Layer, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    """The module of one record; ``inputs`` and ``output`` are its shapes."""
    raise TypeError(f"no module for {type(layer).__name__}")


@build.register
def _(layer: cfg.Convolutional, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    kind = BinaryConvolution if layer.binary_inputs else Convolution
    return kind(layer, inputs[0].channels)


@build.register
def _(layer: cfg.BatchNorm, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return BatchNormalization(inputs[0].channels)


@build.register
def _(layer: cfg.Activation, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Activating(layer)


@build.register
def _(layer: cfg.ChannelPool, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return ChannelPooling(layer, inputs[0])


@build.register
def _(layer: cfg.Pool, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Pooling(layer, inputs[0])


@build.register
def _(layer: cfg.GlobalAverage, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return GlobalAveragePool()


@build.register
def _(layer: cfg.Upsample, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Upsampling(layer)


@build.register
def _(layer: cfg.Route, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Routing(layer, inputs)


@build.register
def _(layer: cfg.Shortcut, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Residual(layer, inputs)


@build.register(cfg.Sam)
@build.register(cfg.ScaleChannels)
def _(layer: cfg.Sam | cfg.ScaleChannels, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Product(layer.activation)


@build.register
def _(layer: cfg.Implicit, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Constant(layer)


@build.register(cfg.Dropout)
@build.register(cfg.Unread)
def _(layer: cfg.Dropout | cfg.Unread, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Identity()


@build.register
def _(layer: cfg.Reorg, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return Reorganization(layer, inputs[0], output)


@build.register
def _(layer: cfg.Yolo, inputs: Sequence[Shape], output: Shape, network: cfg.Network) -> DarknetLayer:
    return YoloHead(layer, inputs[0], network)
