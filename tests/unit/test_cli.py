"""The command line: help, the whole chain over files, what is printed where, and exit statuses."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import MADE_CFG, ROOT, Made, files_in, made_image, net, section
from onnx import numpy_helper
from PIL import Image

from darktrt import __version__
from darktrt.calib.samples import SAMPLES_WARNING
from darktrt.calib.table import CalibrationTable
from darktrt.cli import commands, main
from darktrt.convert import zoo
from darktrt.files import sha256_of

COMMANDS = ["fetch", "convert", "surgery", "calib", "engine", "detect", "inspect", "doctor"]


def said(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> tuple[str, str]:
    """What a command prints to stdout and stderr."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    examples = text.partition("examples:\n")[2].splitlines()
    assert examples
    assert all(f"darktrt {command}" in example for example in examples)


def test_examples_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """Every example is a command line that the parser takes."""
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        for example in capsys.readouterr().out.partition("examples:\n")[2].splitlines():
            words = example.partition("darktrt ")[2].partition(" > ")[0].split()
            if words[-1] != "--help":
                assert commands.parser().parse_args(words).command.partition(" ")[0] == command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"darktrt {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["convert"], ["surgery", "a.onnx"], ["engine", "a", "-o", "b", "--precision", "fp8"]]
)
def test_wrong_arguments_are_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.fixture
def images(folder: Path) -> Path:
    """A folder ``in`` of three images in the current one."""
    (folder / "in").mkdir()
    for i in range(3):
        Image.fromarray(made_image(120 + 20 * i, 150, seed=i)).save(folder / f"in/{i}.png")
    return folder


def test_the_whole_chain(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.cfg").write_text(MADE_CFG)
    Path("my.names").write_text("cat\ndog\ncow\n")
    out, _ = said(
        capsys,
        "convert",
        "my.cfg",
        "--random-weights",
        3,
        "--save-weights",
        "my.weights",
        "--names",
        "my.names",
        "-o",
        "drawn.onnx",
    )
    assert out.startswith("drawn.onnx: my, 96x64, 28,904 parameters, 6 Mish, 2 heads, 3 classes; ")
    out, _ = said(
        capsys,
        "convert",
        "my.cfg",
        "my.weights",
        "--names",
        "my.names",
        "--batch",
        "1..4",
        "--size",
        "96x64",
        "-o",
        "plain.onnx",
    )
    assert out.startswith("plain.onnx: my, 96x64")
    out, _ = said(capsys, "surgery", "plain.onnx", "-o", "portable.onnx")
    assert out == "portable.onnx: 6 Mish replaced, 2 heads decoded by one node, 2 function bodies\n"
    out, _ = said(capsys, "inspect", "portable.onnx")
    assert "cat, dog, cow" in out
    out, err = said(capsys, "detect", "in", "--model", "portable.onnx", "--score-threshold", 0.02, "-o", "found")
    assert err == (
        "warning: my: an image has 300 detections, as many as the model outputs, so others may be missing; run surgery again "
        "with a larger max_detections\ndrawn: found\n"
    )
    assert [line for line in out.splitlines() if line.startswith("in/")] == ["in/0.png", "in/1.png", "in/2.png"]
    assert out.count("class  score      x1      y1      x2      y2") == 3
    assert files_in(images / "found") == ["0.png", "1.png", "2.png"]
    assert not [name for name in files_in(images) if Path(name).name.startswith(".")]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
def test_an_engine(made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "surgery", made.plain, "-o", "portable.onnx")
    out, _ = said(capsys, "engine", "portable.onnx", "-o", "model.plan", "--target", "rtx")
    assert out.startswith("model.plan: FP16 for TensorRT for RTX 1.")
    assert files_in(folder) == ["model.json", "model.plan", "portable.onnx"]
    for file in ("model.plan", "model.json"):
        out, _ = said(capsys, "inspect", file)
        assert "FP16" in out
    copied = folder / "model.engine"
    copied.write_bytes(Path("model.plan").read_bytes())
    assert said(capsys, "inspect", copied)[0].startswith(f"engine        {copied}")


def test_json_lines(made: Made, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "surgery", made.plain, "-o", "portable.onnx")
    out, err = said(capsys, "detect", "in", "--model", "portable.onnx", "--json", "--score-threshold", 0.05)
    assert err == ""
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["file"] for record in records] == ["in/0.png", "in/1.png", "in/2.png"]
    found = records[0]["detections"]
    assert found
    assert set(found[0]) == {"class", "class_id", "score", "box"}
    assert [d["score"] for d in found] == sorted((d["score"] for d in found), reverse=True)


def test_every_form_of_model_detects_the_same(made: Made, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, decoded and with NMS, float input: the same boxes; with bytes the pixels are rounded first."""
    forms = {"nms": [], "decode": ["--head", "decode"], "native": ["--mish", "native"]}
    results = {}
    for name, options in forms.items():
        said(capsys, "surgery", made.plain, "-o", f"{name}.onnx", "--input", "float", *options)
    (images / "plain.onnx").write_bytes(made.plain.read_bytes())
    for name in (*forms, "plain"):
        out, _ = said(capsys, "detect", "in", "--model", f"{name}.onnx", "--json", "--score-threshold", 0.05)
        results[name] = [json.loads(line)["detections"] for line in out.splitlines()]
    expected = results.pop("nms")
    assert sum(map(len, expected)) > 5
    for found in results.values():
        assert [len(image) for image in found] == [len(image) for image in expected]
        for a, b in zip(chain.from_iterable(found), chain.from_iterable(expected), strict=True):
            assert (a["class"], a["score"]) == (b["class"], pytest.approx(b["score"], rel=1e-4))
            np.testing.assert_allclose(a["box"], b["box"], atol=0.01)


def test_letterboxed_networks_detect(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.cfg").write_text(net(96, 64, letter_box=1) + MADE_CFG.partition("\n\n")[2])
    said(capsys, "convert", "a.cfg", "--random-weights", 0, "-o", "plain.onnx")
    results = []
    for head in ("nms", "decode"):
        said(capsys, "surgery", "plain.onnx", "-o", f"{head}.onnx", "--head", head)
        out, _ = said(capsys, "detect", "in", "--model", f"{head}.onnx", "--json", "--score-threshold", 0.04)
        results.append([len(json.loads(line)["detections"]) for line in out.splitlines()])
    assert results[0] == results[1]
    assert sum(results[0]) > 5


def test_surgery_counts_what_it_did(made: Made, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "surgery", made.plain, "-o", "a.onnx", "--head", "raw")
    assert out == "a.onnx: 6 Mish replaced, 0 heads decoded by one node, 1 function bodies\n"


# --- calibration ---


@pytest.fixture
def samples(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two made images in the place of the samples, in the zoo's folder."""
    folder = tmp_path_factory.mktemp("zoo")
    for i, name in enumerate(("a.jpg", "b.jpg")):
        Image.fromarray(made_image(100, 130, seed=i)).save(folder / name)
    assets = tuple(zoo.Asset(path.name, sha256_of(path)) for path in sorted(folder.iterdir()))
    monkeypatch.setattr(zoo, "_SAMPLES", assets)
    monkeypatch.setenv("DARKTRT_ZOO", str(folder))


def test_calibration_without_data_takes_samples_and_warns(
    made: Made, folder: Path, samples: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    said(capsys, "surgery", made.plain, "-o", "portable.onnx")
    out, err = said(capsys, "calib", "run", "portable.onnx", "-o", "my.calib")
    assert out.startswith("network:   made, 96 x 64\nwarning:   made of two sample images, for trying out only\n")
    assert out.endswith("my.calib: scales of 25 tensors\n")
    assert "\nimages:    24\n" in out
    assert err.startswith(f"warning: {SAMPLES_WARNING}\n")
    assert len(list(Path("cache/darktrt/samples").iterdir())) == 26
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "my.calib", "portable.onnx"]
    before = Path("my.calib").read_bytes()
    out, err = said(capsys, "calib", "run", "portable.onnx", "-o", "my.calib", "--resume")
    assert "\nimages:    24\n" in out
    assert Path("my.calib").read_bytes() == before
    out, err = said(capsys, "calib", "run", "portable.onnx", "-o", "my.calib", "cache/darktrt/samples")
    assert SAMPLES_WARNING not in err
    assert "warning" not in out


def test_what_calibration_writes(made: Made, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "surgery", made.plain, "-o", "portable.onnx")
    before = files_in(images)
    out, _ = said(capsys, "calib", "run", "portable.onnx", "in", "-o", "a.calib", "--method", "percentile")
    assert set(files_in(images)) - set(before) == {"a.calib"}
    heading, _, _ = out.partition("\n\n")
    assert heading.splitlines() == [
        "network:   made, 96 x 64",
        f"SHA-256:   {sha256_of('portable.onnx')[:12]}",
        "images:    3",
        "method:    percentile 99.99",
        "biases: measured on 3 of 3 images",
        "floating-point layers: measured on 3 of 3 images",
    ]
    shown, _ = said(capsys, "calib", "show", "a.calib", "--plot", "a.png")
    assert out == f"{shown}a.calib: scales of 25 tensors\n"
    assert Path("a.png").is_file()
    values = json.loads(said(capsys, "calib", "show", "a.calib", "--json")[0])
    assert values["format"] == "darktrt calibration 2" and len(values["thresholds"]) == 25
    assert said(capsys, "calib", "export", "a.calib", "-o", "a.cache")[0] == "a.cache: scales of 25 tensors\n"
    scales = CalibrationTable.load("a.cache").scales
    assert {name: float(scale) for name, scale in scales.items()} == {
        name: threshold["scale"] for name, threshold in values["thresholds"].items()
    }
    nodes = [node for node in onnx.load("portable.onnx").graph.node if node.op_type == "MishPlugin"]
    pairs = [(scales[node.input[0]], scales[node.output[0]]) for node in nodes if node.output[0] in scales]
    assert [before for before, _ in pairs] == [behind for _, behind in pairs] != []


def test_shards_on_the_command_line(made: Made, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged, the calibration is that of one run, with what was measured where the model is named or a run goes on."""
    said(capsys, "surgery", made.plain, "-o", "portable.onnx")
    one, *others = sorted(Path("in").iterdir())
    run = ["calib", "run", "portable.onnx"]
    said(capsys, *run, "in", "-o", "whole.calib")
    for name, paths in (("first", [one]), ("second", others)):
        said(capsys, *run, *paths, "-o", f"{name}.calib", "--bias-images", "0", "--fp-layer-images", "0")
    merge = ["calib", "merge", "second.calib", "first.calib", "--bias-images", "64", "--fp-layer-images", "8", "-o"]
    out, err = said(capsys, *merge, "both.calib")
    assert "biases: measured on 0 of 3 images\nfloating-point layers: measured on 0 of 3 images\n" in out
    assert "warning: both.calib: biases: measured on 0 of 3 images, floating-point layers: measured on 0 of 3 images" in err
    for name in ("both", "whole"):
        said(capsys, "calib", "export", f"{name}.calib", "-o", f"{name}.cache")
    assert Path("both.cache").read_bytes() == Path("whole.cache").read_bytes()
    said(capsys, *merge, "measured.calib", "--model", "portable.onnx")
    assert Path("measured.calib").read_bytes() == Path("whole.calib").read_bytes()
    Path("in").rename("here")  # as if the shards had been counted on other machines
    out, _ = said(capsys, *run, "here", "-o", "both.calib", "--resume")
    assert "\nimages:    3\n" in out
    assert Path("both.calib").read_bytes() == Path("whole.calib").read_bytes()
    assert main(["calib", "merge", "first.calib", "second.calib", "-o", "first.calib"]) == 2
    assert "first.calib: is given twice" in capsys.readouterr().err
    said(capsys, *run, "here/1.png", "-o", "usual.calib")
    assert main(["calib", "merge", "first.calib", "usual.calib", "-o", "a.calib", "--bias-images", "1"]) == 2
    sentence = "of fp_layer_images, first.calib was made with 0, usual.calib with 8; choose one [--fp-layer-images]"
    assert sentence in capsys.readouterr().err


def test_a_tensor_that_is_always_zero(made: Made, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made.model()
    for constant in model.graph.initializer:
        if list(constant.dims)[:2] in ([8, 3], [8]):  # of the first convolution, and the bias of another
            constant.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(constant), constant.name))
    onnx.save(model, "plain.onnx")
    said(capsys, "surgery", "plain.onnx", "-o", "portable.onnx")
    out, _ = said(capsys, "calib", "run", "portable.onnx", "in", "-o", "a.calib", "--fp-layer-images", "0")
    assert [line.split()[0] for line in out.splitlines() if line.endswith("always zero")][:1] == ["/layers.0/Conv_output_0"]
    out, _ = said(capsys, "surgery", "plain.onnx", "-o", "qdq.onnx", "--qdq", "--calibration", "a.calib")
    assert "6 convolutions in INT8" in out


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_calibrates_with_and_without_data(tmp_path: Path) -> None:
    def calibrates(*words: str) -> str:
        command = ["make", "--dry-run", "--no-print-directory", f"OUT={tmp_path}", "PRECISION=int8", "engine", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if "darktrt calib " in line).partition("portable.onnx ")[2]

    output = f"-o {tmp_path}/yolov4-tiny/calibration.calib"
    assert calibrates("DATA=a b.json").split() == ["a", "b.json", *output.split()]
    assert calibrates().strip() == output
    (tmp_path / "yolov4-tiny").mkdir(exist_ok=True)
    (tmp_path / "yolov4-tiny/CALIB.options").write_text("c d\n")
    assert calibrates().split() == ["c", "d", *output.split()], "those of the last time"
    assert calibrates("DATA=a").split() == ["a", *output.split()]


def test_fetch_prints_the_files(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.MODELS["yolov4-tiny"]
    monkeypatch.setitem(zoo.MODELS, "yolov4-tiny", replace(model, weights=zoo.Asset("coco.names")))
    out, _ = said(capsys, "fetch", "yolov4-tiny", "-o", "networks")
    assert out.splitlines() == ["networks/yolov4-tiny.cfg", "networks/coco.names", "networks/coco.names"]


def test_inspect_and_doctor(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "inspect", made.cfg)[0].startswith("darknet cfg ")
    assert said(capsys, "inspect", made.weights)[0].startswith("darknet weights ")
    assert said(capsys, "inspect", made.plain)[0].startswith("ONNX ")
    assert "Python" in said(capsys, "doctor")[0]


def test_ctrl_c_is_status_130(made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.doctor, "_doctor", interrupted)
    assert said(capsys, "doctor", status=130)[1] == "darktrt doctor: interrupted\n"


INTERRUPTED = """
import sys
from darktrt.cli import commands, main

def interrupted(args):
    exec("raise KeyboardInterrupt")

commands.doctor._doctor = interrupted
sys.exit(main(["doctor"]))
"""


def test_ctrl_c_in_an_exec_is_status_130_too(tmp_path: Path) -> None:
    """Such as one of a dataclass, while a module is imported."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-m", "interrupted"], env=environment, capture_output=True, check=False)
    assert done.returncode == 130


def test_bugs_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(commands.doctor, "_doctor", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_the_command_runs_as_a_program(folder: Path) -> None:
    Path("a.cfg").write_text(net() + section("region"))
    done = subprocess.run([sys.executable, "-m", "darktrt", "inspect", "a.cfg"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("darktrt inspect: a.cfg:6: [region] needs 'softmax=1'")
    assert done.stderr.count("\n") == 1
