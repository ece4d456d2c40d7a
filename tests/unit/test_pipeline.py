"""The Python API: from darknet files to an evaluated engine, its refusals, and what it prints, which is nothing."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, Made, files_in, made_image
from PIL import Image

import darktrt
from darktrt.calib.histogram import HistogramSet
from darktrt.cli import main
from darktrt.pipeline import _every_nth, load_calibration


@pytest.fixture
def images(folder: Path) -> Path:
    """A folder ``in`` of four images in the current one."""
    (folder / "in").mkdir()
    for i in range(4):
        Image.fromarray(made_image(90, 120 + i, seed=i)).save(folder / f"in/{i}.png")
    return folder / "in"


OPTIONS = darktrt.CalibrationOptions(bias_images=2, fp_layer_images=1)


def test_from_darknet_files_to_an_evaluation(
    made: Made, labelled: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    darktrt.set_progress(None)
    info = darktrt.convert_darknet(made.cfg, made.weights, "plain.onnx", batch=(1, 2, 3))
    assert info.batch == (1, 2, 3)
    report = darktrt.insert_plugins("plain.onnx", "portable.onnx")
    assert report.heads == 2
    calibration = darktrt.calibrate("portable.onnx", [labelled / "others"], "my.table", OPTIONS)
    assert calibration.scales and calibration.channel_means and calibration.fp_layers
    with darktrt.Detector.open("portable.onnx", score_threshold=0.05) as detector:
        array, file = made_image(70, 130, seed=3), labelled / "photos/0.png"
        alone = [detector.detect([image])[0] for image in (array, file)]
        together = detector.detect([array, file])
    assert [len(one) for one in together] == [len(one) for one in alone]
    evaluation = darktrt.evaluate({"a": "portable.onnx", "b": "portable.onnx"}, labelled / "photos")
    assert [one.detections.name for one in evaluation.variants] == ["a", "b"]
    assert evaluation.variants[0].metrics.accuracy.ap > 0.5
    assert "AP" in evaluation.to_table()
    agreement = darktrt.compare(["plain.onnx", "portable.onnx"], labelled / "photos", limit=2)
    assert agreement.passed and "portable.onnx" in agreement.to_table()
    out, err = capfd.readouterr()
    assert out == "" and all(line.startswith("warning: ") for line in err.splitlines())


def test_calibration_is_that_of_the_command(made: Made, images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    calibration = darktrt.calibrate("portable.onnx", ["in"], "api.table", OPTIONS)
    assert main(["calib", "run", "portable.onnx", "in", "-o", "cli.table", "--bias-images", "2", "--fp-layer-images", "1"]) == 0
    assert Path("api.table").read_bytes() == Path("cli.table").read_bytes()
    assert load_calibration("cli.table").fp_layers == calibration.fp_layers
    merged = darktrt.merge_calibrations(["api.npz"], "merged.table")
    assert merged.scales == calibration.scales and not merged.channel_means


def _fail_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let ``owner.name`` fail as on a full disk, after so many calls that work."""
    work, left = getattr(owner, name), iter(range(calls))

    def act(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise darktrt.DarktrtError("no room")
        return work(*arguments, **named)

    monkeypatch.setattr(owner, name, act)


FAILURES = [
    ("darktrt.calib.threshold", "mse_amax", 0),
    ("darktrt.calib.table", "CalibrationTable.save", 0),
    ("darktrt.calib.table", "CalibrationTable.save", 1),
    ("darktrt.calib.summary", "summary", 0),
    ("darktrt.calib.summary", "save_figure", 0),
]
MEASURING = [("darktrt.calib.bias_correction", "save_channel_means", 0), ("darktrt.calib.summary", "add_to_summary", 0)]


@pytest.mark.parametrize("failure", [*FAILURES, *MEASURING], ids=str)
def test_a_calibration_that_fails_leaves_only_histograms_to_resume_from(
    made: Made, images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, failure: tuple[str, str, int]
) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    module, name, calls = failure
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    _fail_after(monkeypatch, getattr(owner, owners[0]) if owners else owner, name, calls)
    before = files_in(folder)
    with pytest.raises(darktrt.DarktrtError, match="no room"):
        darktrt.calibrate("portable.onnx", ["in"], "my.table", OPTIONS, plot="page.png")
    assert set(files_in(folder)) - set(before) == {"my.npz"}


@pytest.mark.parametrize("failure", [*FAILURES, ("darktrt.calib.histogram", "HistogramSet.save", 0)], ids=str)
def test_a_merge_that_fails_leaves_nothing(
    labelled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, failure: tuple[str, str, int]
) -> None:
    shutil.copy(labelled / "my.npz", "shard.npz")
    module, name, calls = failure
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    _fail_after(monkeypatch, getattr(owner, owners[0]) if owners else owner, name, calls)
    with pytest.raises(darktrt.DarktrtError, match="no room"):
        darktrt.merge_calibrations(["shard.npz"], "merged.table", plot="page.png")
    assert files_in(folder) == ["shard.npz"]


def test_a_merge_that_fails_keeps_histograms_that_are_its_input(
    labelled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(labelled / "my.npz", "my.npz")
    _fail_after(monkeypatch, importlib.import_module("darktrt.calib.summary"), "summary", 0)
    with pytest.raises(darktrt.DarktrtError, match="no room"):
        darktrt.merge_calibrations(["my.npz"], "my.table")
    assert files_in(folder) == ["my.npz"]


def test_a_merge_of_a_damaged_file_or_of_one_without_tensors_leaves_nothing(labelled: Path, folder: Path) -> None:
    shutil.copy(labelled / "my.npz", "good.npz")
    Path("bad.npz").write_bytes(Path("good.npz").read_bytes()[:-700])
    HistogramSet("aa").save("empty.npz")
    before = files_in(folder)
    for shards, sentence in (
        (["good.npz", "bad.npz"], r"bad\.npz: is damaged"),
        (["empty.npz"], "there are no histograms to choose scales from"),
    ):
        with pytest.raises(darktrt.DarktrtError, match=sentence):
            darktrt.merge_calibrations(shards, "merged.table")
        assert files_in(folder) == before


def test_the_sample_of_a_later_pass_is_spread_over_the_images() -> None:
    paths = [Path(str(i)) for i in range(7)]
    for number, chosen in ((1, [0]), (2, [0, 4]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, range(7)), (64, range(7))):
        assert _every_nth(paths, number) == [paths[i] for i in chosen]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_an_engine_from_a_calibration_in_memory_or_in_its_file(made: Made, images: Path) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    calibration = darktrt.calibrate("portable.onnx", ["in"], "my.table", OPTIONS)
    options = darktrt.BuildOptions(target="rtx")
    manifests = [
        darktrt.build_engine("portable.onnx", f"{name}.plan", options, precision="int8", calibration=given)
        for name, given in (("memory", calibration), ("file", "my.table"), ("path", Path("my.table")))
    ]
    assert len({(m.precision, m.int8_convolutions, m.corrected_biases, m.calibration_sha256) for m in manifests}) == 1
    assert manifests[0].int8_convolutions


REFUSED = {
    "precision": ({"calibration": "my.table"}, "of no use to an engine in fp16"),
    "calibration_images": ({"precision": "int8", "calibration": "my.table", "calibration_images": ["in"]}, "not from both"),
    "calibration": ({"precision": "int8", "budget": darktrt.DropBudget(0.01, ["in"])}, "name one"),
}


@pytest.mark.parametrize("argument", REFUSED)
def test_refusals_name_arguments_and_no_options(argument: str, folder: Path) -> None:
    arguments, text = REFUSED[argument]
    with pytest.raises(darktrt.DarktrtError, match=text) as refused:
        darktrt.build_engine("portable.onnx", "my.plan", **arguments)  # type: ignore[arg-type]
    assert refused.value.argument == argument and "--" not in str(refused.value)
    assert files_in(folder) == []


def test_warnings_reach_the_logger(made: Made, images: Path, caplog: pytest.LogCaptureFixture) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    with caplog.at_level(logging.WARNING, "darktrt"):
        darktrt.calibrate("portable.onnx", ["in"], "my.table", OPTIONS)
    assert any("4 images are few" in record.getMessage() for record in caplog.records)


def test_a_model_that_is_none(folder: Path) -> None:
    with pytest.raises(darktrt.DarktrtError, match=r"none\.onnx: cannot read"):
        darktrt.Detector.open("none.onnx")
    with pytest.raises(darktrt.DarktrtError, match="there is no model to run"):
        darktrt.evaluate([], "val.json")
    with pytest.raises(AttributeError, match="'darktrt' has no attribute 'convert_yolo'"):
        _ = darktrt.convert_yolo  # type: ignore[attr-defined]


def test_every_public_name_is_there() -> None:
    assert set(darktrt.__all__) <= set(dir(darktrt))
    assert all(getattr(darktrt, name) is not None for name in darktrt.__all__)


def test_importing_the_package_loads_no_library() -> None:
    code = "import sys, darktrt; print(*{'torch', 'numpy', 'onnx', 'PIL', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_onnx_file_needs_images_on_the_cpu(made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    with darktrt.Detector.open("portable.onnx", decoder="auto"):
        pass
    with pytest.raises(darktrt.DarktrtError, match="needs images there; decode them on it") as caught:
        darktrt.Detector.open("portable.onnx", decoder="gpu")
    assert caught.value.argument == "decoder"
    assert main(["detect", "a.jpg", "--model", "portable.onnx", "--decoder", "gpu"]) == 2
    assert "needs images there; decode them on it [--decoder]" in capsys.readouterr().err


def test_arrays_of_another_kind_are_refused(made: Made, folder: Path) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    with darktrt.Detector.open("portable.onnx") as detector, pytest.raises(darktrt.DarktrtError):
        detector.detect([np.zeros((10, 10), np.uint8)])
