"""A calibration is the same file, byte for byte, whoever counts and measures which image when: one run, shards, kills."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, batch_of_images, conv, head, made_image, make, net, section
from micro import MICRO, case_of
from PIL import Image

import darktrt
from darktrt.calib import collect as module
from darktrt.calib.channel_means import MeasuredMeans, Range, measure_channel_means
from darktrt.calib.collect import collect
from darktrt.calib.file import CalibrationFile, read_calibration, write_calibration
from darktrt.calib.graph import tensors_to_calibrate
from darktrt.calib.merge import merged
from darktrt.calib.trunk import trunk_of
from darktrt.convert.export import convert_darknet
from darktrt.onnx_file import load_model
from darktrt.onnx_session import OnnxSession
from darktrt.parallel import Done, Threads, Worker, Workers
from darktrt.surgery.rewrite import SurgeryOptions, insert_plugins

IMAGES = 11
OPTIONS = darktrt.CalibrationOptions(bias_images=5, fp_layer_images=3)
CFG = (
    net(40, 24)
    + conv(5, stride=2)
    + conv(6)
    + conv(6, 1)
    + section("shortcut", **{"from": -2, "activation": "linear"})
    + conv(7, stride=2, activation="swish")
    + head(classes=2)
)
"""Tensors of odd numbers of channels and positions, so that vectors of a processor have rests."""


@dataclass(frozen=True)
class Scattered(Workers):
    """Workers like those of a cluster: each has a worker of its own, pickled, and results come in any order."""

    seed: int
    group_size: int = 3
    calls: list[int] = field(default_factory=list)

    def results(
        self,
        make_worker: Callable[[], Worker[Any, Any]],
        groups: Iterable[Sequence[Any]],
        *,
        bytes_each: int,
        gpu: bool = False,
        files: Sequence[Path] = (),
    ) -> Generator[Done[Any, Any], None, None]:
        drawn = random.Random(self.seed)
        workers = [pickle.loads(pickle.dumps(make_worker))() for _ in range(2)]
        waiting = list(groups)
        drawn.shuffle(waiting)
        for group in waiting:
            self.calls.append(len(group))
            worker = drawn.choice(workers)
            worker(group)  # a node that died: its group is done again
            yield Done(group, pickle.loads(pickle.dumps(worker(group))), f"node{drawn.randrange(3)}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net.onnx``, ``in`` with two folders of images of several sizes, and ``whole.calib``, of one run with one thread."""
    folder = tmp_path_factory.mktemp("exact")
    made = make(folder, CFG, batch=(1, 4, 4))
    insert_plugins(made.plain, folder / "net.onnx", SurgeryOptions())
    for i in range(IMAGES):
        path = folder / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made_image(30 + 3 * i, 50 - i, seed=i)).save(path)
    before = Path.cwd()
    os.chdir(folder)
    try:
        darktrt.calibrate("net.onnx", ["in"], "whole.calib", OPTIONS, cluster=Threads(1))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these files as the current folder."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images() -> list[Path]:
    return sorted(Path("in").rglob("*.png"))


def assert_whole(path: str | Path) -> None:
    contents = read_calibration(path)
    assert contents.is_measured and contents.fp_layers() and contents.means.sums
    assert Path(path).read_bytes() == Path("whole.calib").read_bytes()


def run(output: str, data: Sequence[str | Path] = ("in",), cluster: Workers | None = None, **options: Any) -> None:
    darktrt.calibrate("net.onnx", data, output, replace(OPTIONS, **options), cluster=cluster)


# --- who counts, and in which order ---


@pytest.mark.parametrize("cluster", [None, Threads(4, 1), *(Scattered(seed) for seed in range(3))], ids=str)
def test_workers_and_the_order_of_their_results_change_nothing(here: Path, cluster: Workers | None) -> None:
    run("a.calib", cluster=cluster)
    assert_whole("a.calib")
    assert not isinstance(cluster, Scattered) or {1, 2, 3} <= set(cluster.calls)
    assert sorted(path.name for path in here.iterdir() if "calib" in path.name) == ["a.calib", "whole.calib"]


@pytest.mark.parametrize("data", ["reversed", "folders", "list", "twice"])
def test_the_order_in_which_images_are_named_changes_nothing(here: Path, data: str) -> None:
    Path("list.txt").write_text("\n".join(map(str, images()[::-1])))
    shutil.copy(images()[4], "in/b/z.png")  # its content is there already
    entries: dict[str, list[str | Path]] = {
        "reversed": list(images()[::-1]),
        "folders": ["in/b", "in/a"],
        "list": ["list.txt"],
        "twice": ["in", "in/a", images()[0]],
    }
    run("a.calib", entries[data])
    assert_whole("a.calib")


def test_images_with_equal_content_count_once_under_the_first_name(here: Path) -> None:
    paths = images()
    shutil.copy(paths[0], "in/b/0.png")
    found = collect("net.onnx", [Path("in/b/0.png"), *paths], workers=Scattered(1))
    assert len(found.images) == IMAGES
    assert "in/b/0.png" in found.images.values() and str(paths[0]) not in found.images.values()


# --- shards ---


def shards(count: int, **options: Any) -> list[str]:
    names = [f"shard{i}.calib" for i in range(count)]
    for i, name in enumerate(names):
        run(name, images()[i::count], **options)
    return names


@pytest.mark.parametrize(("count", "options"), [(2, {}), (3, {"bias_images": 0, "fp_layer_images": 0}), (3, {"method": "mse"})])
def test_merged_shards_are_one_run(here: Path, count: int, options: dict[str, Any]) -> None:
    names = shards(count, **options)
    chosen: dict[str, Any] = {name: getattr(OPTIONS, name) for name in options}
    darktrt.merge_calibrations(names[::-1], "a.calib", model="net.onnx", **chosen)
    assert_whole("a.calib")


def test_a_merge_without_the_model_lacks_only_what_is_measured(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    calibration = darktrt.merge_calibrations(shards(2), "a.calib")
    assert "a.calib: biases: measured on 0 of 4 images, floating-point layers: measured on 0 of 3 images; resume" in caplog.text
    whole = darktrt.pipeline.load_calibration("whole.calib")
    assert calibration.scales == whole.scales
    assert not calibration.channel_means and calibration.fp_layers is None
    run("a.calib", resume=True)
    assert_whole("a.calib")


def test_what_was_measured_where_the_images_are_is_put_together(here: Path) -> None:
    """Two machines have half of the images each; biases are whole before floating-point layers are measured."""
    run("shard_a.calib", ["in/a"])
    run("shard_b.calib", ["in/b"])
    darktrt.merge_calibrations(["shard_b.calib", "shard_a.calib"], "all.calib")
    for measured in ([(3, 0), (1, 0)], [(4, 1), (4, 2)]):
        for folder, (biases, layers) in zip("ab", measured, strict=True):
            shutil.copy("all.calib", f"{folder}.calib")
            other = Path("in") / ("b" if folder == "a" else "a")
            other.rename("away")
            run(f"{folder}.calib", [f"in/{folder}"], resume=True)
            Path("away").rename(other)
            contents = read_calibration(f"{folder}.calib")
            assert (len(contents.means.images), len(contents.noise_images)) == (biases, layers)
        darktrt.merge_calibrations(["b.calib", "a.calib"], "all.calib")
    assert_whole("all.calib")
    darktrt.merge_calibrations(["whole.calib", "a.calib", "b.calib", "whole.calib"], "all.calib")
    assert_whole("all.calib")


def test_images_elsewhere_count_under_their_names_here(here: Path) -> None:
    """The folder of a merge's images has another name on this machine: all is that of one run but the paths."""
    darktrt.merge_calibrations(shards(3), "a.calib")
    Path("in").rename("there")
    run("a.calib", ["there"], resume=True)
    assert_whole("a.calib")


# --- runs that are killed ---

KILLED = """
import os, signal, sys
import darktrt
from darktrt import pipeline
from darktrt.calib import collect, file
collect.SAVE_EVERY, collect._MOST_SAVING, write = 1, 1e9, file.write_calibration
saves = iter(range(int(sys.argv[1])))
def write_and_die(contents, path):
    write(contents, path)
    if next(saves, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
file.write_calibration = write_and_die
collect.Threads = lambda: darktrt.parallel.Threads(2, 1)
darktrt.calibrate("net.onnx", ["in"], "a.calib", darktrt.CalibrationOptions(bias_images=5, fp_layer_images=3, resume=True))
"""


def test_a_run_killed_again_and_again_goes_on_where_it_was(here: Path) -> None:
    known = []
    for saves in (2, 3):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(saves)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, timeout=120
        )
        assert done.returncode == -signal.SIGKILL
        assert not Path("a.calib").exists()
        known.append(len(read_calibration("a.calib.partial").histograms.images))
    assert 0 < known[0] < known[1] < IMAGES
    with pytest.raises(
        darktrt.DarktrtError, match=r"a\.calib\.partial: has only counts, for the run that makes it has not ended"
    ):
        darktrt.pipeline.load_calibration("a.calib.partial")
    run("a.calib", resume=True)
    assert_whole("a.calib")
    assert not Path("a.calib.partial").exists()


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As at a terminal: the tests themselves may run in the background of a shell, where SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_keeps_what_was_counted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, groups = module._Run._add, iter(range(99))

    def add_and_interrupt(self: Any, done: Any) -> None:
        add(self, done)
        if next(groups) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_add", add_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("a.calib", cluster=Threads(1, 1))
    counted = read_calibration("a.calib.partial")
    assert 2 <= len(counted.histograms.images) < IMAGES
    assert not counted.choices
    rest = [path for path in images() if str(path) not in counted.histograms.images.values()]
    run("rest.calib", rest, cluster=Scattered(5))
    darktrt.merge_calibrations(["rest.calib", "a.calib.partial"], "merged.calib", model="net.onnx")
    assert_whole("merged.calib")
    run("a.calib", resume=True)
    assert_whole("a.calib")


def test_a_run_killed_while_it_measures_counts_no_image_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("darktrt.check.sensitivity.measure_noise", die)
        with pytest.raises(MemoryError):
            run("a.calib")
    assert len(read_calibration("a.calib.partial").histograms.images) == IMAGES
    monkeypatch.setattr(module._Counter, "_count", die)
    run("a.calib", resume=True)
    assert_whole("a.calib")


def test_added_images_make_the_calibration_of_all(here: Path) -> None:
    """Thresholds change, so what was measured with the earlier ones is dropped."""
    run("a.calib", images()[:4])
    assert read_calibration("a.calib").is_measured
    run("a.calib", images()[2:], resume=True)
    assert_whole("a.calib")


def test_another_method_measures_again_and_the_same_one_does_not(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("whole.calib", "a.calib")
    darktrt.merge_calibrations(["a.calib"], "b.calib", method="minmax")
    assert not read_calibration("b.calib").means.images
    run("b.calib", resume=True)
    assert_whole("b.calib")
    monkeypatch.setattr("darktrt.calib.channel_means.measure_channel_means", None)
    run("b.calib", resume=True)
    assert_whole("b.calib")


# --- the arithmetic ---


def test_sums_over_channels_neither_depend_on_order_nor_on_groups(here: Path) -> None:
    ranges = {name: Range(np.float32(0.02), 3) for name in read_calibration("whole.calib").scales}
    whole = measure_channel_means("net.onnx", images(), ranges)
    parts = [measure_channel_means("net.onnx", images()[start:stop], ranges) for start, stop in pairwise((0, 1, 6, IMAGES))]
    added = parts[2] + parts[0] + parts[1]
    assert added.images == whole.images
    for name, sums in whole.sums.items():
        assert sums.means.tolist() == added.sums[name].means.tolist()
        assert sums.levels.tolist() == added.sums[name].levels.tolist()


def test_of_measurements_that_overlap_the_larger_one_is_kept(here: Path) -> None:
    whole = read_calibration("whole.calib")
    sample = whole.means_sample
    assert len(sample) == 4
    paths = {digest: Path(path) for digest, path in whole.histograms.images.items()}

    def with_means(*indices: int) -> CalibrationFile:
        measured = measure_channel_means("net.onnx", [paths[sample[i]] for i in indices], whole.ranges)
        return replace(whole, means=measured, noise=None)

    for number, indices in enumerate([(0, 1), (1, 2, 3), (0,)]):
        write_calibration(with_means(*indices), f"{number}.calib")
    assert merged(["0.calib", "1.calib"]).means.images == {sample[1], sample[2], sample[3]}
    both = merged(["2.calib", "0.calib", "1.calib"]).means
    assert both.images == frozenset(sample)
    for name, sums in both.sums.items():
        assert sums.means.tolist() == whole.means.sums[name].means.tolist()
    assert (MeasuredMeans() + both).images == both.images


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_is_that_of_one_thread_on_one_image(tmp_path: Path, batch: int) -> None:
    """ONNX Runtime's Softplus has other last bits at the ends of the parts that threads share, and in a batch's next image.

    So a model for three images has the values of one for a single image, also where several threads run it.
    """
    cfg = net(226, 222) + conv(7, stride=2) + conv(9) + head()
    paths = [make(tmp_path, cfg, (size, size, size), name=f"net{size}").plain for size in (1, batch)]
    for path in paths:
        insert_plugins(path, path.with_suffix(".native.onnx"), SurgeryOptions(mish="native"))
    models = [load_model(path.with_suffix(".native.onnx")) for path in paths]
    names = tensors_to_calibrate(*models[0])
    trunks = [trunk_of(path, model, info, names) for path, (model, info) in zip(paths, models, strict=True)]
    image = batch_of_images(trunks[0].info, 1)[0]
    expected = OnnxSession(trunks[0].model, "one", threads=1).run({"images": image[np.newaxis]})
    opened = trunks[1].open()
    with ThreadPoolExecutor(3) as pool:
        for values, _ in pool.map(opened.run, [image] * 6):
            assert sorted(values) == sorted(names)
            assert [name for name in names if values[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.parametrize("name", ["mish", "swish", "every layer with mish", "squeeze and excite", "normalize_channels_softmax"])
def test_sections_and_activations_do_not_depend_on_workers(tmp_path: Path, name: str) -> None:
    case = case_of(tmp_path, MICRO[name])
    convert_darknet(case.cfg, case.weights, tmp_path / "net.onnx", batch=(1, 4, 4))
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(made_image(20, 30, seed=i)).save(path)
    options = replace(OPTIONS, fp_layer_images=0)
    files = []
    for number, cluster in enumerate((Threads(1), Threads(2, 1), Scattered(3))):
        darktrt.calibrate(tmp_path / "net.onnx", paths, tmp_path / f"{number}.calib", options, cluster=cluster)
        files.append((tmp_path / f"{number}.calib").read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_sessions_of_every_pass_have_one_thread(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    init = OnnxSession.__init__

    def note(self: Any, model: Any, name: str, threads: int = 0, *rest: Any, **named: Any) -> None:
        noted.append(threads)
        init(self, model, name, threads, *rest, **named)

    monkeypatch.setattr(OnnxSession, "__init__", note)
    run("a.calib")
    assert noted.count(0) == 1, "only the one that counts operations has more"
    assert len(noted) >= 5 and set(noted) == {0, 1}
