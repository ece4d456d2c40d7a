"""The layers of an engine for people: the table, the times by cfg section, and what of both needs a GPU."""

from __future__ import annotations

import json

import pytest
from helpers import Made

from darktrt.engine.layer_list import EngineLayer
from darktrt.engine.manifest import Manifest
from darktrt.engine.profile import LayerReport, LayerTime, LinesTime


def manifest(made: Made, gpu: str | None = "NVIDIA L4") -> Manifest:
    return Manifest("ab" * 32, "0" * 64, "TensorRT 10.3.0", gpu, "int8", (), 1.0, made.info)


def row(
    name: str, ms: float | None, *lines: int, kind: str = "conv", precision: str = "INT8", layout: str = "NHWC"
) -> LayerTime:
    return LayerTime(EngineLayer(name, kind, precision, layout, ()), lines, ms)


def report(made: Made, *rows: LayerTime, batch: int | None = 2, gpu: str | None = "NVIDIA L4") -> LayerReport:
    return LayerReport("x.plan", manifest(made, gpu), rows, batch)


def test_times_add_up_by_cfg_section(made: Made) -> None:
    """In the order of the cfg, with the precision of the slowest layer; layers of no section come last, by type."""
    rows = [
        row("copy", 0.5, kind="Reformat", precision="FP32"),
        row("b", 0.25, 20),
        row("cast", 0.125, 20, precision="FP16"),
        row("fused", 1.0, 20, 30, 40, precision="FP16"),
        row("nameless", 0.75, kind="", precision=""),
        row("a", 2.0, 6),
        row("copy again", 1.5, kind="Reformat", precision="INT8"),
        row("b again", 0.5, 20, precision="FP32"),
    ]
    found = report(made, *rows)
    assert found.by_lines() == [
        LinesTime("cfg line 6", 2.0, "INT8"),
        LinesTime("cfg line 20", 0.875, "FP32"),
        LinesTime("cfg line 20, 30, ...", 1.0, "FP16"),
        LinesTime("Reformat", 2.0, "INT8"),
        LinesTime("other", 0.75, ""),
    ]
    assert found.total == 6.625


def test_a_row_for_each_layer(made: Made) -> None:
    """Columns of one width, whatever the names; a name of 56 characters is whole, a longer one ends in a dot."""
    names = "x" * 56, "y" * 57
    rows = row(names[0], 0.25, 6, 14), row(names[1], 12.5, 6, 14, 23, kind="a type of 18 chars and more", precision="")
    title, head, first, second = report(made, *rows).to_table().splitlines()
    assert title == "made INT8, TensorRT 10.3.0, NVIDIA L4, batch 2: 12.750 ms"
    assert head == f"{'layer':56}  {'type':18}       {'cfg lines':12} {'ms':>8}   layout"
    assert first == f"{names[0]}  {'conv':18} INT8  {'6, 14':12}   0.2500   NHWC"
    assert second == f"{'y' * 55}…  a type of 18 chars       {'6, 14, ...':12}  12.5000   NHWC"


def test_layers_without_times(made: Made) -> None:
    """As far as the manifest has them; the plan may be built without a GPU."""
    found = report(made, row("a", None, 6), batch=None, gpu=None)
    assert found.title() == "made INT8, TensorRT 10.3.0, no GPU"
    assert found.to_table().splitlines()[2] == f"{'a':56}  {'conv':18} INT8  {'6':12} {'':>8}   NHWC"
    assert found.total == 0 and found.by_lines() == [LinesTime("cfg line 6", 0, "INT8")]


def test_json_has_all_of_every_layer(made: Made) -> None:
    layer = EngineLayer("a", "conv", "INT8", "NHWC", ("/layers.0/Conv",), "sm80")
    text = report(made, LayerTime(layer, (6,), 0.25)).to_json()
    assert text.startswith('{\n  "plan": "x.plan",\n') and text.endswith("\n}\n")
    values = json.loads(text)
    assert values == {
        "plan": "x.plan",
        "plan_sha256": "ab" * 32,
        "title": "made INT8, TensorRT 10.3.0, NVIDIA L4, batch 2: 0.250 ms",
        "batch": 2,
        "layers": [
            {
                "name": "a", "kind": "conv", "precision": "INT8", "layout": "NHWC",
                "nodes": ["/layers.0/Conv"], "tactic": "sm80",
                "cfg_lines": [6], "milliseconds": 0.25,
            }
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "sections"),
    [(("/layers.10/Conv", "/layers.2/Mul", "/layers.10/Add"), (2, 10)), ((), (4,)), (("images_cast",), ())],
)
def test_sections_are_those_of_the_nodes_or_else_of_the_name(nodes: tuple[str, ...], sections: tuple[int, ...]) -> None:
    assert EngineLayer("copy to /layers.4/Conv", "", "", "", nodes).sections == sections
