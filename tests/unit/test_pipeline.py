"""The Python API: from darknet files to an evaluated engine, its refusals, and what it prints, which is nothing."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, Made, files_in, made_image
from PIL import Image

import darktrt
from darktrt.calib.file import read_calibration
from darktrt.calib.options import CalibrationSettings
from darktrt.cli import main
from darktrt.pipeline import load_calibration


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
    calibration = darktrt.calibrate("portable.onnx", [labelled / "others"], "my.calib", OPTIONS)
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


def test_calibration_is_that_of_the_command(made: Made, images: Path) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    calibration = darktrt.calibrate("portable.onnx", ["in"], "api.calib", OPTIONS)
    assert main(["calib", "run", "portable.onnx", "in", "-o", "cli.calib", "--bias-images", "2", "--fp-layer-images", "1"]) == 0
    assert Path("api.calib").read_bytes() == Path("cli.calib").read_bytes()
    assert load_calibration("cli.calib").fp_layers == calibration.fp_layers
    darktrt.merge_calibrations(["api.calib"], "merged.calib")
    assert Path("merged.calib").read_bytes() == Path("cli.calib").read_bytes()
    darktrt.calibrate("portable.onnx", ["in/0.png"], "one.calib", OPTIONS)
    with pytest.raises(darktrt.DarktrtError, match=r"1 images were counted on both sides, first 'in/0\.png'"):
        darktrt.merge_calibrations(["api.calib", "one.calib"], "merged.calib")


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
    ("darktrt.archives", "zipfile.ZipFile", 0),
    ("darktrt.calib.merge", "choose_thresholds", 0),
]
MEASURING = [
    ("darktrt.calib.channel_means", "trunk_of", 0),
    ("darktrt.check.sensitivity", "operations", 0),
    ("darktrt.calib.file", "write_calibration", 1),
]


@pytest.mark.parametrize("failure", [FAILURES[0], FAILURES[2], *MEASURING], ids=str)
def test_a_calibration_that_fails_leaves_only_counts_to_resume_from(
    made: Made, images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, failure: tuple[str, str, int]
) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    before = files_in(folder)
    with monkeypatch.context() as patch:
        _fail(patch, failure)
        with pytest.raises(darktrt.DarktrtError, match="no room"):
            darktrt.calibrate("portable.onnx", ["in"], "my.calib", OPTIONS)
    assert set(files_in(folder)) - set(before) == {"my.calib.partial"}
    darktrt.calibrate("portable.onnx", ["in"], "my.calib", replace(OPTIONS, resume=True))
    assert set(files_in(folder)) - set(before) == {"my.calib"}


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_merge_that_fails_leaves_nothing(
    labelled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, failure: tuple[str, str, int]
) -> None:
    shutil.copy(labelled / "my.calib", "shard.calib")
    with monkeypatch.context() as patch:
        _fail(patch, failure)
        with pytest.raises(darktrt.DarktrtError, match="no room"):
            darktrt.merge_calibrations(["shard.calib"], "merged.calib")
    assert files_in(folder) == ["shard.calib"]


def _fail(monkeypatch: pytest.MonkeyPatch, failure: tuple[str, str, int]) -> None:
    module, name, calls = failure
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    _fail_after(monkeypatch, getattr(owner, owners[0]) if owners else owner, name, calls)


def test_a_merge_that_cannot_be_is_refused(made: Made, labelled: Path, images: Path, folder: Path) -> None:
    shutil.copy(labelled / "my.calib", "good.calib")
    Path("bad.calib").write_bytes(Path("good.calib").read_bytes()[:-700])
    darktrt.insert_plugins(made.plain, "raw.onnx", darktrt.SurgeryOptions(head="raw"))
    darktrt.calibrate("raw.onnx", ["in"], "raw.calib", OPTIONS)
    before = files_in(folder)
    for names, sentence, argument in (
        ([], "there is nothing to merge", "calibrations"),
        (["good.calib", "bad.calib"], r"bad\.calib: is damaged", None),
        (["good.calib", "raw.calib"], "different models do not merge", None),
        (["good.calib", "good.calib", "good.calib"], r"good\.calib: is given twice", None),
    ):
        with pytest.raises(darktrt.DarktrtError, match=sentence) as raised:
            darktrt.merge_calibrations(names, "merged.calib" if argument or "twice" not in sentence else "good.calib")
        assert raised.value.argument == argument
    with pytest.raises(darktrt.DarktrtError, match=r"raw\.onnx: is not the model that was calibrated") as raised:
        darktrt.merge_calibrations(["good.calib"], "merged.calib", model="raw.onnx")
    assert raised.value.argument == "model"
    assert files_in(folder) == before


def test_calibrations_with_different_settings_merge_where_one_is_chosen(labelled: Path, folder: Path) -> None:
    model, paths = labelled / "net.onnx", sorted((labelled / "others").iterdir())
    darktrt.calibrate(model, paths[:2], "a.calib", replace(OPTIONS, limit=1, method="minmax"))
    darktrt.calibrate(model, paths[2:], "b.calib", OPTIONS)
    with pytest.raises(
        darktrt.DarktrtError, match=r"of method, a\.calib was made with minmax, b\.calib with auto; choose one"
    ) as raised:
        darktrt.merge_calibrations(["a.calib", "b.calib"], "both.calib")
    assert raised.value.argument == "method"
    darktrt.merge_calibrations(["a.calib", "b.calib"], "both.calib", method="mse")
    settings = read_calibration("both.calib").settings
    assert settings == CalibrationSettings(None, 0, "mse", 99.99, 2, 1)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_an_engine_from_a_calibration_in_memory_or_in_its_file(made: Made, images: Path) -> None:
    darktrt.insert_plugins(made.plain, "portable.onnx")
    calibration = darktrt.calibrate("portable.onnx", ["in"], "my.calib", OPTIONS)
    options = darktrt.BuildOptions(target="rtx")
    manifests = [
        darktrt.build_engine("portable.onnx", f"{name}.plan", options, precision="int8", calibration=given)
        for name, given in (("memory", calibration), ("file", "my.calib"), ("path", Path("my.calib")))
    ]
    assert len({(m.precision, m.int8_convolutions, m.corrected_biases, m.calibration_sha256) for m in manifests}) == 1
    assert manifests[0].int8_convolutions


REFUSED = {
    "precision": ({"calibration": "my.calib"}, "of no use to an engine in fp16"),
    "calibration_images": ({"precision": "int8", "calibration": "my.calib", "calibration_images": ["in"]}, "not from both"),
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
        darktrt.calibrate("portable.onnx", ["in"], "my.calib", OPTIONS)
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
