"""Darknet ``.weights`` files: reading them exactly, writing them, and making random ones.

A file is a header (major, minor, revision: int32; images seen: uint64 from version 0.2 on, else uint32) and then nothing
but little-endian float32, layer by layer in cfg order (``load_weights_upto`` in darknet's parser.c).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from darktrt.convert.cfg import Layer, Network
from darktrt.convert.shapes import weight_arrays
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, open_input

LayerWeights = Mapping[str, npt.NDArray[np.float32]]
"""Arrays of one layer by role: ``weight`` and ``bias``, with batch normalisation also ``scale``, ``mean``, ``variance``."""


def read_weights(path: str | Path, network: Network) -> list[LayerWeights]:
    """One mapping per layer (empty where a layer has no weights); the arrays are views of the mapped file.

    Raises:
        DarktrtError: the file cannot be read, is no weights file, or holds fewer or more floats than ``network`` needs.
    """
    reader = WeightReader(path)
    shapes = network.shapes
    weights: list[LayerWeights] = []
    for layer in network.layers:
        arrays = weight_arrays(network, shapes, layer)
        weights.append({a.role: reader.read(a.shape, network, layer, a.role) for a in arrays})
    reader.finish(network)
    return weights


class WeightReader:
    """Hands out a weights file's floats in order and insists that they come out even."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with open_input(path) as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(256)
        offset = self._header(start, size)
        if (size - offset) % 4:
            raise DarktrtError(
                f"{path}: is truncated: {(size - offset) % 4} bytes follow the last whole float; download it again"
            )
        count = (size - offset) // 4
        self._floats = np.memmap(path, "<f4", "r", offset, (count,)) if count else np.zeros(0, np.float32)
        self._next = 0

    @property
    def left(self) -> int:
        """How many floats have not been read."""
        return len(self._floats) - self._next

    def read(self, shape: tuple[int, ...], network: Network, layer: Layer, role: str) -> npt.NDArray[np.float32]:
        """The next array. Errors name ``network``, ``layer`` and ``role``."""
        count = prod(shape)
        if (left := self.left) < count:
            raise DarktrtError(
                f"{self.path}: ends inside layer {layer.index} [{layer.kind}] ({network.path}:{layer.line}): its {role} needs "
                f"{count} floats, {left} are left; is this the right cfg, or is the file truncated?"
            )
        values = self._floats[self._next : self._next + count].reshape(shape)
        if not np.isfinite(values).all():
            raise DarktrtError(
                f"{self.path}: the {role} of layer {layer.index} [{layer.kind}] ({network.path}:{layer.line}) is not finite; "
                "is this the right cfg, or did training diverge?"
            )
        self._next += count
        return values

    def finish(self, network: Network) -> None:
        """Raise when floats are left over."""
        if left := self.left:
            raise DarktrtError(
                f"{self.path}: {left} floats left after the last layer of {network.path}; is this the right cfg?"
            )

    def _header(self, start: bytes, size: int) -> int:
        """Length of the header in bytes; what is no weights file is named as what it is."""
        if size == 0:
            raise DarktrtError(f"{self.path}: is empty; download it again")
        if start.startswith(b"version https://git-lfs"):
            raise DarktrtError(
                f"{self.path}: is a Git LFS pointer, not the weights; run 'git lfs pull', or download the file itself"
            )
        if start.lstrip()[:1] == b"<":
            raise DarktrtError(f"{self.path}: is an HTML page, not weights; the download got a web page instead of the file")
        if b"[net]" in start or b"[convolutional]" in start:
            raise DarktrtError(f"{self.path}: is a cfg, not weights; are cfg and weights swapped?")
        major, minor, _ = struct.unpack_from("<3i", start.ljust(12, b"\0"))
        length = 20 if major * 10 + minor >= 2 else 16
        if size < length:
            raise DarktrtError(f"{self.path}: is truncated: {size} bytes are less than a header; download it again")
        if not (0 <= major < 1000 and 0 <= minor < 1000):
            raise DarktrtError(f"{self.path}: has version {major}.{minor}, which no darknet wrote; is this a .weights file?")
        return length


def write_weights(path: str | Path, network: Network, weights: Sequence[LayerWeights]) -> None:
    """Write a version 0.2.5 file that darknet and :func:`read_weights` load; nothing half-written stays.

    Raises:
        DarktrtError: the file cannot be written.
    """
    with atomic_output(path) as temporary:
        dump_weights(temporary, network, weights)


def dump_weights(path: Path, network: Network, weights: Sequence[LayerWeights]) -> None:
    """What :func:`write_weights` writes, to a path that may be left half-written."""
    shapes = network.shapes
    with open(path, "wb") as file:
        file.write(struct.pack("<3iQ", 0, 2, 5, 0))
        for layer, values in zip(network.layers, weights, strict=True):
            for array in weight_arrays(network, shapes, layer):
                file.write(np.ascontiguousarray(values[array.role], "<f4").tobytes())


def fold(weights: LayerWeights) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Weight and bias of a convolution with its batch normalisation folded in.

    As darknet's ``fuse_conv_batchnorm`` (network.c): in double, epsilon 1e-5 inside the root.
    """
    if "scale" not in weights:
        return np.array(weights["weight"]), np.array(weights["bias"])
    with np.errstate(all="ignore"):  # what is not finite is refused with the layer's name
        factor = weights["scale"] / np.sqrt(weights["variance"].astype(np.float64) + 0.00001)
        bias = weights["bias"] - factor * weights["mean"]
        folded = (weights["weight"] * factor[:, None, None, None]).astype(np.float32)
        return folded, bias.astype(np.float32)


def binarize(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Signs ``(O, I, kh, kw)``, 1 above 0 and else -1, and mean magnitudes ``(O,)`` of a convolution's weights.

    The mean is summed as darknet's ``binarize_weights`` sums it, one weight after another in float32: the signs of a later
    layer turn on the last bits.
    """
    magnitudes = np.abs(weight.reshape(len(weight), -1))
    sums = np.cumsum(magnitudes, axis=1, dtype=np.float32)[:, -1]
    return np.where(weight > 0, np.float32(1), np.float32(-1)), sums / np.float32(magnitudes.shape[1])


def parameter_count(network: Network) -> int:
    """Number of floats in the network's weights file."""
    shapes = network.shapes
    return sum(prod(array.shape) for layer in network.layers for array in weight_arrays(network, shapes, layer))


def initial_weights(network: Network, seed: int) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    """Random weights of every layer in order, unit gain per input and before any fit to the activations.

    Scales below 1 beside biases of some size keep a hundred layers from blowing up differences, rounding errors included.

    :func:`darktrt.convert.model.random_weights` sets the batch normalisation to what it measures, so that activations
    neither die nor explode at any depth.
    """
    random = np.random.default_rng(seed)
    shapes = network.shapes
    for layer in network.layers:
        arrays = {a.role: a.shape for a in weight_arrays(network, shapes, layer)}
        values: dict[str, npt.NDArray[np.float32]] = {}
        for role, shape in arrays.items():
            if role == "weight" and len(shape) == 4:
                values[role] = random.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)
            elif role in ("weight", "scale"):
                values[role] = random.uniform(0.4, 0.8, shape).astype(np.float32)
            elif role == "bias":
                values[role] = random.normal(0, 0.4, shape).astype(np.float32)
            elif role == "mean":
                values[role] = random.normal(0, 0.1, shape).astype(np.float32)
            else:
                values[role] = np.ones(shape, np.float32)
        yield values
