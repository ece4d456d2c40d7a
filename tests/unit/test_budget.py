"""INT8 within a budget: the order of the trials, the messages, and the engine's layers in floating point."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Made, files_in, made_image
from PIL import Image

from darktrt.calib.table import CalibrationTable
from darktrt.check.budget import EvaluationData, Trade, within_budget
from darktrt.check.simulate import chosen_fp_layers, convolutions, load_network
from darktrt.cli import main
from darktrt.engine.manifest import read_plan_manifest
from darktrt.engine.runtime import OnnxRunner
from darktrt.errors import DarktrtError
from darktrt.pipeline import load_calibration
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.detector import NetworkDetector
from darktrt.vision.images import read_image

SPOILT, READER = "layer0", "/layers.1/Conv"
"""A tensor whose scale is wrong in ``bad.cache``, and the one convolution that reads it."""
BUDGET, SCORES = 0.2, 0.01
"""Of the average precision and of the change of scores: far above what the good calibration costs, far below the bad one."""


@pytest.fixture(scope="module")
def files(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made network for NMS, images, labels that are what it finds in float, a good calibration and a bad one."""
    folder = tmp_path_factory.mktemp("budget")
    insert_plugins(made.plain, folder / "net.onnx", SurgeryOptions())
    for name, start in (("photos", 0), ("others", 50)):
        (folder / name).mkdir()
        for i in range(start, start + 5):
            Image.fromarray(made_image(128, 192, seed=i)).save(folder / name / f"{i}.png")
    label_by_the_network(folder)
    assert (
        main(
            [
                "calib",
                "run",
                str(folder / "net.onnx"),
                str(folder / "others"),
                "-o",
                str(folder / "good.calib"),
                "--fp-layer-images",
                "0",
            ]
        )
        == 0
    )
    scales = load_calibration(folder / "good.calib").scales
    CalibrationTable({**scales, SPOILT: np.float32(scales[SPOILT] / 500)}, "8600").save(folder / "bad.cache")
    return folder


def label_by_the_network(folder: Path) -> None:
    """``val.json``: the surest detections of the float network in ``photos``, for which its AP is 1."""
    images, labels = [], []
    with OnnxRunner(folder / "net.onnx") as runner:
        names = runner.info.class_names
        for i, path in enumerate(sorted((folder / "photos").iterdir())):
            images.append({"id": i, "file_name": path.name})
            (found,) = NetworkDetector(runner.run, runner.info, 0.001, 0.45).detect([read_image(path)])
            for (x1, y1, x2, y2), one in zip(found.boxes[:6].tolist(), found.class_ids[:6].tolist(), strict=True):
                labels.append({"image_id": i, "category_id": one, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    text = json.dumps({"images": images, "annotations": labels, "categories": categories})
    (folder / "val.json").write_text(text)


def trade(
    files: Path, name: str, budget: float, data: str = "val.json:{}/photos", fp_layers: tuple[str, ...] | None = None
) -> tuple[Trade, list[str]]:
    lines: list[str] = []
    calibration = replace(load_calibration(files / name), fp_layers=fp_layers, channel_means={})
    entry = f"{files}/{data}".format(files)
    return within_budget(files / "net.onnx", calibration, budget, EvaluationData([entry]), lines.append), lines


def test_int8_within_the_budget_stays_as_it_is(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, lines = trade(files, "good.calib", BUDGET)
    assert [trial.fp_layers for trial in found.trials] == [tuple(chosen_fp_layers(load_network(files / "net.onnx")))]
    assert lines[0].startswith("FP32: AP 0.8")
    assert lines[0].endswith(f"on 5 images of {files}/val.json")
    assert len(lines) == 3
    assert "convolutions" not in capsys.readouterr().err  # nothing was ranked


def test_the_worst_layer_goes_to_floating_point_first(files: Path) -> None:
    """The layer with the bad scale; without it in INT8 the AP is that of the good calibration."""
    found, lines = trade(files, "bad.cache", BUDGET)
    before, after = found.trials
    assert after.fp_layers == (*before.fp_layers, READER)
    assert before.drop > 2 * BUDGET > BUDGET / 2 > after.drop
    assert lines[-1].split()[0] == "4"
    assert lines[-1].endswith(READER)
    assert str(found) == f"4 convolutions stay in FP16, AP drop {after.drop:.4f} (at most {BUDGET})"


def test_a_budget_of_nothing_ends_in_float(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of 1, 2, 3, 4 and then all; or fewer, if INT8 happens to lose nothing."""
    found, lines = trade(files, "bad.cache", 0, "photos")
    assert [len(trial.fp_layers) for trial in found.trials] == [3, 4, 5, 6, 7, 9]
    for one, more in zip(found.trials, found.trials[1:], strict=False):
        assert more.fp_layers[: len(one.fp_layers)] == one.fp_layers
        assert more.drop < one.drop
    assert set(found.chosen.fp_layers) == {one.node for one in convolutions(load_network(files / "net.onnx"))}
    assert found.chosen.drop == 0
    assert "no convolution is left in INT8; precision fp16 makes the same engine" in caplog.text
    added = [name for line in lines[2:] for name in line.split("  ")[-1].split(", ")]
    assert added == list(found.chosen.fp_layers[3:])


def test_counts_grow_by_about_a_half() -> None:
    from darktrt.check.budget import _counts

    assert _counts(110) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 110]
    assert [_counts(n) for n in (0, 1, 2, 5)] == [[], [1], [1, 2], [1, 2, 3, 4, 5]]


def test_named_layers_come_first(files: Path) -> None:
    found, _ = trade(files, "bad.cache", BUDGET, fp_layers=())
    assert [trial.fp_layers for trial in found.trials] == [(), (READER,)]
    found, _ = trade(files, "bad.cache", BUDGET, fp_layers=(READER,))
    assert [trial.fp_layers for trial in found.trials] == [(READER,)]


def test_without_labels_the_scores_are_measured_with_a_warning(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    found, lines = trade(files, "bad.cache", SCORES, "photos")
    assert found.trials[-1].fp_layers[-1] == READER
    assert found.trials[0].drop > SCORES >= found.chosen.drop
    assert all(trial.accuracy is None for trial in found.trials)
    assert lines[0].split() == ["in", "FP16", "scores", "heads", "added"]
    assert "there are no labels to measure mAP on" in caplog.text
    assert "change of the scores 0.0" in str(found)
    again, _ = trade(files, "bad.cache", found.chosen.drop, "photos")
    assert again.trials == found.trials  # a drop of exactly the budget is within it


def test_a_coco_file_without_annotations_counts_as_images(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = json.loads((files / "val.json").read_text())
    (files / "photos/test.json").write_text(json.dumps({"images": values["images"]}))
    try:
        found, _ = trade(files, "good.calib", BUDGET, "photos/test.json")
    finally:
        (files / "photos/test.json").unlink()
    assert found.chosen.accuracy is None
    assert "no labels" in caplog.text


def test_images_of_calibration_are_warned_of(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    trade(files, "good.calib", BUDGET)
    assert "was calibrated on" not in caplog.text
    trade(files, "good.calib", BUDGET, "others")
    assert "INT8 was calibrated on 5 of the 5 images of the evaluation" in caplog.text


def test_labels_of_another_network_are_refused(files: Path) -> None:
    """With an AP below the budget every INT8 would pass."""
    values = json.loads((files / "val.json").read_text())
    for one in values["annotations"]:
        one["bbox"] = [0, 0, 3, 3]
    (files / "photos/wrong.json").write_text(json.dumps(values))
    try:
        with pytest.raises(DarktrtError, match=r"FP32 has AP 0\.0000 on 5 images of .*wrong\.json, so any INT8 would pass"):
            trade(files, "good.calib", 0.005, "photos/wrong.json")
    finally:
        (files / "photos/wrong.json").unlink()


# --- the command ---

ENGINE = "engine net.onnx -o my.plan"
INT8 = f"{ENGINE} --precision int8 --calibration good.calib"
TOGETHER = "--max-drop X, --eval DATA, --calibration CALIB and --precision int8 go together; give all of them"
BAD = {
    f"{INT8} --eval val.json:photos --max-drop -1": "the largest drop is -1; it must be 0 or more",
    f"{INT8} --eval val.json:photos --max-drop nan": "the largest drop is nan; it must be 0 or more",
    f"{INT8} --eval val.json:photos --max-drop inf": "the largest drop is inf; it must be 0 or more",
    f"{INT8} --max-drop 0.1": TOGETHER,
    f"{INT8} --eval photos": TOGETHER,
    f"{ENGINE} --calibration good.calib --eval photos --max-drop 0": TOGETHER,
    f"{ENGINE} --precision int8 --eval photos --max-drop 0": TOGETHER,
    f"{INT8} --max-drop 0 --eval none.json": "none.json: no such file or folder",
    f"{INT8} --max-drop 0 --eval photos --eval-limit 0": "the limit is 0; evaluate on at least 1 image",
    f"{INT8} --max-drop 0 --eval photos --fp-layers /no": "'/no' is no convolution of this network",
    f"{INT8} --max-drop 0 --eval val.json": "val.json: its image '0.png' is not in its folder",
    f"{INT8} --max-drop 0 --eval val.json:photos val.json:photos": "val.json:photos: val.json:photos has labels too",
    f"{INT8} --max-drop 0 --eval six.json:photos": "six.json: has 4 categories without the network's class 'class 0'",
    f"{INT8} --max-drop 0 --eval photos".replace("good.calib", "other.cache"): "the calibration has no scale for 6 tensors",
    f"{INT8} --max-drop 0 --eval photos/0.png".replace("my.plan", "photos/0.png"): "photos/0.png: is given twice",
    f"{INT8} --max-drop 0 --eval val.json:photos".replace("my", "val"): "val.json: is given twice",
    f"{INT8} --max-drop 0 --eval val.json:photos".replace("my.plan", "good.calib"): "good.calib: is given twice",
    f"{INT8} --max-drop 0 --eval val.json:photos".replace("my", "no/my"): "no/my.plan: cannot write: No such file",
    f"{INT8} --max-drop 0 --eval val.json:photos --timing-cache no/t": "no/t: cannot write: No such file",
}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("command", BAD)
def test_mistakes_are_reported_in_one_sentence(
    command: str, files: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("net.onnx", "good.calib", "val.json", "photos"):
        (folder / name).symlink_to(files / name)
    if "other.cache" in command:
        CalibrationTable({"another": np.float32(1)}, "8600").save("other.cache")
    values = json.loads((files / "val.json").read_text())
    Path("six.json").write_text(json.dumps({**values, "categories": [{"id": i, "name": f"six {i}"} for i in range(4)]}))
    before = files_in(folder)
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"darktrt engine: {BAD[command]}"), err
    assert (out, err.count("\n"), files_in(folder)) == ("", 1, before)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_the_engine_has_the_chosen_layers_in_floating_point(
    files: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"engine {files}/net.onnx --target rtx --precision int8 --calibration {files}/bad.cache"
    budget = f"--max-drop {BUDGET} --eval {files}/val.json:{files}/photos"
    assert main([*command.split(), *budget.split(), "-o", "chosen.plan"]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1].startswith("chosen.plan: AP drop 0.")
    manifest = read_plan_manifest("chosen.plan")
    assert len(manifest.other_convolutions) == 4
    assert manifest.other_convolutions[READER] == "left in FP16"
    cost = manifest.int8_cost
    assert cost is not None and cost.ap is not None and cost.ap50 is not None
    assert (cost.measure, cost.budget, cost.data) == ("AP", BUDGET, f"{files}/val.json:{files}/photos")
    assert 0 < cost.ap < cost.ap50
    assert f"AP drop {cost.drop:.4f} (at most" in out
    assert main(["inspect", "chosen.plan"]) == 0
    assert f"\nINT8 costs    AP drop {cost.drop:.4f} (at most {BUDGET:g}); AP {cost.ap:.4f}, " in capsys.readouterr().out
    fp_layers = ",".join([*chosen_fp_layers(load_network(files / "net.onnx")), READER])
    assert main([*command.split(), "--fp-layers", fp_layers, "-o", "named.plan"]) == 0
    assert main([*command.split(), "-o", "default.plan"]) == 0
    sizes = {name: Path(f"{name}.plan").stat().st_size for name in ("chosen", "named", "default")}
    assert sizes["chosen"] == pytest.approx(sizes["named"], abs=64)
    assert sizes["default"] != pytest.approx(sizes["named"], abs=64)
