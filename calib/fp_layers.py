"""The convolutions that INT8 leaves in floating point: those with much noise for few operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_RATIO = 3.0
"""The least ratio between the share of the noise and the share of the operations of a layer in floating point. The noise is
that which is left: where one layer makes nine tenths of it, the ratios of all others would be small against the whole."""
MOST_OPERATIONS = 0.1
"""The largest share of the operations that is left in floating point for their noise."""


@dataclass(frozen=True)
class Cost:
    """Noise and operations of convolutions that are quantized together or not at all."""

    nodes: tuple[str, ...]
    noise: float
    """The change of scores and boxes by quantizing only these nodes: the mean of their shares in the sums over all costs."""
    operations: float
    """Their share of the network's multiplications."""

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError("a cost has no nodes")
        if not (0 <= self.noise <= 1 and 0 <= self.operations <= 1):
            raise ValueError(f"{self.noise!r:.20} or {self.operations!r:.20} is no share")


@dataclass(frozen=True)
class FpLayers:
    """The convolutions that stay in floating point, and the costs that they were chosen by."""

    always: tuple[str, ...]
    """The first convolution and those of the heads."""
    costs: tuple[Cost, ...]
    """Of all others, in graph order."""

    @property
    def chosen(self) -> tuple[Cost, ...]:
        """The costs with the highest ratios of noise to operations.

        One is chosen as long as its share of the noise that the ones before it have left is at least :data:`LEAST_RATIO` times
        its share of all operations, and left out where the operations so far and its own exceed :data:`MOST_OPERATIONS`.
        """
        chosen, room, left = [], MOST_OPERATIONS, 1.0
        for cost in sorted(self.costs, key=lambda cost: -cost.noise / max(cost.operations, 1e-9)):
            if cost.noise > 0 and cost.noise >= LEAST_RATIO * cost.operations * left and cost.operations <= room:
                chosen.append(cost)
                room -= cost.operations
                left -= cost.noise
        return tuple(chosen)

    @property
    def names(self) -> tuple[str, ...]:
        """The node names of all convolutions that stay in floating point."""
        return (*self.always, *(node for cost in self.chosen for node in cost.nodes))

    def __str__(self) -> str:
        lines = [f"in floating point: {', '.join(self.always)} (the first convolution and those of the heads)"]
        for cost in self.chosen:
            shares = f"{cost.noise:.1%} of the noise of all others for {cost.operations:.2%} of the operations"
            lines.append(f"in floating point: {', '.join(cost.nodes)} ({shares})")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class NoiseSums:
    """What quantizing each group of convolutions alone changes, by image: the measurement that costs follow from."""

    always: tuple[str, ...]
    """The convolutions that stay in floating point anyway."""
    groups: tuple[tuple[str, ...], ...]
    """All others, in graph order."""
    operations: tuple[float, ...]
    """The share of each group in the network's multiplications."""
    images: Mapping[str, NDArray[np.float64]]
    """Maps the SHA-256 of each image to ``(groups, 5)``: the sums of :meth:`darktrt.check.simulate.FloatReference.sums`."""

    def fp_layers(self) -> FpLayers:
        """The costs, by sums over the images in their order here."""
        total = np.zeros((len(self.groups), 5))
        for sums in self.images.values():
            total += sums
        scores, boxes = (_shares(total[:, column], total[:, 1]) for column in (0, 4))
        each = zip(self.groups, scores, boxes, self.operations, strict=True)
        return FpLayers(self.always, tuple(Cost(nodes, (one + other) / 2, share) for nodes, one, other, share in each))


def _shares(changes: NDArray[np.float64], weights: NDArray[np.float64]) -> list[float]:
    """Of each group in the sum over all groups of ``changes / weights``; 0 where nothing has weight."""
    powers = [change / weight if weight else 0.0 for change, weight in zip(changes.tolist(), weights.tolist(), strict=True)]
    all_ = sum(powers) or 1
    return [power / all_ for power in powers]
