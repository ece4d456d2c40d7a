"""The output of inspect and doctor."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import MADE_CFG, MADE_MISH, Made, conv, gaussian, head, make, net, region, section, weights_bytes

from darktrt.convert.describe import describe_cfg, describe_weights
from darktrt.convert.zoo import MODELS
from darktrt.engine import doctor
from darktrt.engine.describe import describe_manifest, describe_onnx, describe_plan
from darktrt.engine.doctor import Finding, examine_machine, report
from darktrt.engine.manifest import Int8Cost, Manifest, manifest_path, read_manifest
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of
from darktrt.metadata import NmsInfo
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins


def fields(text: str) -> dict[str, str]:
    """The lines of a description by their first word; of several the last."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.split()}


# --- cfg and weights ---


def test_a_cfg(made: Made) -> None:
    text = describe_cfg(made.cfg)
    shown = fields(text)
    assert f"darknet cfg   {made.cfg}" in text
    assert shown["input"] == "96 x 64, 3 channels, stretched"
    assert shown["layers"] == "20: 9 convolutional, 5 route, 2 maxpool, 2 yolo, 1 shortcut, 1 upsample"
    assert shown["Mish"] == str(MADE_MISH)
    assert shown["parameters"] == f"{made.info.parameters:,}"
    assert shown["GFLOPs"] == f"{made.info.gflops:.3f}"
    assert (
        "head          layer 12, line 77: 6 x 4 cells, anchors 22x16 30x35 50x44, 3 classes, scale_x_y 1.05, greedynms NMS"
        in text
    )
    assert shown["8"] == "58 route of 7, 6 48 x 8 x 12" or "9     58  route            of 8, 7" in text


def test_every_layer_has_a_line_with_its_output(made: Made) -> None:
    table = describe_cfg(made.cfg).split("output\n")[1].splitlines()
    assert len(table) == 20
    lines = MADE_CFG.splitlines()
    for i, row in enumerate(table):
        index, line, kind = row.split()[:3]
        assert int(index) == i
        assert lines[int(line) - 1] == f"[{kind}]"
    assert table[0].split() == ["0", "6", "convolutional", "3x3/2", "mish", "8", "x", "32", "x", "48"]
    assert "group 1 of 2" in table[2]
    assert "3 + 2 linear" in table[4]


def test_rarer_things_in_a_cfg_are_reported(tmp_path: Path) -> None:
    text = net(letter_box=1) + section("convolutional", filters=6, size=3, stride_x=2, groups=3, activation="swish")
    text += conv(18, 1, normalize=0) + head(1, "2,3", new_coords=1, nms_kind="diounms", beta_nms=0.7)
    (tmp_path / "a.cfg").write_text(text)
    shown = describe_cfg(tmp_path / "a.cfg")
    assert "letterboxed" in shown
    assert "3x3/2x1 groups 3 swish" in shown
    assert "1 classes, new_coords, scale_x_y 1, diounms NMS, beta 0.7" in shown


def test_a_region_in_words(tmp_path: Path) -> None:
    """Anchors in pixels, which are cells in the cfg."""
    (tmp_path / "a.cfg").write_text(net(96, 64) + conv(8, stride=4) + region(4))
    said = "24 x 16 cells, anchors 2.28x2.72 7.48x8.24, 4 classes, softmax, scale_x_y 1"
    assert f"head          layer 2, line 22: {said}, plain NMS" in describe_cfg(tmp_path / "a.cfg")
    (tmp_path / "b.cfg").write_text(net(96, 64) + conv(8, stride=4) + gaussian(2))
    assert "anchors 6x9 11x8, 2 classes, uncertainties, scale_x_y 1.1, plain NMS" in describe_cfg(tmp_path / "b.cfg")
    made = make(tmp_path, net(96, 64) + conv(8, stride=4) + region(4))
    assert f"head          head0_raw, cfg line 22: {said}\n" in describe_onnx(made.plain)


def test_the_layers_of_a_cfg_in_words(tmp_path: Path) -> None:
    uneven = section("convolutional", filters=8, size=3, stride_x=2, stride_y=1, groups=4, pad=1, activation="leaky")
    text = net(96, 64) + conv(8, stride=2) + uneven + section("route", layers=-1, groups=2, group_id=1)
    text += section("route", layers="-1,1") + section("shortcut", **{"from": -1, "activation": "swish"})
    (tmp_path / "a.cfg").write_text(text + head(2, "1", nms_kind="diounms", beta_nms=0.7, new_coords=1))
    assert describe_cfg(tmp_path / "a.cfg").splitlines()[1:] == [
        "input         96 x 64, 3 channels, stretched",
        "layers        7: 3 convolutional, 2 route, 1 shortcut, 1 yolo",
        "Mish          1",
        "parameters    491",
        "GFLOPs        0.001",
        "head          layer 6, line 43: 24 x 32 cells, anchors 11x8, 2 classes, new_coords, scale_x_y 1, "
        "diounms NMS, beta 0.7",
        "",
        "layer   line  kind             what                               output",
        "    0      6  convolutional    3x3/2 mish                         8 x 32 x 48",
        "    1     14  convolutional    3x3/2x1 groups 4 leaky             8 x 32 x 24",
        "    2     23  route            of 1 group 1 of 2                  4 x 32 x 24",
        "    3     28  route            of 2, 1                            12 x 32 x 24",
        "    4     31  shortcut         3 + 3 swish                        12 x 32 x 24",
        "    5     35  convolutional    1x1/1 linear                       7 x 32 x 24",
        "    6     43  yolo                                                7 x 32 x 24",
    ]


def test_rare_sections_of_a_cfg_in_words(tmp_path: Path) -> None:
    text = net(96, 64) + conv(8, stride=2, antialiasing=1) + conv(8, xnor=1) + conv(8, share_index=-1, binary=1)
    text += section("maxpool", size=2, antialiasing=2) + section("maxpool", maxpool_depth=1, out_channels=4)
    text += section("activation", activation="elu") + section("batchnorm") + section("route_lhalf", layers="-1,-2")
    (tmp_path / "a.cfg").write_text(text + head())
    rows = describe_cfg(tmp_path / "a.cfg").split("output\n")[1].splitlines()
    assert [row[31:65].strip() for row in rows] == [
        "3x3/2 mish blurred 3x3",
        "3x3/1 mish binary",
        "3x3/1 mish binary weights of 1",
        "blurred 2x2",
        "to 4 channels",
        "elu",
        "",
        "of 6, 5 group 0 of 2",
        "1x1/1 linear",
        "",
    ]


def test_the_size_of_weights_is_in_mebibytes(tmp_path: Path) -> None:
    (tmp_path / "a.weights").write_bytes(weights_bytes(np.zeros(300_000)))
    assert "parameters       300,000 (1.1 MiB)" in describe_weights(tmp_path / "a.weights")


@pytest.mark.parametrize(
    ("version", "seen", "shown"),
    [((0, 2, 5), 32013312, "32,013,312"), ((0, 1, 0), 5000, "5,000"), ((0, 2, 5), 2**40, "1,099,511,627,776")],
)
def test_weights(tmp_path: Path, version: tuple[int, int, int], seen: int, shown: str) -> None:
    file = tmp_path / "a.weights"
    file.write_bytes(weights_bytes(np.zeros(1234), version, seen))
    text = describe_weights(file)
    assert f"version          {'.'.join(map(str, version))}" in text
    assert f"images seen      {shown} in training" in text
    assert "parameters       1,234 (0.0 MiB)" in text
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert "official" not in text


def test_official_weights_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.weights"
    file.write_bytes(weights_bytes(np.zeros(3)))
    model = MODELS["yolov4-tiny"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    weights = type(model.weights)(model.weights.name, digest, model.weights.url)
    monkeypatch.setitem(MODELS, "yolov4-tiny", replace(model, weights=weights))
    assert "(the official yolov4-tiny)" in describe_weights(file)


# --- ONNX, plans, manifests ---


def test_a_plain_onnx(made: Made) -> None:
    text = describe_onnx(made.plain)
    shown = fields(text)
    assert shown["input"] == "images float (batch, 3, 64, 96)"
    assert "output        boxes float (batch, 360, 4)" in text
    assert shown["output"] == "scores float (batch, 360, 3)"
    assert "opset ai.onnx 17" in text
    assert shown["bodies"] == "none"
    assert "plugin nodes  none" in text
    assert shown["network"] == f"made: 20 cfg layers, {made.info.parameters:,} parameters, {made.info.gflops:.3f} GFLOPs"
    assert shown["images"] == "96 x 64, 3 channels, float, stretch, batch 1 to 3"
    assert "ends at       decoded" in text
    assert shown["classes"] == "class 0, class 1, class 2"
    assert shown["weights"] == "random, seed 1"
    assert shown["cfg"].startswith("sha256 ")


def test_a_portable_onnx(made: Made, tmp_path: Path) -> None:
    insert_plugins(made.plain, tmp_path / "a.onnx", SurgeryOptions(max_detections=20))
    text = describe_onnx(tmp_path / "a.onnx")
    assert f"plugin nodes  {MADE_MISH} MishPlugin, 1 YoloDetectPlugin" in text
    assert "bodies        MishPlugin, YoloDetectPlugin" in text
    assert f"{MADE_MISH} darktrt.MishPlugin" in text
    assert f"Mish          {MADE_MISH}, --mish auto" in text
    assert "darktrt 1" in text
    assert "ends at       nms: greedynms NMS, at most 20 detections" in text
    assert "input         images uint8 (batch, 64, 96, 3)" in text
    assert "output        classes int32 (batch, 20)" in text


def test_a_plan_by_its_manifest(made: Made, tmp_path: Path) -> None:
    plan = tmp_path / "fp16.plan"
    plan.write_bytes(b"a plan")
    digest = hashlib.sha256(b"a plan").hexdigest()
    manifest = Manifest(digest, "0" * 64, "TensorRT 10.3.0", "NVIDIA L4", "fp16", ("MishPlugin:1",), 12.5, made.info)
    manifest_path(plan).write_text(manifest.to_json())
    text = describe_plan(plan)
    assert text.startswith(f"engine        {plan} (0.0 MiB)\nmanifest      {tmp_path}/fp16.json\n")
    assert "built by      TensorRT 10.3.0, FP16, in 12.5 s, on NVIDIA L4" in text
    assert "plugins       MishPlugin:1" in text
    assert f"plan          sha256 {digest}" in text
    assert text.endswith(describe_manifest(manifest_path(plan), read_manifest(manifest_path(plan))))
    plan.write_bytes(b"changed")
    with pytest.raises(DarktrtError, match="is not the plan"):
        describe_plan(plan)


def test_a_manifest_that_has_everything(made: Made) -> None:
    """Line by line, as it is printed."""
    info = replace(
        made.info,
        head="nms",
        input="image",
        resize="letterbox",
        batch=(1, 4, 8),
        image_sizes=((32, 24), (640, 480), (1920, 1080)),
        nms=NmsInfo("diounms", 0.7),
        max_detections=20,
        mish="fused",
        fixed_thresholds=(0.3, 0.5),
        heads=tuple(replace(head, classes=7) for head in made.info.heads),
        class_names=tuple("abcdefg"),
        sources={"cfg": "ab" * 32, "weights": "random, seed 1"},
    )
    cost = Int8Cost("AP", 0.0123, 0.02, "val.json", 0.4321, 0.6543)
    manifest = Manifest(
        "cd" * 32, "ef" * 32, "TensorRT 10.3.0", None, "int8", ("MishPlugin:1", "FitPlugin:1"), 12.5, info,
        int8_convolutions=("a",), other_convolutions={"b": "left in FP16"}, int8_cost=cost,
        plugin_library={"tensorrt": "10.3.0", "sha256": "01" * 32},
    )  # fmt: skip
    assert describe_manifest("x.json", manifest).splitlines() == [
        "manifest      x.json",
        "built by      TensorRT 10.3.0, INT8, in 12.5 s, without a GPU",
        "plugins       MishPlugin:1, FitPlugin:1",
        f"from library  sha256 {'01' * 32}",
        "from library  tensorrt 10.3.0",
        f"plan          sha256 {'cd' * 32}",
        f"from ONNX     sha256 {'ef' * 32}",
        "INT8          1 of 2 convolutions run in INT8; left in FP16: b",
        "INT8 costs    AP drop 0.0123 (at most 0.02); AP 0.4321, AP50 0.6543, in ONNX Runtime on val.json",
        f"network       made: 20 cfg layers, {info.parameters:,} parameters, {info.gflops:.3f} GFLOPs",
        "images        32 x 24 to 1920 x 1080, usually 640 x 480, fitted into "
        "96 x 64, 3 channels, image, letterbox, batch 1 to 8",
        "Mish          6, --mish fused",
        "head          head0_raw, cfg line 77: 6 x 4 cells, anchors 22x16 30x35 50x44, 7 classes, scale_x_y 1.05",
        "head          head1_raw, cfg line 119: 12 x 8 cells, anchors 6x9 11x8 14x20, 7 classes, scale_x_y 1.1",
        "ends at       nms: diounms NMS, beta 0.7, at most 20 detections, thresholds fixed at 0.3 and 0.5",
        "classes       a, b, c, d, e, f, ...",
        f"cfg           sha256 {'ab' * 32}",
        "weights       random, seed 1",
    ]


def test_a_manifest_that_has_little(made: Made) -> None:
    """A network of one batch and six classes that ends in its heads, without Mish, in FP16."""
    new_coords = replace(made.info.heads[0], new_coords=True, classes=6)
    few = {"head": "raw", "batch": (2, 2, 2), "mish_count": 0, "heads": (new_coords,), "class_names": tuple("abcdef")}
    manifest = Manifest("", "", "TensorRT 8.6.0", "NVIDIA L4", "fp16", (), 3, replace(made.info, sources={}, **few))
    lines = describe_manifest("x.json", manifest).splitlines()
    assert lines[1:3] == ["built by      TensorRT 8.6.0, FP16, in 3 s, on NVIDIA L4", "plugins       none needed"]
    assert "INT8          no convolutions" in lines and not any("library" in line or "costs" in line for line in lines)
    assert lines[-5:] == [
        "images        96 x 64, 3 channels, float, stretch, batch 2",
        "Mish          0",
        "head          head0_raw, cfg line 77: 6 x 4 cells, anchors 22x16 30x35 50x44, 6 classes, new_coords, scale_x_y 1.05",
        "ends at       raw",
        "classes       a, b, c, d, e, f",
    ]


def test_a_manifest_is_a_file_for_people_too(made: Made) -> None:
    """A line a field, in the order of the alphabet, so that two of them can be compared; TF32 is on unless it is said."""
    manifest = Manifest("ab", "cd", "TensorRT 8.6.0", None, "fp32", (), 1.0, made.info)
    lines = manifest.to_json().splitlines()
    assert (lines[0], lines[-1]) == ("{", "}") and manifest.to_json().endswith("}\n")
    names = [line[3:].partition('"')[0] for line in lines if line.startswith('  "')]
    assert names == sorted(names) and {"plan_sha256", "info", "tf32"} <= set(names)
    assert '  "tf32": true,' in lines and '  "hardware_compatible": false,' in lines and '  "format": 1,' in lines
    assert '  "version_compatible": false' in lines and '  "compute_capability": 0,' in lines


def test_int8_costs_without_labels() -> None:
    assert str(Int8Cost("scores", 0.5, 1.0, "photos")) == ("change of the scores 0.5000 (at most 1), in ONNX Runtime on photos")


def test_the_size_of_a_plan_is_in_mebibytes(made: Made, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(bytes(3 << 20))
    manifest = Manifest(sha256_of(plan), "0" * 64, "TensorRT 10.3.0", None, "fp16", (), 1.0, made.info)
    manifest_path(plan).write_text(manifest.to_json())
    assert describe_plan(plan).startswith(f"engine        {plan} (3.0 MiB)\n")
    with made.plain.open("rb") as file:
        size = len(file.read()) / 2**20
    assert describe_onnx(made.plain).startswith(f"ONNX          {made.plain} (opset ai.onnx 17; {size:.1f} MiB)\n")


def test_constants_and_operators_are_counted(made: Made) -> None:
    text = describe_onnx(made.plain)
    model = made.model()
    counted = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert f"constants     {counted:,} numbers" in text and "INT8          no convolutions" in text
    nodes = fields(text)["nodes"]
    assert nodes.startswith(f"{len(model.graph.node)}: ") and "9 Conv" in nodes
    counts = [int(part.split()[0]) for part in nodes.partition(": ")[2].split(", ")]
    assert sum(counts) == len(model.graph.node) and counts == sorted(counts, reverse=True)


# --- doctor ---


def test_a_machine_that_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "gpu_name", lambda: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_INCLUDE_FOLDERS", ())
    monkeypatch.setattr(doctor, "find_library", lambda: None)
    monkeypatch.delenv("TENSORRT_INCLUDE", raising=False)
    findings = examine_machine()
    assert [f.name for f in findings if f.found] == ["Python"]
    text = report(findings)
    assert len(text.splitlines()) == len(findings) == 14
    for finding in findings[1:]:
        assert f"--  {finding.name:<18} not found; would allow " in text
    assert "pip install 'darktrt[rtx]'" in text


def test_a_machine_that_has_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "NvInfer.h").write_text("")
    monkeypatch.setenv("TENSORRT_INCLUDE", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=f"{name}/__init__.py"))
    monkeypatch.setattr(doctor, "gpu_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/opt/nvcc")
    answer = subprocess.CompletedProcess([], 0, "nvcc: NVIDIA\nCuda compilation tools, release 12.6, V12.6.20\n", "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    found = {f.name: f.found for f in examine_machine()}
    assert found.pop("Python") == platform.python_version()
    assert found["nvcc"] == "/opt/nvcc (12.6)"
    assert found["GPU"] == "NVIDIA L4"
    assert found["TensorRT headers"] == str(tmp_path)
    assert found["TensorRT"] == found["TensorRT for RTX"] == found["torch"] == "1.2.3"


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A machine with just these packages, by name; a test adds to them."""
    packages: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "gpu_name", lambda: None)
    monkeypatch.setattr(doctor, "_INCLUDE_FOLDERS", ())
    monkeypatch.setattr(doctor, "find_library", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TENSORRT_INCLUDE", raising=False)
    return packages


def found(name: str) -> str:
    return next(finding.found for finding in examine_machine() if finding.name == name)


@pytest.mark.parametrize(
    ("prints", "shown"),
    [
        ("echo nvcc: NVIDIA; echo 'Cuda compilation tools, release 12.6, V12.6.20'", " (12.6)"),
        ("echo 'release 11.8, x'; exit 3", " (11.8)"),
        ("echo nothing known", ""),
    ],
)
def test_the_compiler_is_asked_for_its_release(nothing: dict[str, str], tmp_path: Path, prints: str, shown: str) -> None:
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho noise >&2\n{prints}\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert found("nvcc") == f"{tmp_path}/nvcc{shown}"


def test_a_compiler_that_is_missing(nothing: dict[str, str]) -> None:
    assert found("nvcc") == found("GPU") == found("TensorRT headers") == found("plugin library") == ""


@pytest.mark.parametrize("cuda", ["cu12", "cu13"])
def test_either_build_of_the_image_codec_will_do(nothing: dict[str, str], cuda: str) -> None:
    assert found("nvImageCodec") == ""
    nothing[f"nvidia-nvimgcodec-{cuda}"] = "0.6.0"
    assert found("nvImageCodec") == "0.6.0"


def test_a_tensorrt_that_no_package_owns_is_found(nothing: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NVIDIA's containers."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="x") if name == "tensorrt" else None)
    assert (found("TensorRT"), found("TensorRT for RTX")) == ("installed, of unknown version", "")
    nothing["tensorrt"] = "10.3.0"
    assert found("TensorRT") == "10.3.0"


def test_headers_are_those_that_are_named_or_else_the_systems(
    nothing: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, system = tmp_path / "named", tmp_path / "system"
    monkeypatch.setattr(doctor, "_INCLUDE_FOLDERS", (str(tmp_path / "other"), str(system)))
    monkeypatch.setenv("TENSORRT_INCLUDE", str(named))
    for folder in (system, named):
        folder.mkdir()
        assert found("TensorRT headers") == ("" if folder == system else str(system))
        (folder / "NvInfer.h").write_text("")
        assert found("TensorRT headers") == str(folder)


def test_a_plugin_library_that_is_none_is_reported(
    nothing: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "find_library", lambda: tmp_path / "libdarktrt_plugins.so")
    (tmp_path / "libdarktrt_plugins.so").write_bytes(b"no library")
    assert found("plugin library").startswith(f"not usable: {tmp_path}/libdarktrt_plugins.so: ")


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it has; and nothing large is loaded for it."""
    loaded: list[str] = []
    monkeypatch.setattr(importlib, "import_module", loaded.append)
    found = {f.name: f.found for f in examine_machine()}
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["onnxruntime"]
    assert not loaded


def test_the_table_marks_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
    text = report([Finding("here", "1.0", "x"), Finding("not here", "", "flying: wings")])
    assert text == "ok  here               1.0\n--  not here           not found; would allow flying: wings"
