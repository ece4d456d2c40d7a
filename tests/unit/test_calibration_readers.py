"""What reads a calibration file: it is known by its content, and what does not fit is told in one sentence."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Made, files_in

import darktrt
from darktrt.calib.channel_means import MeasuredMeans
from darktrt.calib.file import CalibrationFile, read_calibration, write_calibration
from darktrt.cli import main

READERS = {
    "engine": "engine net.onnx -o x.plan --precision int8 --target rtx --calibration {}",
    "surgery": "surgery plain.onnx -o x.onnx --qdq --calibration {}",
    "check map": "check map photos --model net.onnx --simulate int8 --calibration {}",
    "check compare": "check compare photos --model net.onnx --simulate int8 --calibration {}",
    "check report": "check report photos --model net.onnx -o x --calibration {}",
    "calib sensitivity": "calib sensitivity net.onnx photos --json x.json --calibration {}",
    "calib export": "calib export {} -o x.cache",
    "calib merge": "calib merge {} -o x.calib",
    "calib show": "calib show {} --plot x.png",
}
NEED_SCALES = [name for name in READERS if name not in ("calib merge", "calib show")]
"""The others read what a TensorRT cache lacks."""

NEITHER, DAMAGED = "is neither a calibration of darktrt nor a TensorRT calibration cache; name ", "is damaged ("
OWN = '"darktrt calibration 2"'
LATER = f"is of version 27 of calibration files, and this darktrt ({darktrt.__version__}) reads version 2; update darktrt"


def edited(path: Path, old: str, new: str) -> bytes:
    """A calibration with another text in its JSON."""
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    text = parts["calibration.json"].decode()
    assert old in text
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in {**parts, "calibration.json": text.replace(old, new).encode()}.items():
            target.writestr(name, content)
    return made.getvalue()


def counted(contents: CalibrationFile) -> CalibrationFile:
    """As a run has it that is under way."""
    return replace(contents, choices={}, means=MeasuredMeans(), noise=None)


def of_other_weights(contents: CalibrationFile) -> CalibrationFile:
    sources = {**contents.network.sources, "weights": "ab" * 32}
    return replace(contents, network=replace(contents.network, sources=sources))


@pytest.fixture
def place(labelled: Path, made: Made, folder: Path) -> Path:
    """A network, labelled images, and a calibration for it, in the current folder."""
    for name in ("net.onnx", "photos", "my.calib"):
        (folder / name).symlink_to(labelled / name)
    (folder / "plain.onnx").symlink_to(made.plain)
    return folder


Spoil = Callable[[Path], bytes]
BAD: dict[str, tuple[Spoil, str, str]] = {
    "cut": (lambda path: path.read_bytes()[:-100], DAMAGED, DAMAGED),
    "empty": (lambda path: b"", NEITHER, DAMAGED),
    "text": (
        lambda path: b"scales\n",
        "is neither a calibration of darktrt nor a TensorRT calibration cache; name ",
        "is damaged (",
    ),
    "a cache of nobody": (
        lambda path: b"TRT-8600\nx: 3f800000\n",
        "begins with 'TRT-8600', not with a header",
        "is a TensorRT",
    ),
    "of a later version": (lambda path: edited(path, OWN, '"darktrt calibration 27"'), LATER, LATER),
    "of something else": (
        lambda path: edited(path, OWN, '"their calibration 1"'),
        "is no calibration (",
        "is no calibration (",
    ),
}
"""What makes the file of one that is sound; what those say that take caches too, and what the others say."""


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_read(place: Path, capsys: pytest.CaptureFixture[str], reader: str, name: str) -> None:
    spoil, said, other = BAD[name]
    (place / "bad").write_bytes(spoil(place / "my.calib"))
    refused(place, capsys, reader, "bad", f"bad: {said if reader in NEED_SCALES else other}")


def refused(place: Path, capsys: pytest.CaptureFixture[str], reader: str, path: str, said: str) -> None:
    """The command ends with this sentence, and writes nothing."""
    if reader == "engine" and importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed (pip install tensorrt-rtx)")
    before = files_in(place)
    assert main(READERS[reader].format(path).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (sentence,) = (line for line in err.splitlines() if not line.startswith("warning: "))
    assert sentence.startswith(f"darktrt {reader}: {said}")
    assert files_in(place) == before


@pytest.mark.parametrize("reader", NEED_SCALES)
def test_counts_alone_are_no_scales(place: Path, capsys: pytest.CaptureFixture[str], reader: str) -> None:
    write_calibration(counted(read_calibration("my.calib")), "new.calib.partial")
    said = "new.calib.partial: has only counts, for the run that makes it has not ended; resume that run, or merge this file"
    refused(place, capsys, reader, "new.calib.partial", said)


@pytest.mark.parametrize("reader", [name for name in NEED_SCALES if name != "calib export"])
def test_a_calibration_of_other_weights_is_refused(place: Path, capsys: pytest.CaptureFixture[str], reader: str) -> None:
    """The tensors have the same names, so nothing else would tell."""
    write_calibration(of_other_weights(read_calibration("my.calib")), "other.calib")
    refused(place, capsys, reader, "other.calib", "the calibration is of a network with other weights (abababababababab")


@pytest.mark.parametrize("reader", ["calib merge", "calib show"])
def test_a_cache_has_nothing_to_merge_or_show(place: Path, capsys: pytest.CaptureFixture[str], reader: str) -> None:
    assert main(["calib", "export", "my.calib", "-o", "my.cache"]) == 0
    capsys.readouterr()
    refused(place, capsys, reader, "my.cache", "my.cache: is a TensorRT calibration cache, which has scales only; name a")


# --- what can be read ---


def quantized(path: str, capsys: pytest.CaptureFixture[str]) -> bytes:
    words = ["surgery", "plain.onnx", "-o", "x.onnx", "--qdq", "--calibration", path, "--fp-layers", "/layers.0/Conv"]
    assert main(words) == 0, capsys.readouterr().err
    return Path("x.onnx").read_bytes()


def test_files_are_known_by_their_content(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache gives the same model, as long as biases are not corrected."""
    assert main(["calib", "export", "my.calib", "-o", "my.cache"]) == 0
    shutil.copy("my.calib", "scales.cache")
    shutil.copy("my.cache", "scales.calib")
    Path("windows").write_bytes(b"\xef\xbb\xbf" + Path("my.cache").read_bytes().replace(b"\n", b"\r\n"))
    expected = quantized("my.calib", capsys)
    assert {quantized(name, capsys) for name in ("my.cache", "scales.cache", "scales.calib", "windows")} == {expected}


def test_what_is_not_measured_is_told_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = read_calibration("my.calib")
    lacking = replace(contents, settings=replace(contents.settings, bias_images=3), noise=None)
    write_calibration(lacking, "lacking.calib")
    options = "--simulate int8 --compare-images 1 --sensitivity-images 1 --show-images 0"
    command = f"check report photos --model net.onnx --calibration lacking.calib {options} -o report"
    assert main(command.split()) == 0
    err = capsys.readouterr().err
    assert err.count("lacking.calib: biases: measured on 0 of 3 images, floating-point layers: measured on 0 of 5 images") == 1
    assert json.loads(Path("report/report.json").read_text())["calibration"]["images"] == 5


def test_other_forms_of_the_network_take_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their ONNX files differ, their weights do not."""
    assert quantized("my.calib", capsys)
    assert main(["surgery", "plain.onnx", "-o", "image.onnx", "--input", "image", "--qdq", "--calibration", "my.calib"]) == 0
