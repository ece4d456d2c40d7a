"""benchmarks/list_cfgs.py and compare_darknet.py: what they say of made networks."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import MADE_CFG, ROOT, head, net, section

LIBRARY = os.environ.get("DARKTRT_LIBDARKNET", "")


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A module of benchmarks/, without its bars."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = import_module(name)
    monkeypatch.setattr(module, "set_progress", lambda how: None)
    return module


@pytest.fixture
def list_cfgs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "list_cfgs")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "compare_darknet")


def test_each_cfg_is_listed_once_with_its_result(list_cfgs: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "cfgs" / "AlexeyAB" / "darknet", tmp_path / "cfgs" / "a" / "copy"
    for folder in (first / "cfg", second):
        folder.mkdir(parents=True)
    (first / "cfg" / "good.cfg").write_text(MADE_CFG)
    (second / "good.cfg").write_bytes(MADE_CFG.encode().replace(b"\n", b"\r\n"))
    (second / "classifier.cfg").write_text(net() + section("avgpool"))
    (second / "odd.cfg").write_text(net(416, 416) + head() + section("nonsense"))
    (second / "small.cfg").write_text(net(8, 8) + section("convolutional", size=9) + head())
    (second / "setup.cfg").write_text("[metadata]\nname=x\n")
    output = tmp_path / "networks.md"
    list_cfgs.main([str(tmp_path / "cfgs"), "-o", str(output)])
    text = output.read_text()
    assert (
        "Of 4 different darknet cfgs (5 files) of 2 public repositories,\n3 are detectors. darktrt converts 2 of them" in text
    )
    assert "| AlexeyAB/darknet | cfg/good.cfg | 2 [yolo] | converted |" in text
    assert "| a/copy | 4 | 3 | 2 | 1 | 1 |" in text
    assert re.search(r"\| a/copy \| odd.cfg \| \[yolo\] \| line \d+: \[nonsense\] is not supported", text)
    assert "| a/copy | small.cfg | [yolo] | converted at 512x512; at its own size: line" in text
    assert str(tmp_path) not in text


def test_an_export_gives_the_same_result(list_cfgs: ModuleType, tmp_path: Path) -> None:
    cfg = tmp_path / "made.cfg"
    cfg.write_text(MADE_CFG)
    assert list_cfgs.refusal(cfg, None, export=True) == list_cfgs.refusal(cfg, None, export=False) == ""


def test_a_folder_without_repositories_is_refused(
    list_cfgs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="has no folder OWNER/REPOSITORY"):
        list_cfgs.main([str(tmp_path), "-o", str(tmp_path / "networks.md")])


def test_a_difference_is_of_the_largest_reference(compare: ModuleType) -> None:
    infinite = np.float32("inf")
    assert compare.difference(np.array([1.0, -4.5, infinite]), np.array([1.0, -4.0, infinite])) == 0.125
    assert compare.difference(np.array([1.0, infinite]), np.array([1.0, 2.0])) == infinite


def test_detections_are_matched_by_class_and_place(compare: ModuleType) -> None:
    mine = np.array([[0, 0, 10, 10, 0.9, 1], [20, 20, 30, 30, 0.5, 0]], np.float32)
    moved = mine + np.array([0.01, 0, 0, 0, 0, 0], np.float32)
    assert compare.matched(mine, moved, 100) == (2, 0, pytest.approx(1e-4, rel=1e-3))
    other_class = mine + np.array([0, 0, 0, 0, 0, 1], np.float32)
    assert compare.matched(mine, other_class, 100) == (0, 4, 0)
    assert compare.matched(mine, mine[:1], 100) == (1, 1, 0)


def test_the_threshold_lies_in_the_widest_gap(compare: ModuleType) -> None:
    scores = np.linspace(0.9, 0.5, 300, dtype=np.float32)
    scores[150:] -= 0.3
    assert scores[150] < compare.threshold_of(scores.reshape(3, 100)) < scores[149]
    assert compare.threshold_of(np.array([[0.7]], np.float32)) == compare.LEAST


def test_networks_that_darknet_computes_wrongly_are_told(compare: ModuleType, tmp_path: Path) -> None:
    cfg = tmp_path / "x.cfg"
    for text, reason in (
        (MADE_CFG, ""),
        (net() + section("convolutional", activation="relu6") + head(), "relu6 of [convolutional] is 0 on darknet's CPU"),
        (net() + section("convolutional", activation="silu") + head(), "darknet does not know silu and computes relu"),
        (net() + section("convolutional", binary=1) + head(), "binary=1 has no effect on darknet's CPU"),
        (net() + section("convolutional", binary=1, xnor=1) + head(), ""),
        (
            net() + section("convolutional", filters=2) + section("route_lhalf", layers=-1) + head(),
            "[route_lhalf] is of a fork in PyTorch",
        ),
    ):
        cfg.write_text(text)
        assert compare.fault_of_darknet(cfg) == reason


def test_a_network_that_cannot_be_compared_is_noted(compare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_text(MADE_CFG.replace("[yolo]", "[nonsense]", 1))
    report = compare.Report()
    with compare.Process() as process:
        compare.add(report, compare.Case("x", tmp_path / "x.cfg", None, None), Path("none"), tmp_path, process)
    assert not report.cfgs
    assert re.match(r"x: \d+: \[nonsense\] is not supported", report.left_out[0])


def test_a_library_that_is_not_darknets_is_refused(compare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "libdarknet.so").write_bytes(b"no library")
    with pytest.raises(SystemExit, match=r"libdarknet\.so: cannot be loaded .* build darknet with LIBSO=1"):
        compare.main([str(tmp_path / "libdarknet.so"), "x.cfg"])


@pytest.mark.skipif(not LIBRARY, reason="needs darknet's libdarknet.so; name it in DARKTRT_LIBDARKNET")
def test_two_networks_agree_with_darknet(compare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "made.cfg").write_text(MADE_CFG)
    (tmp_path / "plain.cfg").write_text(MADE_CFG.replace("nms_kind=greedynms", "nms_kind=default"))
    args = compare.parse([LIBRARY, str(tmp_path), "--size", "64x96"])
    report = compare.compared(args, tmp_path)
    assert [one.case.name for one in report.cfgs] == ["made", "plain"]
    for one in report.cfgs:
        assert (one.info.width, one.info.height) == (64, 96)
        assert max(one.worst, one.detections) < 1e-5
        assert one.both > 20 and one.only == 0
