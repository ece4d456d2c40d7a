"""The whole network as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from darktrt.convert.cfg import Layer, Network, Yolo, read_cfg
from darktrt.convert.layers import BatchNormalization, Convolution, DarknetLayer, build
from darktrt.convert.shapes import check_memory, input_shapes
from darktrt.convert.weights import LayerWeights, initial_weights, read_weights
from darktrt.errors import DarktrtError


class Darknet(nn.Module):
    """A darknet detector for inference.

    Called with images ``(N, C, H, W)`` float32, RGB 0..1, of the network's size, it outputs ``boxes (N, A, 4)``, x1 y1 x2 y2 in
    pixels of the network input, and ``scores (N, A, classes)``, objectness times class. The A boxes are those of all heads in
    cfg order; in a head anchor-major, then rows, then columns.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.heads = [layer.index for layer in network.layers if isinstance(layer, Yolo)]
        self.shapes = network.shapes
        classes = {layer.classes for layer in network.layers if isinstance(layer, Yolo)}
        if len(classes) != 1:
            raise network.error(network.layers[-1], f"heads have different class counts {sorted(classes)}; they must agree")
        pairs = zip(network.layers, self.shapes, strict=True)
        modules = [build(layer, input_shapes(network, self.shapes, layer), shape, network) for layer, shape in pairs]
        self.layers = nn.ModuleList(modules)
        self._last_reader = {source: layer.index for layer in network.layers for source in layer.sources}

    def load(self, weights: list[LayerWeights]) -> None:
        """Load the weights of every layer from the arrays of :func:`darktrt.convert.weights.read_weights`."""
        for layer, module in zip(self.network.layers, self.layers, strict=True):
            assert isinstance(module, DarknetLayer)
            module.load(weights[self.network.owner(layer).index])
            if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
                raise self.network.error(layer, "gets weights that are not finite when folded; is this the right weights file?")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores; see the class."""
        return self.join(self.run(images, keep=set(self.heads)))

    def join(self, outputs: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes and scores of all heads, from what :meth:`run` gave for the layers ``heads``."""
        decoded = [outputs[i] for i in self.heads]
        whole = torch.cat(decoded, 1) if len(decoded) > 1 else decoded[0]
        return whole[..., :4], whole[..., 4:]

    def run(
        self,
        images: Tensor,
        keep: set[int],
        before: Callable[[Layer, list[Tensor]], None] | None = None,
        after: Callable[[dict[int, Tensor], set[int]], None] | None = None,
    ) -> dict[int, Tensor]:
        """Outputs of the layers ``keep`` by index; others are freed once read.

        Args:
            before: is called with each layer and its inputs.
            after: is called behind each layer with the outputs so far, and the layers among them that no later one reads.
        """
        outputs = {-1: images}
        for layer, module in zip(self.network.layers, self.layers, strict=True):
            inputs = [outputs[source] for source in layer.sources]
            if before:
                before(layer, inputs)
            outputs[layer.index] = module(*inputs)
            read = {i for i in outputs if self._last_reader.get(i, i) <= layer.index}
            if after:
                after(outputs, read)
            for index in read - keep:
                outputs.pop(index, None)
        return outputs


def load_darknet(cfg: str | Path, weights: str | Path, size: tuple[int, int] | None = None) -> Darknet:
    """The module of a cfg with the weights of a file, in evaluation mode; ``size`` (width, height) overrides the cfg's.

    Raises:
        DarktrtError: either file cannot be read, or they do not belong together.
    """
    network = read_cfg(cfg)
    network = network.resized(*size) if size else network
    model = Darknet(network)
    model.load(read_weights(weights, network))
    return model.eval()


def random_weights(network: Network, seed: int) -> list[LayerWeights]:
    """Sane random weights for any network: the same for the same seed, and activations neither die nor explode.

    Each layer is fitted in turn to eight images of noise: the variance of a convolution's batch normalisation, or the weights
    where there is none, make the mean square of each filter's output 1. Objectness is then lowered so that few boxes pass, as
    in a trained network.

    Raises:
        DarktrtError: the eight images need more memory than :mod:`darktrt.memory` allows.
    """
    network = _shrunk(network)
    check_memory(network, network.shapes, images=8)
    model = Darknet(network).eval()
    drawn = initial_weights(network, seed)
    heads = {layer.sources[0]: layer for layer in network.layers if isinstance(layer, Yolo)}
    fitted: list[LayerWeights] = []

    def fit(layer: Layer, inputs: list[Tensor]) -> None:
        values = next(drawn)
        module = model.layers[layer.index]
        if isinstance(module, Convolution) and values:
            _fit_convolution(module, values, inputs[0])
            if head := heads.get(layer.index):
                values["bias"][head.box_channels :: head.anchor_channels] -= _OBJECTNESS_DROP
        elif isinstance(module, BatchNormalization):
            _fit_variance(values, inputs[0])
        fitted.append(values)
        assert isinstance(module, DarknetLayer)
        module.load(fitted[network.owner(layer).index])

    with torch.inference_mode():
        model.run(_noise(network, seed), set(), fit)
    return fitted


_OBJECTNESS_DROP = 3.0
"""In logits: of objectness with variance 1 about one in fifty passes 0.25."""


def _shrunk(network: Network) -> Network:
    """The network for small inputs, if its layers fit that size; weights do not depend on it.

    They have four cells of the coarsest head, and 64 pixels at least: on fewer, padding would be most of what layers see.
    """
    shapes = network.shapes
    columns = min(shapes[layer.index].width for layer in network.layers if isinstance(layer, Yolo))
    stride = max(1, network.width // columns)
    side = stride * max(4, 64 // stride)
    smaller = network.resized(min(network.width, side), min(network.height, side))
    try:
        _ = smaller.shapes
    except DarktrtError:
        return network
    return smaller


def _noise(network: Network, seed: int) -> Tensor:
    """Eight images ``(8, C, H, W)`` in 0..1: four of noise of every scale, as in photographs, and four of white noise."""
    generator = torch.Generator().manual_seed(seed)
    size, images = (network.height, network.width), torch.zeros(8, network.channels, network.height, network.width)
    for cells in (1, 2, 4, 8, 16, 64, 256):
        grid = torch.randn(8, network.channels, *(min(cells, side) for side in size), generator=generator)
        strength = 2 * torch.rand(8, 1, 1, 1, generator=generator)
        images += strength * functional.interpolate(grid, size=size, mode="bilinear")
    images = torch.sigmoid(2 * torch.rand(8, 1, 1, 1, generator=generator) * images)
    return torch.cat([images[:4], torch.rand(images[4:].shape, generator=generator)])


def _fit_convolution(module: Convolution, values: dict[str, npt.NDArray[np.float32]], x: Tensor) -> None:
    """Set the variance (or rescale weight and bias) of ``values`` to the mean square of the plain convolution on ``x``.

    The mean stays near 0: subtracting it in every layer would leave only the differences between images and amplify them,
    rounding errors included, from layer to layer.
    """
    module.load({"weight": values["weight"], "bias": 0 * values["bias"]})
    plain = module.convolve(x)
    if "scale" in values:
        _fit_variance(values, plain)
    else:
        values["weight"] /= np.sqrt(_mean_square(plain))[:, None, None, None]


def _fit_variance(values: dict[str, npt.NDArray[np.float32]], x: Tensor) -> None:
    """Set the variance of a batch normalisation to the mean square of what it reads."""
    values["variance"] = _mean_square(x)
    values["mean"] *= np.sqrt(values["variance"])


def _mean_square(x: Tensor) -> npt.NDArray[np.float32]:
    """Of each channel."""
    square = x.square().mean((0, 2, 3)).numpy()
    # a filter that hardly answers to these images may answer to others: trust no mean square far below its neighbours'
    trusted: npt.NDArray[np.float32] = np.maximum(square, 0.5 * square.mean() + 1e-6, dtype=np.float32)
    return trusted
