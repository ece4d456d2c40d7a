"""Which convolutions INT8 leaves in floating point: those that add much noise for the little that they compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, sha256_of

LEAST_RATIO = 2.0
"""A share of the noise that is so many times the share of the operations is worth FP16."""
MOST_OPERATIONS = 0.1
"""The share of the operations that may stay in FP16 for it."""

_FORMAT = "darktrt fp_layers 1"


@dataclass(frozen=True)
class Cost:
    """Of convolutions that stay in INT8 or in floating point together."""

    nodes: tuple[str, ...]
    noise: float
    """What quantizing them alone does to the scores, as a share of what all costs together do."""
    operations: float
    """Their share of the network's multiplications."""

    def __post_init__(self) -> None:
        if not (self.nodes and all(isinstance(node, str) for node in self.nodes)):
            raise ValueError(f"{self.nodes!r:.40} stands where names should")
        if not (0 <= self.noise <= 1 and 0 <= self.operations <= 1):
            raise ValueError(f"{self.noise!r:.20} or {self.operations!r:.20} is no share")


@dataclass(frozen=True)
class FpLayers:
    """What stays in floating point, and what else might have."""

    always: tuple[str, ...]
    """The first convolution and those of the heads."""
    costs: tuple[Cost, ...]
    """Of all others, in graph order."""

    @property
    def chosen(self) -> tuple[Cost, ...]:
        """Most noise for its operations first, down to :data:`LEAST_RATIO`, those that fit into :data:`MOST_OPERATIONS`."""
        chosen, room = [], MOST_OPERATIONS
        for cost in sorted(self.costs, key=lambda cost: -cost.noise / max(cost.operations, 1e-9)):
            if cost.noise > 0 and cost.noise >= LEAST_RATIO * cost.operations and cost.operations <= room:
                chosen.append(cost)
                room -= cost.operations
        return tuple(chosen)

    @property
    def names(self) -> tuple[str, ...]:
        """All that stay in floating point."""
        return (*self.always, *(node for cost in self.chosen for node in cost.nodes))

    def __str__(self) -> str:
        lines = [f"kept in floating point: {', '.join(self.always)} (the first and those of the heads)"]
        for cost in self.chosen:
            shares = f"{cost.noise:.1%} of the noise of all others for {cost.operations:.2%} of the operations"
            lines.append(f"kept in floating point: {', '.join(cost.nodes)} ({shares})")
        return "\n".join(lines)


def fp_layers_path(table: str | Path) -> Path:
    """The file beside a table."""
    return Path(table).with_suffix(".fp_layers.json")


def save_fp_layers(kept: FpLayers, table: str | Path) -> None:
    """Write it beside the table that it was measured with, whole or not at all.

    Raises:
        DarktrtError: the file cannot be written.
    """
    content = {"format": _FORMAT, "table": sha256_of(table), "kept": kept.names, **asdict(kept)}
    with atomic_output(fp_layers_path(table)) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_fp_layers(table: str | Path) -> tuple[str, ...] | None:
    """The names that stay in floating point; None where there is no such file, as beside a TensorRT cache from elsewhere.

    Raises:
        DarktrtError: the file is damaged, or was measured with another table.
    """
    path = fp_layers_path(table)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(content["format"])
        costs = [Cost(tuple(one["nodes"]), one["noise"], one["operations"]) for one in content["costs"]]
        kept = FpLayers(_names(content["always"]), tuple(costs))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DarktrtError(f"{path}: is damaged; run calib again, or delete it, or use --fp-layers") from error
    if content["table"] != sha256_of(table):
        raise DarktrtError(f"{path}: was measured with another {table}; run calib again, or delete it, or use --fp-layers")
    return kept.names


def _names(values: Sequence[object]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r:.40} are no names")
    return tuple(map(str, values))
