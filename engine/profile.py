"""The layers of an engine: the cfg's sections that each one computes, and its time on the GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from darktrt.engine.bench import random_inputs
from darktrt.engine.layer_list import EngineLayer
from darktrt.engine.manifest import Manifest, read_plan_manifest
from darktrt.engine.runtime import PlanRunner
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo

_CALLS = 50
"""The executions of which times are the mean."""
_WIDTH = 56


class LayerTime(NamedTuple):
    """A layer, the first cfg line of each of its sections, and its milliseconds where they were measured."""

    layer: EngineLayer
    lines: tuple[int, ...]
    milliseconds: float | None


class LinesTime(NamedTuple):
    """The time of one or several sections of the cfg, and the precision of the slowest layer."""

    label: str
    milliseconds: float
    precision: str


@dataclass(frozen=True)
class LayerReport:
    """All layers in order."""

    plan: str
    manifest: Manifest
    rows: tuple[LayerTime, ...]
    batch: int | None
    """The batch of the times; None where they were not measured."""

    @property
    def total(self) -> float:
        """Milliseconds of all layers, measured one after the other."""
        return sum(row.milliseconds or 0 for row in self.rows)

    def title(self) -> str:
        """One line on what was measured."""
        manifest = self.manifest
        measured = f", batch {self.batch}: {self.total:.3f} ms" if self.batch else ""
        return f"{manifest.info.name} {manifest.precision.upper()}, {manifest.target}, {manifest.gpu or 'no GPU'}{measured}"

    def to_table(self) -> str:
        """A row for each layer, as text for people."""
        lines = [self.title(), f"{'layer':{_WIDTH}}  {'type':<18} {'':4}  {'cfg lines':<12} {'ms':>8}   layout"]
        for layer, numbers, ms in self.rows:
            name = layer.name if len(layer.name) <= _WIDTH else f"{layer.name[: _WIDTH - 1]}…"
            time = "" if ms is None else f"{ms:.4f}"
            lines.append(
                f"{name:{_WIDTH}}  {layer.kind[:18]:<18} {layer.precision:4}  {_listed(numbers):<12} {time:>8}   {layer.layout}"
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, with the cfg lines and ONNX nodes of each layer."""
        about = {"plan": self.plan, "plan_sha256": self.manifest.plan_sha256, "title": self.title(), "batch": self.batch}
        rows = [{**asdict(layer), "cfg_lines": numbers, "milliseconds": ms} for layer, numbers, ms in self.rows]
        return json.dumps({**about, "layers": rows}, indent=2) + "\n"

    def by_lines(self) -> list[LinesTime]:
        """Times by the cfg's sections, in their order; layers of no section come last, by type."""
        groups: dict[tuple[tuple[int, ...], str], list[LayerTime]] = {}
        for row in sorted(self.rows, key=lambda row: row.lines or (1 << 30,)):
            groups.setdefault((row.lines, "" if row.lines else row.layer.kind or "other"), []).append(row)
        return [_together(f"cfg line {_listed(lines)}" if lines else kind, rows) for (lines, kind), rows in groups.items()]


def layers_of(plan: str | Path) -> LayerReport:
    """The layers of a plan, from its manifest; no GPU is needed.

    Raises:
        DarktrtError: the manifest cannot be read, or lists no layers.
    """
    manifest = read_plan_manifest(plan)
    if not manifest.engine_layers:
        raise DarktrtError(f"{plan}: its manifest lists no layers; build it again with this version of darktrt")
    rows = tuple(LayerTime(layer, _lines(layer, manifest.info), None) for layer in manifest.engine_layers)
    return LayerReport(str(plan), manifest, rows, None)


def profile(plan: str | Path, batch: int | None = None, plugins: str | Path | None = None) -> LayerReport:
    """The layers of a plan with their times on this machine's GPU, each the mean of 50 executions on random images.

    Args:
        batch: by default the engine's usual batch.

    Raises:
        DarktrtError: the plan cannot be run, or not with this batch.
    """
    with PlanRunner(plan, plugins) as runner:
        batch = batch or runner.info.batch[1]
        runner.run(random_inputs(runner.info, batch))
        times = runner.layer_times(_CALLS)
        manifest = runner.manifest
    known = {layer.name for layer in manifest.engine_layers}
    others = [EngineLayer(name, "", "", "", ()) for name in times if name not in known]
    rows = [
        LayerTime(layer, _lines(layer, manifest.info), times.get(layer.name, 0.0))
        for layer in (*manifest.engine_layers, *others)
    ]
    return LayerReport(str(plan), manifest, tuple(rows), batch)


def _lines(layer: EngineLayer, info: DetectorInfo) -> tuple[int, ...]:
    of_section: Mapping[int, int] = {section.index: section.line for section in info.layers}
    return tuple(of_section[section] for section in layer.sections if section in of_section)


def _listed(lines: tuple[int, ...]) -> str:
    return ", ".join(map(str, lines[:2])) + (", ..." if len(lines) > 2 else "")


def _together(label: str, rows: list[LayerTime]) -> LinesTime:
    most = max(rows, key=lambda row: row.milliseconds or 0)
    return LinesTime(label, sum(row.milliseconds or 0 for row in rows), most.layer.precision)
