"""The second pass of a calibration: the channel means of every input tensor of a convolution, before and after INT8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from darktrt.calib.bias_correction import ChannelMeans, ChannelSums, channel_sums
from darktrt.calib.graph import convolution_inputs
from darktrt.calib.trunk import OpenTrunk, Trunk, read_input, trunk_of
from darktrt.errors import DarktrtError
from darktrt.onnx_file import load_model
from darktrt.parallel import Threads, Worker, Workers, in_groups
from darktrt.progress import progress


@dataclass(frozen=True)
class Range:
    """How a tensor is quantized, and what its values are measured in."""

    scale: np.float32
    exponent: int
    """Of its histogram: all values are below ``2 ** exponent``."""


@dataclass(frozen=True, eq=False)
class MeasuredMeans:
    """The sums that channel means follow from, and the images that they were measured on."""

    images: frozenset[str] = frozenset()
    """By their SHA-256."""
    sums: Mapping[str, ChannelSums] = field(default_factory=dict)
    """By tensor."""

    def __add__(self, other: MeasuredMeans) -> MeasuredMeans:
        """Those of both, which have no image in common."""
        if not self.images or not other.images:
            return self if self.images else other
        sums = {name: one + other.sums[name] for name, one in self.sums.items()}
        return MeasuredMeans(self.images | other.images, sums)

    def channel_means(self, ranges: Mapping[str, Range]) -> dict[str, ChannelMeans]:
        """By tensor; none where there are no images."""
        number = len(self.images)
        return {name: one.channel_means(number, ranges[name].scale, ranges[name].exponent) for name, one in self.sums.items()}


def measure_channel_means(
    model_path: str | Path, images: Sequence[Path], ranges: Mapping[str, Range], workers: Workers | None = None
) -> MeasuredMeans:
    """Measure the channel means over images, all of which are different.

    Images that cannot be read are left out; the first pass has reported them.

    Args:
        ranges: of the network's tensors; those of other tensors are left out.
        workers: who measures; by default the threads of this process.

    Raises:
        DarktrtError: the model is not one of darktrt.
    """
    model, info = load_model(model_path)
    tensors = [name for name in convolution_inputs(model, info) if name in ranges]
    meter = _Meter(trunk_of(model_path, model, info, tensors), {name: ranges[name] for name in tensors})
    measured = MeasuredMeans()
    one_by_one = in_groups(images, 1)  # results are small
    with (
        progress(len(images), "images") as bar,
        closing((workers or Threads()).results(meter, one_by_one, bytes_each=meter.trunk.bytes_each)) as results,
    ):
        for done in results:
            measured += done.result
            bar.update(len(done.group), done.node)
    return measured


@dataclass(frozen=True)
class _Meter:
    """Makes a worker that measures."""

    trunk: Trunk
    ranges: Mapping[str, Range]

    def __call__(self) -> Worker[Path, MeasuredMeans]:
        opened = self.trunk.open()
        return lambda group: self._measure(opened, group)

    def _measure(self, network: OpenTrunk, group: Sequence[Path]) -> MeasuredMeans:
        measured = MeasuredMeans()
        for path in group:
            try:
                digest, image = read_input(path, self.trunk.info)
            except DarktrtError:
                continue
            values = network.run(image)[0]
            sums = {name: channel_sums(values[name][0], one.scale, one.exponent) for name, one in self.ranges.items()}
            measured += MeasuredMeans(frozenset([digest]), sums)
        return measured
