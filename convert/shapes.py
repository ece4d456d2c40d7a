"""Shapes and costs of a parsed network, without torch: the output of every layer, checked as darknet would need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import pairwise
from math import prod

from darktrt.convert.cfg import (
    BatchNorm,
    ChannelPool,
    Convolutional,
    GlobalAverage,
    Implicit,
    Layer,
    Network,
    Pool,
    Reorg,
    Route,
    Sam,
    ScaleChannels,
    Shortcut,
    Unread,
    Upsample,
    Yolo,
)
from darktrt.errors import DarktrtError, quote
from darktrt.memory import MOST_NETWORK_BYTES, MOST_OPERATIONS, gibibytes, most_at_once, network_bytes


@dataclass(frozen=True)
class Shape:
    """Of one image: channels, rows, columns."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.channels} x {self.height} x {self.width}"

    @property
    def numbers(self) -> int:
        return self.channels * self.height * self.width

    @property
    def spatial(self) -> tuple[int, int]:
        return self.height, self.width


LARGEST = 2**29
"""Numbers in one tensor: 2 GiB, the most that an ONNX file can hold; it stops sizes that are misprints."""


def infer_shapes(network: Network) -> tuple[Shape, ...]:
    """Output shape of every layer.

    Raises:
        DarktrtError: a layer's inputs do not fit; the message names the line of its section. Or the network needs more memory
            or work than :mod:`darktrt.memory` allows.
    """
    shapes: list[Shape] = []
    if network.channels * network.height * network.width > LARGEST:
        size = f"{network.channels} x {network.height} x {network.width}"
        raise DarktrtError(f"{network.path}: an input of {size} is more than 2 GiB; is a number in [net] mistyped?")
    for layer in network.layers:
        _check_sources(network, layer)
        try:
            shape = output_shape(layer, input_shapes(network, shapes, layer))
        except _MisfitError as error:
            raise network.error(layer, str(error)) from None
        if min(shape.channels, shape.height, shape.width) < 1:
            raise network.error(layer, f"would output {shape}; is the size {network.width}x{network.height} too small?")
        if shape.channels * shape.height * shape.width > LARGEST:
            raise network.error(layer, f"would output {shape}, more than 2 GiB for one image; is a number here mistyped?")
        shapes.append(shape)
        _check_shared(network, shapes, layer)
    check_memory(network, shapes)
    if (total := sum(operations(network, shapes))) > MOST_OPERATIONS:
        raise DarktrtError(
            f"{network.path}: one image of {network.width}x{network.height} would take {total / 1e9:,.0f} billion operations, "
            f"more than {MOST_OPERATIONS / 1e9:,.0f}; convert it for smaller images"
        )
    return tuple(shapes)


def _check_sources(network: Network, layer: Layer) -> None:
    for i, source in enumerate(layer.sources):
        read = network.layers[source] if source >= 0 else None
        if isinstance(read, (Yolo, Unread)):
            what = " head" if isinstance(read, Yolo) else ", whose output is no image in darknet"
            fault = f"reads layer {source}, a [{read.kind}]{what}"
            raise network.error(layer, f"{fault}; put a [route] to an earlier layer before it")
        if isinstance(read, Implicit) and not (isinstance(layer, ScaleChannels) and i == 0):
            raise network.error(layer, f"reads layer {source}, an [implicit], which only a [scale_channels] behind it may read")


def _check_shared(network: Network, shapes: Sequence[Shape], layer: Layer) -> None:
    if not isinstance(layer, Convolutional) or layer.shares is None:
        return
    other = network.layers[layer.shares]
    if not isinstance(other, Convolutional):
        raise network.error(layer, f"shares the weights of layer {other.index}, a [{other.kind}]; they must be a convolution's")
    own, owned = (
        f"{each.filters} filters of {input_shapes(network, shapes, each)[0].channels} channels, size {each.size}, "
        f"groups {each.groups}"
        for each in (layer, other)
    )
    if own != owned:
        fault = f"has {own}, but layer {other.index}, whose weights it shares, has {owned}"
        raise network.error(layer, f"{fault}; darknet does not run that either")


def check_memory(network: Network, shapes: Sequence[Shape], images: int = 1) -> None:
    """See that a network that runs on so many images at a time stays within the memory that darktrt may use.

    Raises:
        DarktrtError: it does not.
    """
    owners = [network.owner(layer) for layer in network.layers]  # each has a copy of the weights
    weights = sum(4 * prod(array.shape) for owner in owners for array in weight_arrays(network, shapes, owner))
    steps = [
        ({layer.index: 4 * shape.numbers, **_working_bytes(network, shapes, layer)}, layer.sources)
        for layer, shape in zip(network.layers, shapes, strict=True)
    ]
    needed = network_bytes(weights, images * most_at_once(steps))
    if needed > MOST_NETWORK_BYTES:
        what = f"{'an image' if images == 1 else f'{images} images'} of {network.width}x{network.height}"
        raise DarktrtError(
            f"{network.path}: would take {gibibytes(needed)} of memory for {what}, more than {gibibytes(MOST_NETWORK_BYTES)}; "
            "convert it for smaller images, or is a number mistyped?"
        )


def _working_bytes(network: Network, shapes: Sequence[Shape], layer: Layer) -> dict[int, int]:
    """The tensor between a layer and its blur, under a number that is no layer's."""
    if not isinstance(layer, (Convolutional, Pool)) or not layer.blur:
        return {}
    return {-2 - layer.index: 4 * unblurred(layer, input_shapes(network, shapes, layer)[0]).numbers}


def input_shapes(network: Network, shapes: Sequence[Shape], layer: Layer) -> list[Shape]:
    """Shapes of what ``layer`` reads, given those of the layers before it."""
    image = Shape(network.channels, network.height, network.width)
    return [shapes[source] if source >= 0 else image for source in layer.sources]


def same_size(shapes: Sequence[Shape]) -> bool:
    return all(a.spatial == b.spatial for a, b in pairwise(shapes))


class _MisfitError(Exception):
    """What is wrong with a layer's inputs, before file and line are known."""


@singledispatch
def output_shape(layer: Layer, inputs: Sequence[Shape]) -> Shape:
    """Shape of ``layer``'s output; layers without a rule of their own pass their input on."""
    return inputs[0]


@output_shape.register
def _(layer: Convolutional, inputs: Sequence[Shape]) -> Shape:
    source = inputs[0]
    if source.channels % layer.groups or layer.filters % layer.groups:
        raise _MisfitError(
            f"'groups={layer.groups}' divides not both its {source.channels} input channels and {layer.filters} filters"
        )
    if layer.filters * source.channels // layer.groups * layer.size**2 > LARGEST:
        raise _MisfitError(f"with {layer.filters} filters of size {layer.size} has 2 GiB of weights; is a number mistyped?")
    return _blurred(unblurred(layer, source), layer)


@output_shape.register
def _(layer: Pool, inputs: Sequence[Shape]) -> Shape:
    height, width = inputs[0].spatial
    if inputs[0].channels * (height + layer.padding) * (width + layer.padding) > LARGEST:
        raise _MisfitError(f"of size {layer.size} pads {inputs[0]} to more than 2 GiB; is a number mistyped?")
    return _blurred(unblurred(layer, inputs[0]), layer)


def unblurred(layer: Convolutional | Pool, source: Shape) -> Shape:
    """The output before the blur, which has the strides if there is one.

    Padding is that of both sides: of a convolution a multiple of the dilation.
    """
    strides = (1, 1) if layer.blur else (layer.stride_y, layer.stride_x)
    padding, window, channels = layer.padding, layer.size, source.channels
    if isinstance(layer, Convolutional):
        padding, channels = 2 * layer.padding * layer.dilation, layer.filters
        window = layer.dilation * (layer.size - 1) + 1
    rows, columns = ((size + padding - window) // stride + 1 for size, stride in zip(source.spatial, strides, strict=True))
    return Shape(channels, rows, columns)


def _blurred(shape: Shape, layer: Convolutional | Pool) -> Shape:
    if not layer.blur:
        return shape
    if shape.numbers > LARGEST:
        raise _MisfitError(f"would blur {shape}, more than 2 GiB for one image; is a number here mistyped?")
    padding = 2 if layer.blur == 3 else 0
    rows, columns = (
        (size + padding - layer.blur) // stride + 1
        for size, stride in zip(shape.spatial, (layer.stride_y, layer.stride_x), strict=True)
    )
    return Shape(shape.channels, rows, columns)


@output_shape.register
def _(layer: ChannelPool, inputs: Sequence[Shape]) -> Shape:
    if layer.out_channels > inputs[0].channels:
        raise _MisfitError(f"pools {inputs[0].channels} channels to 'out_channels={layer.out_channels}'")
    return Shape(layer.out_channels, *inputs[0].spatial)


@output_shape.register
def _(layer: GlobalAverage, inputs: Sequence[Shape]) -> Shape:
    return Shape(inputs[0].channels, 1, 1)


@output_shape.register
def _(layer: Upsample, inputs: Sequence[Shape]) -> Shape:
    source, stride = inputs[0], layer.stride
    if layer.reverse and (source.height % stride or source.width % stride):
        raise _MisfitError(f"with 'stride={-stride}' needs rows and columns that {stride} divides, not {source}")
    if layer.reverse:
        return Shape(source.channels, source.height // stride, source.width // stride)
    return Shape(source.channels, source.height * stride, source.width * stride)


def _sizes(layer: Layer, inputs: Sequence[Shape]) -> str:
    return quote(", ".join(f"layer {s}: {i.width}x{i.height}" for s, i in zip(layer.sources, inputs, strict=True)))


@output_shape.register
def _(layer: Route, inputs: Sequence[Shape]) -> Shape:
    if not same_size(inputs):
        sizes = _sizes(layer, inputs)
        raise _MisfitError(
            f"joins layers of different sizes ({sizes}); is the network's size a multiple of its largest stride?"
        )
    if odd := [i.channels for i in inputs if i.channels % layer.groups]:
        raise _MisfitError(f"cannot cut {odd[0]} channels into 'groups={layer.groups}'")
    return Shape(sum(i.channels // layer.groups for i in inputs), *inputs[0].spatial)


@output_shape.register
def _(layer: Shortcut, inputs: Sequence[Shape]) -> Shape:
    plain = len(inputs) == 2 and layer.weights_type == "none"
    if not (same_size(inputs) or (plain and (step := step_of(inputs[1], inputs[0])) and step > 1)):
        sizes = _sizes(layer, inputs)
        raise _MisfitError(f"adds layers of different sizes ({sizes}); is the network's size a multiple of its largest stride?")
    return inputs[0]


def step_of(source: Shape, output: Shape) -> int:
    """Of a [shortcut], the step between the positions of ``source`` that it adds; 0 where the sizes do not fit.

    Steps above 1 are of older darknets and of pjreddie's (``shortcut_cpu`` in blas.c); today's stops at them.
    """
    step = source.height // output.height
    return step if source.spatial == (step * output.height, step * output.width) else 0


@output_shape.register
def _(layer: Sam, inputs: Sequence[Shape]) -> Shape:
    if inputs[0] != inputs[1]:
        raise _MisfitError(f"multiplies {inputs[0]} by {inputs[1]}; both must have one shape")
    return inputs[0]


@output_shape.register
def _(layer: ScaleChannels, inputs: Sequence[Shape]) -> Shape:
    factors, source = inputs
    wanted = Shape(1, *source.spatial) if layer.scale_wh else Shape(source.channels, 1, 1)
    if factors != wanted:
        raise _MisfitError(f"scales {source} by {factors}; it needs factors of {wanted}")
    return source


@output_shape.register
def _(layer: Implicit, inputs: Sequence[Shape]) -> Shape:
    return Shape(layer.filters, layer.atoms, 1)


@output_shape.register
def _(layer: Reorg, inputs: Sequence[Shape]) -> Shape:
    source, stride = inputs[0], layer.stride
    if source.channels % stride**2 and (layer.reverse or layer.kind == "reorg"):
        raise _MisfitError(f"needs channels that {stride**2} divides, not {source.channels}")
    if not layer.reverse and (source.height % stride or source.width % stride):
        raise _MisfitError(f"needs rows and columns that {stride} divides, not {source}")
    if layer.reverse:
        return Shape(source.channels // stride**2, source.height * stride, source.width * stride)
    return Shape(source.channels * stride**2, source.height // stride, source.width // stride)


@output_shape.register
def _(layer: Yolo, inputs: Sequence[Shape]) -> Shape:
    wanted, own = len(layer.mask) * layer.anchor_channels, layer.anchor_channels - layer.classes
    if inputs[0].channels != wanted:
        anchors = "num" if layer.head_kind == "region" else "mask"
        raise _MisfitError(
            f"reads {inputs[0].channels} channels, but {len(layer.mask)} anchors x ({own} + {layer.classes} classes) need "
            f"{wanted}; set 'filters' of the [convolutional] before it, or 'classes' and '{anchors}' here"
        )
    return inputs[0]


@dataclass(frozen=True)
class Array:
    """One array of a weights file: its role in the layer and its shape, in file order."""

    role: str
    shape: tuple[int, ...]


_NORMALIZATION = ("bias", "scale", "mean", "variance")


def weight_arrays(network: Network, shapes: Sequence[Shape], layer: Layer) -> tuple[Array, ...]:
    """The arrays that a ``.weights`` file holds for ``layer``, in file order (``load_convolutional_weights`` in parser.c)."""
    sources = input_shapes(network, shapes, layer)
    if network.owner(layer) is not layer:
        return ()
    if isinstance(layer, BatchNorm):
        return tuple(Array(role, (sources[0].channels,)) for role in _NORMALIZATION)
    if isinstance(layer, Convolutional):
        kernel = Array("weight", (layer.filters, sources[0].channels // layer.groups, layer.size, layer.size))
        roles = _NORMALIZATION if layer.batch_normalize else ("bias",)
        return (*(Array(role, (layer.filters,)) for role in roles), kernel)
    if isinstance(layer, Implicit):
        return (Array("weight", (layer.filters, layer.atoms)),)
    if isinstance(layer, Shortcut) and layer.weights_type != "none":
        per_channel = sources[0].channels if layer.weights_type == "per_channel" else 1
        return (Array("weight", (len(layer.sources), per_channel)),)
    return ()


def operations(network: Network, shapes: Sequence[Shape]) -> Iterator[int]:
    """Of every layer for one image: 2 per multiply-add of a convolution, 1 per number that a pool reads, 1 per output else."""
    for layer, shape in zip(network.layers, shapes, strict=True):
        if isinstance(layer, (Convolutional, Pool)):
            source = input_shapes(network, shapes, layer)[0]
            each = 2 * source.channels // layer.groups if isinstance(layer, Convolutional) else 1
            yield each * layer.size**2 * unblurred(layer, source).numbers
        else:
            yield shape.numbers


def gflops(network: Network) -> float:
    """Billions of floating point operations for one image, counted as darknet's BFLOPs: those of its convolutions alone."""
    pairs = zip(network.layers, operations(network, network.shapes), strict=True)
    return sum(count for layer, count in pairs if isinstance(layer, Convolutional)) / 1e9
