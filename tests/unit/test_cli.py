"""The command line: help, the whole chain over files, what is printed where, and exit statuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from helpers import MADE_CFG, ROOT, Made, files_in, made_image, net, section
from PIL import Image

import cli
from cli import main
from convert import zoo
from darktrt import __version__

COMMANDS = ["fetch", "convert", "surgery", "engine", "detect", "inspect", "doctor"]


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
            assert cli._parser().parse_args(words).command == command


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
def pictures(folder: Path) -> Path:
    """A folder ``in`` of three pictures in the current one."""
    (folder / "in").mkdir()
    for i in range(3):
        Image.fromarray(made_image(120 + 20 * i, 150, seed=i)).save(folder / f"in/{i}.png")
    return folder


def test_the_whole_chain(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert out == "portable.onnx: 6 Mish replaced, 2 heads decoded by one node, 3 function bodies\n"
    out, _ = said(capsys, "inspect", "portable.onnx")
    assert "cat, dog, cow" in out
    out, err = said(capsys, "detect", "in", "--model", "portable.onnx", "--score-threshold", 0.02, "-o", "found")
    assert err == "drawn: found\n"
    assert [line for line in out.splitlines() if line.startswith("in/")] == ["in/0.png", "in/1.png", "in/2.png"]
    assert out.count("class  score      x1      y1      x2      y2") == 3
    assert files_in(pictures / "found") == ["0.png", "1.png", "2.png"]
    assert not [name for name in files_in(pictures) if Path(name).name.startswith(".")]


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


def test_json_lines(made: Made, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "surgery", made.plain, "-o", "portable.onnx")
    out, err = said(capsys, "detect", "in", "--model", "portable.onnx", "--json", "--score-threshold", 0.05)
    assert err == ""
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["file"] for record in records] == ["in/0.png", "in/1.png", "in/2.png"]
    found = records[0]["detections"]
    assert found
    assert set(found[0]) == {"class", "class_id", "score", "box"}
    assert [d["score"] for d in found] == sorted((d["score"] for d in found), reverse=True)


def test_every_form_of_model_detects_the_same(made: Made, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain, decoded and with NMS, float input: the same boxes; with bytes the pixels are rounded first."""
    forms = {"nms": [], "decode": ["--head", "decode"], "native": ["--mish", "native"]}
    results = {}
    for name, options in forms.items():
        said(capsys, "surgery", made.plain, "-o", f"{name}.onnx", "--input", "float", *options)
    (pictures / "plain.onnx").write_bytes(made.plain.read_bytes())
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


def test_letterboxed_networks_detect(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    out, _ = said(capsys, "surgery", made.plain, "-o", "a.onnx", "--activation", "leaky", "--head", "raw")
    assert out == "a.onnx: 6 Mish replaced by leaky, 0 heads decoded by one node, 0 function bodies\n"


def test_fetch_prints_the_files(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.MODELS["yolov4-tiny"]
    monkeypatch.setitem(zoo.MODELS, "yolov4-tiny", zoo.Model(model.cfg, zoo.Asset("coco.names"), model.names))
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

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert said(capsys, "doctor", status=130)[1] == "darktrt doctor: interrupted\n"


def test_bugs_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_doctor", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_the_command_runs_as_a_program(folder: Path) -> None:
    Path("a.cfg").write_text(net() + section("region"))
    done = subprocess.run([sys.executable, ROOT / "cli.py", "inspect", "a.cfg"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("darktrt inspect: a.cfg:6: [region] is the head of YOLOv2")
    assert done.stderr.count("\n") == 1
