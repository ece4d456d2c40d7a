"""The convolutions that INT8 leaves in floating point: those with much noise for few operations."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, sha256_of
from darktrt.records import read_record

LEAST_RATIO = 2.0
"""The least ratio between the share of the noise and the share of the operations of a layer in floating point."""
MOST_OPERATIONS = 0.1
"""The largest share of the operations that is left in floating point for their noise."""

_FORMAT = "darktrt fp_layers 1"


@dataclass(frozen=True)
class Cost:
    """Noise and operations of convolutions that are quantized together or not at all."""

    nodes: tuple[str, ...]
    noise: float
    """The change of the scores by quantizing only these nodes, as a share of the sum over all costs."""
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
        """The costs with the highest ratios of noise to operations, down to :data:`LEAST_RATIO`.

        A cost is left out where the operations so far and its own exceed :data:`MOST_OPERATIONS`.
        """
        chosen, room = [], MOST_OPERATIONS
        for cost in sorted(self.costs, key=lambda cost: -cost.noise / max(cost.operations, 1e-9)):
            if cost.noise > 0 and cost.noise >= LEAST_RATIO * cost.operations and cost.operations <= room:
                chosen.append(cost)
                room -= cost.operations
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


def fp_layers_path(table: str | Path) -> Path:
    """The file of the floating-point layers beside a calibration table."""
    return Path(table).with_suffix(".fp_layers.json")


def save_fp_layers(layers: FpLayers, table: str | Path) -> None:
    """Write the layers beside the table that they were measured with, whole or not at all.

    Raises:
        DarktrtError: the file cannot be written.
    """
    content = {"format": _FORMAT, "table": sha256_of(table), "fp_layers": layers.names, **asdict(layers)}
    with atomic_output(fp_layers_path(table)) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_fp_layers(table: str | Path) -> tuple[str, ...] | None:
    """The node names of the floating-point layers of a table; None where there is no such file, as beside a TensorRT cache.

    Raises:
        DarktrtError: the file is damaged, or was measured with another table.
    """
    path = fp_layers_path(table)
    if not os.path.exists(path):  # where Path.exists raises an error at a name that is too long
        return None
    try:
        content = read_record(_Content, path, _ADVICE)
    except DarktrtError as error:
        raise DarktrtError(str(error), "fp_layers") from error
    if content.table != sha256_of(table):
        raise DarktrtError(
            f"{path}: was measured with another {table}; calibrate again, delete it, or name the layers", "fp_layers"
        )
    return FpLayers(content.always, content.costs).names


_ADVICE = "calibrate again, delete it, or name the layers"


@dataclass(frozen=True)
class _Content:
    """What the file says."""

    format: Literal["darktrt fp_layers 1"]
    table: str
    fp_layers: tuple[str, ...]
    always: tuple[str, ...]
    costs: tuple[Cost, ...]
