"""Floating-point layers: chosen by their costs, written beside the table, read by surgery, engine and budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Made, made_image
from onnx import numpy_helper
from PIL import Image

from darktrt.calib.fp_layers import Cost, FpLayers, fp_layers_path, load_fp_layers, save_fp_layers
from darktrt.calib.table import CalibrationTable
from darktrt.check.sensitivity import find_fp_layers, sensitivity
from darktrt.check.simulate import FloatReference, chosen_fp_layers, convolutions, load_network
from darktrt.cli import main
from darktrt.errors import DarktrtError
from darktrt.onnx_file import load_model
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.sources import find_images

ALWAYS = ("first", "head")


def chosen(*costs: tuple[str, float, float]) -> list[str]:
    layers = FpLayers(ALWAYS, tuple(Cost((name,), noise, operations) for name, noise, operations in costs))
    assert layers.names[:2] == ALWAYS
    return list(layers.names[2:])


def test_twice_the_share_of_the_operations_is_worth_it() -> None:
    assert chosen(("a", 0.1, 0.05), ("b", 0.0999, 0.05), ("c", 0.01, 0.001), ("d", 0.7901, 0.899)) == ["c", "a"]
    assert chosen(("a", 0.02, 0.01), ("b", 0.0199, 0.01), ("c", 0.9601, 0.98)) == ["a"]  # b would fit, but is not worth it


def test_no_more_than_a_tenth_of_the_operations_is_given_up() -> None:
    """Best ratios first; what does not fit makes room for the next that does."""
    assert chosen(("a", 0.4, 0.06), ("b", 0.3, 0.05), ("c", 0.1, 0.04), ("d", 0.2, 0.85)) == ["a", "c"]
    assert chosen(("a", 0.9, 0.11), ("b", 0.1, 0.89)) == []


def test_noise_without_operations_comes_first() -> None:
    assert chosen(("a", 0.9, 0.1), ("b", 0.0001, 0.0), ("c", 0.0999, 0.9)) == ["b", "a"]


def test_no_layer_is_chosen_where_nothing_is_lost() -> None:
    assert chosen(("a", 0.0, 0.0), ("b", 0.0, 1.0)) == []


def test_layers_in_words() -> None:
    layers = FpLayers(ALWAYS, (Cost(("a", "b"), 0.25, 0.0512), Cost(("c",), 0.75, 0.9)))
    assert str(layers).splitlines() == [
        "in floating point: first, head (the first convolution and those of the heads)",
        "in floating point: a, b (25.0% of the noise of all others for 5.12% of the operations)",
    ]


# --- the measurement ---


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network after surgery, images, and a calibration's files."""
    folder = tmp_path_factory.mktemp("fp_layers")
    for head in ("nms", "raw"):
        insert_plugins(made.plain, folder / f"{head}.onnx", SurgeryOptions(head=head))  # type: ignore[arg-type]
    (folder / "photos").mkdir()
    for i in range(4):
        Image.fromarray(made_image(64, 96, seed=i)).save(folder / f"photos/{i}.png")
    assert main(["calib", "run", str(folder / "nms.onnx"), str(folder / "photos"), "-o", str(folder / "my.table")]) == 0
    return folder


def test_shares_of_operations_are_those_of_the_shapes(files: Path, made: Made) -> None:
    """By hand: weights times positions of the output, whose sizes follow from the network's metadata and strides."""
    result = FloatReference(load_network(files / "nms.onnx"), find_images([str(files / "photos")], 1, 0)).operations()
    model = made.model()
    weights = {i.name: numpy_helper.to_array(i).size for i in model.graph.initializer}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    section_output = {f"/layers.{layer.index}/Conv": layer.tensor for layer in made.info.layers}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    counts = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and section_output[node.name] in shapes:
            counts[node.name] = weights[node.input[1]] * int(np.prod(shapes[section_output[node.name]][2:]))
    assert len(counts) >= 4
    assert sum(result.values()) == pytest.approx(1)
    first = next(iter(counts))
    for name, count in counts.items():
        assert result[name] / result[first] == pytest.approx(count / counts[first])


def test_each_convolution_is_measured_by_itself(files: Path) -> None:
    calibration = Calibration(CalibrationTable.load(files / "my.table").scales)
    images = find_images([str(files / "photos")], 2, 0)
    result = find_fp_layers(files / "nms.onnx", images, calibration)
    network = load_network(files / "nms.onnx")
    assert list(result.always) == chosen_fp_layers(network)
    others = [one.node for one in convolutions(network) if one.node not in result.always]
    assert [cost.nodes for cost in result.costs] == [(name,) for name in others]
    ranked = sensitivity(files / "nms.onnx", [str(files / "photos")], calibration, 2)
    changes = {layer.convolution.node: layer.change.scores for layer in ranked.layers}
    total = sum(changes[name] ** 2 for name in others)
    assert [cost.noise for cost in result.costs] == pytest.approx([changes[name] ** 2 / total for name in others])


def test_a_deep_network_is_measured_in_groups_of_neighbours(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darktrt.check.sensitivity.MOST_GROUPS", 3)
    calibration = Calibration(CalibrationTable.load(files / "my.table").scales)
    result = find_fp_layers(files / "nms.onnx", find_images([str(files / "photos")], 1, 0), calibration)
    network = load_network(files / "nms.onnx")
    others = [one.node for one in convolutions(network) if one.node not in result.always]
    assert len(result.costs) == 3
    assert [name for cost in result.costs for name in cost.nodes] == others
    assert sum(cost.noise for cost in result.costs) == pytest.approx(1)


# --- the file, and its readers ---


def test_calib_writes_the_layers_and_the_reasons(files: Path) -> None:
    content = json.loads((files / "my.fp_layers.json").read_text())
    assert load_fp_layers(files / "my.table") == tuple(content["fp_layers"])
    assert "in floating point: " in (files / "my.txt").read_text()


def test_surgery_uses_it_unless_layers_are_named(
    files: Path, made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "a.table"
    table.write_bytes((files / "my.table").read_bytes())
    names = [one.node for one in convolutions(load_network(files / "nms.onnx"))]
    one = names[len(names) // 2]

    def in_floating_point(*options: str) -> str:
        words = ["surgery", str(made.plain), "-o", str(tmp_path / "q.onnx"), "--qdq", "--calibration", str(table)]
        assert main([*words, *options]) == 0
        return capsys.readouterr().out.strip().rpartition(": ")[2]

    usual = in_floating_point()
    save_fp_layers(FpLayers((), (Cost((one,), 1.0, 0.05),)), table)
    assert in_floating_point() == one != usual
    assert in_floating_point("--fp-layers", names[0]) == names[0]
    assert in_floating_point("--fp-layers", "") == "none"


def test_no_file_is_written_where_nothing_was_measured(files: Path, tmp_path: Path) -> None:
    for name, *options in (("nms", "--fp-layer-images", "0"), ("raw",)):
        table = tmp_path / f"{name}.table"
        fp_layers_path(table).write_text("of an earlier table")
        assert main(["calib", "run", str(files / f"{name}.onnx"), str(files / "photos"), "-o", str(table), *options]) == 0
        assert load_fp_layers(table) is None
    assert load_model(files / "raw.onnx")[1].head == "raw"


def test_ranking_and_budget_start_from_the_layers(files: Path) -> None:
    network = load_network(files / "nms.onnx")
    names = [one.node for one in convolutions(network)]
    calibration = Calibration(CalibrationTable.load(files / "my.table").scales, (names[2],))
    assert chosen_fp_layers(network, calibration) == [names[2]]
    assert chosen_fp_layers(network) == chosen_fp_layers(network, Calibration(calibration.scales)) != [names[2]]
    ranked = sensitivity(files / "nms.onnx", [str(files / "photos")], calibration, 1)
    assert [layer.convolution.node for layer in ranked.layers if layer.in_fp] == [names[2]]


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(name)


def _with(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(values)


COST = {"nodes": ["a"], "noise": 0.25, "operations": 0.05}


@pytest.mark.parametrize(
    "damage",
    [
        *(_without(name) for name in ("format", "table", "always", "costs")),
        _with(format="darktrt fp_layers 9"),
        _with(table=None),
        _with(always="first"),
        _with(always=[["first"]]),
        _with(costs=[{**COST, "noise": 1.5}]),
        _with(costs=[{**COST, "noise": -0.5}]),
        _with(costs=[{**COST, "operations": 1.5}]),
        _with(costs=[{**COST, "operations": -0.5}]),
        _with(costs=[{**COST, "operations": "0.5"}]),
        _with(costs=[{**COST, "nodes": []}]),
        _with(costs=[{**COST, "nodes": [7]}]),
        _with(more=1),
    ],
)
def test_damaged_content_is_reported(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    table = tmp_path / "a.table"
    CalibrationTable({"x": np.float32(1)}, "8600").save(table)
    save_fp_layers(FpLayers(ALWAYS, (Cost(("a",), 0.25, 0.05),)), table)
    assert load_fp_layers(table) == (*ALWAYS, "a")
    content = json.loads(fp_layers_path(table).read_text())
    damage(content)
    fp_layers_path(table).write_text(json.dumps(content))
    with pytest.raises(DarktrtError, match=DAMAGED) as raised:
        load_fp_layers(table)
    assert raised.value.argument == "fp_layers"


DAMAGED = r"a\.fp_layers\.json: is damaged .*\(.+\); calibrate again, delete it, or name the layers$"


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"format": NaN}', '{"format": 1e999}', r'"\ud800"'])
def test_a_file_that_is_no_such_json_is_reported(tmp_path: Path, text: str) -> None:
    table = tmp_path / "a.table"
    fp_layers_path(table).write_text(text)
    with pytest.raises(DarktrtError, match=DAMAGED):
        load_fp_layers(table)


def test_a_table_with_a_name_too_long_for_a_file_beside_it_has_no_layers(tmp_path: Path) -> None:
    table = tmp_path / f"{'a' * 249}.table"
    CalibrationTable({"x": np.float32(1)}, "8600").save(table)
    assert load_fp_layers(table) is None


def test_what_was_measured_with_another_table_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "a.table"
    CalibrationTable({"x": np.float32(1)}, "8600").save(table)
    save_fp_layers(FpLayers(ALWAYS, ()), table)
    CalibrationTable({"x": np.float32(2)}, "8600").save(table)
    with pytest.raises(DarktrtError, match=r"a\.fp_layers\.json: was measured with another .*a\.table; calibrate again"):
        load_fp_layers(table)
