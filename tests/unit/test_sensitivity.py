"""The cost of quantizing each layer: the measure against its formula, the ranking, and the outputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import MADE_CFG, SHARED, Array, Made, files_in, made_image, make, run
from PIL import Image

from darktrt.calib.table import CalibrationTable
from darktrt.check.coco import Accuracy
from darktrt.check.sensitivity import LayerCost, Sensitivity, measure_each, plot, sensitivity
from darktrt.check.simulate import (
    Change,
    Convolution,
    FloatReference,
    chosen_fp_layers,
    convolutions,
    load_network,
    quantized,
    up_to_boxes,
)
from darktrt.cli import commands, main
from darktrt.convert.export import convert_darknet
from darktrt.errors import DarktrtError
from darktrt.onnx_file import load_model
from darktrt.pipeline import load_calibration
from darktrt.surgery.qdq import Calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.images import preprocess, read_image
from darktrt.vision.sources import find_images

SPOILT = "layer0"
"""The tensor whose scale :func:`spoilt` breaks; one convolution reads it."""


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network after surgery in every form, five images, and its calibration."""
    folder = tmp_path_factory.mktemp("sensitivity")
    for head in ("nms", "decode", "raw"):
        insert_plugins(made.plain, folder / f"{head}.onnx", SurgeryOptions(head=head))  # type: ignore[arg-type]
    insert_plugins(made.plain, folder / "fused.onnx", SurgeryOptions(mish="fused"))
    (folder / "photos").mkdir()
    for i in range(5):
        Image.fromarray(made_image(64 + 8 * i, 96, seed=i)).save(folder / f"photos/{i}.png")
    calib = [
        "calib",
        "run",
        str(folder / "nms.onnx"),
        str(folder / "photos"),
        "-o",
        str(folder / "my.calib"),
        "--fp-layer-images",
        "0",
    ]
    assert main(calib) == 0
    return folder


@pytest.fixture
def scales(files: Path) -> Calibration:
    return Calibration(load_calibration(files / "my.calib").scales)


def spoilt(scales: Calibration) -> Calibration:
    """A calibration that clips one tensor to nearly nothing."""
    return Calibration({**scales.scales, SPOILT: np.float32(scales.scales[SPOILT] / 500)})


def readers(made: Made, tensor: str) -> list[str]:
    return [node.name for node in made.model().graph.node if node.op_type == "Conv" and tensor in node.input]


def measured(files: Path, calibration: Calibration, form: str = "nms", limit: int = 5) -> dict[Convolution, Change]:
    network = load_network(files / f"{form}.onnx")
    return measure_each(network, find_images([str(files / "photos")], limit, 0), calibration)


# --- the network ---


def test_convolutions_come_with_their_line_of_the_cfg(files: Path, made: Made) -> None:
    """Though the activation behind them may have gone into an add."""
    lines = MADE_CFG.splitlines()
    expected = [i for i, line in enumerate(lines, 1) if line == "[convolutional]"]
    for form in ("nms", "decode", "fused"):
        found = convolutions(load_network(files / f"{form}.onnx"))
        assert [one.line for one in found] == expected
        assert [made.info.layers[one.section].line for one in found] == expected
        assert [one.node for one in found] == [node.name for node in made.model().graph.node if node.op_type == "Conv"]


def test_convolutions_of_another_network_are_refused(files: Path) -> None:
    network = load_network(files / "nms.onnx")
    with pytest.raises(DarktrtError, match=r"'/layers\.0/Conv' belongs to no cfg section of the metadata"):
        convolutions(replace(network, info=replace(network.info, layers=network.info.layers[1:])))


def test_the_network_ends_at_its_boxes_and_scores(files: Path) -> None:
    network = load_network(files / "nms.onnx")
    cut = up_to_boxes(network)
    onnx.checker.check_model(cut.model, full_check=True)
    image = made_image(64, 96)[None]
    found = run(cut.model, {"images": image})
    assert set(found) == {"boxes", "scores", *(head.tensor for head in network.info.heads)}
    decoded = run(files / "decode.onnx", {"images": image})
    for name in ("boxes", "scores"):
        np.testing.assert_array_equal(found[name], decoded[name])


@pytest.mark.parametrize("form", ["nms", "decode"])
def test_the_quantized_graph_is_that_of_engines(files: Path, scales: Calibration, form: str) -> None:
    """Nodes and constants of the graph are those of surgery with Q/DQ, and nothing of the float network has changed."""
    network = load_network(files / f"{form}.onnx")
    before = network.model.SerializeToString()
    model = quantized(network, scales, chosen_fp_layers(network))
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) > 3
    assert network.model.SerializeToString() == before


# --- the measure ---


def scores_of(model: onnx.ModelProto, images: list[Array]) -> Array:
    return np.concatenate([run(model, {"images": image[None]})["scores"] for image in images]).astype(np.float64)


def test_the_change_follows_its_formula(files: Path, scales: Calibration) -> None:
    """Computed again, from surgery's own Q/DQ nodes around one convolution."""
    found = measured(files, scales)
    network = load_network(files / "decode.onnx")
    names = [one.node for one in found]
    info = network.info
    images = [
        preprocess(read_image(p), info.width, info.height, 3, "stretch", "uint8")[0]
        for p in find_images([str(files / "photos")], 5, 0)
    ]
    exact = scores_of(network.model, images)
    weight = exact.max(2)
    for one, change in list(found.items())[::3]:
        model = quantized(network, scales, [name for name in names if name != one.node])
        quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert len(quantizers) == 1
        moved = ((scores_of(model, images) - exact) ** 2).sum(2)
        assert change.scores == pytest.approx(np.sqrt((weight * moved).sum() / weight.sum()), rel=1e-3)
        assert 0 < change.heads < 0.2


def test_nothing_quantized_changes_nothing(files: Path, scales: Calibration) -> None:
    network = load_network(files / "nms.onnx")
    reference = FloatReference(network, find_images([str(files / "photos")], 2, 0))
    assert reference.change(scales, [one.node for one in convolutions(network)]) == (0, 0)
    some, all_ = reference.change(scales, chosen_fp_layers(network)), reference.change(scales, [])
    assert 0 < some.scores < all_.scores * 2
    assert some.heads < all_.heads


def test_a_layer_with_a_bad_scale_comes_first(files: Path, scales: Calibration, made: Made) -> None:
    changes = measured(files, spoilt(scales))
    assert [max(changes, key=lambda one: changes[one].scores).node] == readers(made, SPOILT)
    before = measured(files, scales)
    assert [one.node for one in changes if changes[one] != before[one]] == readers(made, SPOILT)


def test_every_form_of_the_network_is_measured_alike(files: Path, scales: Calibration, tmp_path: Path) -> None:
    """Also one of a fixed batch of two, which is filled up for the last of five images."""
    static = make(tmp_path, MADE_CFG, batch=(2, 2, 2))
    insert_plugins(static.plain, files / "two.onnx", SurgeryOptions())
    expected = measured(files, scales)
    for form in ("decode", "two"):
        found = measured(files, scales, form)
        assert list(found) == list(expected)
        for one, change in found.items():
            assert change == pytest.approx(expected[one], rel=1e-2)


def test_outputs_that_are_nan_are_refused(files: Path, tmp_path: Path) -> None:
    model, _ = load_model(files / "nms.onnx")
    weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full(weight.dims, np.nan, np.float32), weight.name))
    onnx.save(model, str(tmp_path / "nan.onnx"))
    with pytest.raises(DarktrtError, match="its outputs are NaN or infinite; are the weights damaged"):
        FloatReference(load_network(tmp_path / "nan.onnx"), find_images([str(files / "photos")], 1, 0))


# --- outputs ---


def result(*costs: float, judged: bool = False) -> Sensitivity:
    """Layers of these changes of the scores, the first kept by default."""
    accuracy = Accuracy(0.5, 0.6, 0.5, float("nan"), 0.5, 0.5)
    layers = [
        LayerCost(
            Convolution(f"/layers.{i}/Conv", i, 10 * i), Change(cost, 0.1), i == 0, replace(accuracy, ap=round(0.4 + cost, 9))
        )
        for i, cost in enumerate(costs)
    ]
    if not judged:
        layers = [replace(layer, accuracy=None) for layer in layers]
    return Sensitivity("net", 3, tuple(layers), Change(0.3, 0.2), accuracy if judged else None)


def test_the_table_has_the_worst_first(capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = result(0.02, 0.04, 0.03).to_table().splitlines()
    assert header.split() == ["rank", "convolution", "cfg", "line", "scores", "heads"]
    assert [row.split()[:4] for row in rows] == [
        ["1", "/layers.1/Conv", "10", "0.04000"],
        ["2", "/layers.2/Conv", "20", "0.03000"],
        ["3", "/layers.0/Conv", "0", "0.02000"],
    ]
    assert [row.endswith("in FP by default") for row in rows] == [False, False, True]


def test_measured_precision_ranks() -> None:
    found = result(0.02, 0.04, 0.03, judged=True)
    assert [layer.convolution.section for layer in found.ranked()] == [0, 2, 1]
    header, first, *_ = found.to_table().splitlines()
    assert header.split()[-2:] == ["AP", "drop"]
    assert first.split()[5:7] == ["0.4200", "0.0800"]


def test_json_has_every_number() -> None:
    values = json.loads(result(0.02, 0.04, judged=True).to_json())
    assert (values["network"], values["images"], values["together"]) == ("net", 3, {"scores": 0.3, "heads": 0.2})
    assert values["layers"][0] == {
        "node": "/layers.0/Conv",
        "section": 0,
        "line": 0,
        "scores": 0.02,
        "heads": 0.1,
        "in_fp": True,
        "accuracy": {"ap": 0.42, "ap50": 0.6, "ap75": 0.5, "ap_small": None, "ap_medium": 0.5, "ap_large": 0.5},
    }
    assert json.loads(result(0.02).to_json())["layers"][0]["accuracy"] is None


def test_bars_are_as_long_as_the_costs(tmp_path: Path) -> None:
    plot(result(0.02, 0.04, 0.01), tmp_path / "bars.png")
    page = np.asarray(Image.open(tmp_path / "bars.png").convert("RGB")).astype(int)
    gray, blue = ((page == colour).all(2) for colour in ((190, 190, 190), (108, 148, 190)))
    lengths = [int(row.sum()) for row in (*gray, *blue) if row.sum() > 50]
    full = max(lengths)
    assert full > 300
    assert {round(length / full, 2) for length in lengths} == {0.25, 0.5, 1}
    assert max(gray.sum(1)) == pytest.approx(full / 2, abs=2)  # the one in floating point by default is gray
    assert np.flatnonzero(gray.sum(1) > 50).max() < np.flatnonzero(blue.sum(1) > 50).min()
    with pytest.raises(DarktrtError, match=r"bars\.svg: cannot draw"):
        plot(result(0.02), tmp_path / "bars.svg")
    plot(result(0.0), tmp_path / "none.png")


# --- the command ---


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["calib", "sensitivity", "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert len(examples) == 3
    for example in examples:
        assert commands.parser().parse_args(example.split()[1:]).command == "calib sensitivity"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int | None]]:
    """The progress of a command."""
    made: list[tuple[str, int, int | None]] = []
    monkeypatch.setattr("darktrt.cli.commands.show_on_stderr", lambda: None)
    monkeypatch.setattr("darktrt.progress._shown", lambda *step: made.append(step))
    return made


def test_the_command_ranks_and_draws(
    files: Path, folder: Path, capsys: pytest.CaptureFixture[str], steps: list[tuple[str, int, int | None]]
) -> None:
    command = f"calib sensitivity {files}/nms.onnx {files}/photos --calibration {files}/my.calib --limit 2"
    assert main(f"{command} --json a.json --plot a.png".split()) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 1 + 9 + 1
    assert rows[-1].startswith("made: INT8 with 3 convolutions in floating point changes scores by 0.")
    costs = [float(row.split()[3]) for row in rows[1:-1]]
    assert costs == sorted(costs, reverse=True)
    assert steps[-1] == ("", 10, 10)  # each convolution, and all together
    assert files_in(folder) == ["a.json", "a.png"]
    values = json.loads(Path("a.json").read_text())
    assert [layer["node"] for layer in values["layers"]] == [row.split()[1] for row in rows[1:-1]]


def test_the_command_measures_precision_on_request(
    files: Path, folder: Path, capsys: pytest.CaptureFixture[str], steps: list[tuple[str, int, int | None]]
) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
    labels = [{"image_id": 0, "category_id": 1, "bbox": [4, 4, 40, 30]}]
    categories = [{"id": i, "name": f"class {i}"} for i in range(3)]
    Path("val.json").write_text(json.dumps({"images": images, "annotations": labels, "categories": categories}))
    command = f"calib sensitivity {files}/nms.onnx {files}/photos --calibration {files}/my.calib --limit 1"
    assert main([*command.split(), "--map", f"val.json:{files}/photos"]) == 0
    assert capsys.readouterr().out.split("\n")[0].split()[-2:] == ["AP", "drop"]
    assert steps[-1] == ("", 20, 20), "two images by the float network and by nine others"


BAD = {
    "nms.onnx photos --calibration none.calib": "none.calib: cannot read",
    "nms.onnx photos --calibration other.cache": "the calibration has no scale for 8 tensors of this network",
    "raw.onnx photos --calibration my.calib": "raw.onnx: ends at its raw heads; make it with head nms or decode",
    "int8.onnx photos --calibration my.calib": "int8.onnx: has Q/DQ nodes already; use the ONNX file without them",
    "my.calib photos --calibration my.calib": "my.calib: ",
    "nms.onnx empty --calibration my.calib": "empty: no images here",
    "nms.onnx photos --calibration my.calib --limit 0": "the limit is 0",
    "nms.onnx photos --calibration my.calib --map photos": "photos: no image has labels; name a COCO json",
    "nms.onnx photos --calibration my.calib --plot a.svg": "a.svg: cannot draw to that format",
    "nms.onnx photos --calibration my.calib --plot no/a.png": "no/a.png: cannot write: No such file",
    "nms.onnx photos --calibration my.calib --json empty": "empty: is a folder; name a file to write",
    "nms.onnx photos --calibration my.calib --json nms.onnx": "nms.onnx: is given twice and would be overwritten",
    "nms.onnx photos --calibration my.calib --plot a.png --json a.png": "a.png: is given twice",
    "nms.onnx photos/0.png bad.png --calibration my.calib": "bad.png: ",
}


@pytest.mark.parametrize("arguments", BAD)
def test_mistakes_are_reported_in_one_sentence(
    arguments: str, files: Path, folder: Path, made: Made, scales: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("nms.onnx", "raw.onnx", "my.calib", "photos"):
        (folder / name).symlink_to(files / name)
    (folder / "empty").mkdir()
    Path("bad.png").write_text("no image")
    if "other.cache" in arguments:
        CalibrationTable({"another": np.float32(1)}, "8600").save("other.cache")
    if "int8.onnx" in arguments:
        insert_plugins(made.plain, "int8.onnx", SurgeryOptions(calibration=Calibration(scales.scales)))
    before = files_in(folder)
    assert main(["calib", "sensitivity", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"darktrt calib sensitivity: {BAD[arguments]}"), err
    assert (out, err.count("\n"), files_in(folder)) == ("", 1, before)


# --- a real network ---

ZOO, DATA = SHARED / "zoo", SHARED / "data"
MISSING = [str(path) for path in (ZOO / "yolov4-tiny.cfg", ZOO / "yolov4-tiny.weights", DATA / "val.json") if not path.exists()]


@pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}")
def test_a_real_network(tmp_path: Path) -> None:
    """At 224 x 224: its 21 convolutions cost something each, the whole more than any of them, but not the sum of all."""
    convert_darknet(ZOO / "yolov4-tiny.cfg", ZOO / "yolov4-tiny.weights", tmp_path / "plain.onnx", size=(224, 224))
    insert_plugins(tmp_path / "plain.onnx", tmp_path / "nms.onnx", SurgeryOptions())
    model, data = str(tmp_path / "nms.onnx"), str(DATA / "val.json")
    options = ["--limit", "4", "--bias-images", "0", "--fp-layer-images", "0"]
    assert main(["calib", "run", model, data, *options, "-o", str(tmp_path / "my.calib")]) == 0
    found = sensitivity(model, [data], Calibration(load_calibration(tmp_path / "my.calib").scales), 2)
    costs = [layer.change.scores for layer in found.layers]
    assert len(costs) == 21
    assert 0.0005 < min(costs) < max(costs) < found.together.scores < sum(costs)
