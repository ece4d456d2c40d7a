"""The calibration file: it comes back as it was, has the same bytes each time, and is refused where it cannot be one."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Array, declare

from darktrt import __version__
from darktrt.archives import write_archive
from darktrt.calib.bias_correction import MOST_IMAGES, UNIT_BITS, ChannelSums
from darktrt.calib.channel_means import MeasuredMeans
from darktrt.calib.file import (
    CalibratedNetwork,
    CalibrationFile,
    check_calibration_output,
    in_order,
    is_cache,
    partial_path,
    read_calibration,
    to_json,
    write_calibration,
)
from darktrt.calib.fp_layers import NoiseSums
from darktrt.calib.histogram import BINS, HistogramSet
from darktrt.calib.options import CalibrationSettings
from darktrt.calib.table import CalibrationTable
from darktrt.calib.threshold import choose_thresholds
from darktrt.errors import DarktrtError
from darktrt.pipeline import load_calibration

RANDOM = np.random.default_rng(5)
DIGESTS = [f"{i:x}" * 64 for i in range(4)]
NETWORK = CalibratedNetwork("größe", 96, 64, "nms", {"cfg": "a" * 64, "weights": "b" * 64})
SETTINGS = CalibrationSettings(limit=9, bias_images=2, fp_layer_images=1)
TENSORS = ("a: b", "größe")


def made(folder: str = "images") -> CalibrationFile:
    """Four images, of which two are for channel means and one is for floating-point layers; everything is measured."""
    histograms = HistogramSet("c" * 64, groups=[list(TENSORS)], head_inputs=["größe"], mish={"a: b": "größe"})
    for i, digest in enumerate(DIGESTS):
        values = RANDOM.normal(0, 1 + i, (1, 3, 5, 7)).astype(np.float32)
        histograms.add({"a: b": values, "größe": np.maximum(values, 0)}, {digest: f"{folder}/{3 - i} x.jpg"})
    histograms.skipped = {"images/bad.jpg": "images/bad.jpg: is empty"}
    sums = {
        name: ChannelSums(35, RANDOM.integers(-(10**9), 10**9, channels), RANDOM.integers(-4000, 4000, channels))
        for name, channels in zip(TENSORS, (3, 5), strict=True)
    }
    contents = CalibrationFile(NETWORK, SETTINGS, histograms, ("of samples",), choose_thresholds(histograms))
    noise = NoiseSums(("first",), (("x", "y"), ("z",)), (0.25, 0.75), {contents.noise_sample[0]: RANDOM.random((2, 5))})
    return replace(contents, means=MeasuredMeans(frozenset(contents.means_sample), sums), noise=noise)


WHOLE = made()


def written(folder: Path, contents: CalibrationFile = WHOLE) -> Path:
    write_calibration(contents, folder / "a.calib")
    return folder / "a.calib"


def test_everything_comes_back(tmp_path: Path) -> None:
    contents = read_calibration(written(tmp_path))
    assert to_json(contents) == to_json(WHOLE)
    assert contents.choices == WHOLE.choices
    assert contents.fp_layers() == WHOLE.fp_layers()
    for name, histogram in WHOLE.histograms.histograms.items():
        assert np.array_equal(contents.histograms.histograms[name].counts, histogram.counts)
        assert np.array_equal(contents.histograms.histograms[name].weighted, histogram.weighted)
    for name, means in WHOLE.means.channel_means(WHOLE.ranges).items():
        back = contents.means.channel_means(contents.ranges)[name]
        assert back.mean.tolist() == means.mean.tolist() and back.quantized.tolist() == means.quantized.tolist()
    before = (tmp_path / "a.calib").read_bytes()
    write_calibration(contents, tmp_path / "b.calib")
    assert (tmp_path / "b.calib").read_bytes() == before


def test_the_file_says_in_words_what_it_holds(tmp_path: Path) -> None:
    with zipfile.ZipFile(written(tmp_path)) as archive:
        assert archive.namelist()[0] == "calibration.json"
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        values = json.loads(archive.read("calibration.json"))
    assert values["format"] == "darktrt calibration 2"
    assert values["darktrt"] == __version__
    assert values["network"]["onnx"] == "c" * 64 and values["network"]["sources"]["weights"] == "b" * 64
    assert list(values["images"].items()) == [(DIGESTS[3 - i], f"images/{i} x.jpg") for i in range(4)]
    assert values["thresholds"]["größe"]["scale"] == float(WHOLE.scales["größe"])
    assert [cost["nodes"] for cost in values["fp_layers"]["costs"]] == [["x", "y"], ["z"]]
    assert values["settings"] == {
        "limit": 9, "seed": 0, "method": "auto", "percentile": 99.99, "bias_images": 2, "fp_layer_images": 1
    }  # fmt: skip


def test_neither_the_order_of_images_nor_that_of_measurements_shows(tmp_path: Path) -> None:
    histograms = replace(WHOLE.histograms, images=dict(reversed(WHOLE.histograms.images.items())))
    write_calibration(replace(WHOLE, histograms=histograms), tmp_path / "b.calib")
    assert (tmp_path / "b.calib").read_bytes() == written(tmp_path).read_bytes()


def test_images_are_ordered_by_name_and_then_by_content() -> None:
    images = {"b": "z/1.jpg", "a": "y/1.jpg", "d": "1/2.jpg", "c": "0.jpg"}
    assert in_order(images) == ["c", "a", "b", "d"]
    assert WHOLE.means_sample == [DIGESTS[3], DIGESTS[1]]
    assert WHOLE.noise_sample == [DIGESTS[3]]
    assert replace(WHOLE, network=replace(NETWORK, head="raw")).noise_sample == []


def test_the_sample_of_a_later_pass_is_spread_over_the_images() -> None:
    images = {str(i): f"{i}.jpg" for i in range(7)}
    histograms = HistogramSet("model", images=images)
    for number, chosen in ((0, []), (1, [0]), (2, [0, 4]), (3, [0, 3, 6]), (4, [0, 2, 4, 6]), (7, range(7)), (64, range(7))):
        contents = CalibrationFile(NETWORK, CalibrationSettings(bias_images=number, fp_layer_images=number), histograms)
        assert contents.means_sample == contents.noise_sample == [str(i) for i in chosen]


def test_counts_alone_are_a_file_too_which_no_later_stage_takes(tmp_path: Path) -> None:
    counts = replace(WHOLE, choices={}, means=MeasuredMeans(), noise=None)
    contents = read_calibration(written(tmp_path, counts))
    assert not contents.choices and not contents.means.images and contents.noise is None
    with pytest.raises(DarktrtError, match=r"a\.calib: has only counts, .*; resume that run, or merge this file$") as raised:
        load_calibration(tmp_path / "a.calib")
    assert raised.value.argument == "calibration"


@pytest.mark.parametrize("lacking", ["means", "noise"])
def test_a_calibration_that_lacks_measurements_is_taken_with_a_warning(
    tmp_path: Path, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    some = MeasuredMeans(frozenset(WHOLE.means_sample[:1]), WHOLE.means.sums)
    calibration = load_calibration(
        written(tmp_path, replace(WHOLE, noise=None, **{"means": some} if lacking == "means" else {}))
    )
    biases = "1 of 2" if lacking == "means" else "2 of 2"
    sentence = f"a.calib: biases: measured on {biases} images, floating-point layers: measured on 0 of 1 images; resume the"
    assert sentence in caplog.text
    assert calibration.channel_means.keys() == set(TENSORS) and calibration.fp_layers is None
    caplog.clear()
    assert load_calibration(written(tmp_path)).fp_layers == WHOLE.fp_layers().names  # type: ignore[union-attr]
    assert not caplog.text


def test_what_later_stages_read(tmp_path: Path) -> None:
    calibration = load_calibration(written(tmp_path), ("x",))
    assert calibration.fp_layers == ("x",)
    assert calibration.scales == WHOLE.scales
    assert calibration.images == frozenset(DIGESTS)
    assert calibration.model_sha256 == "c" * 64 and calibration.sources == NETWORK.sources


# --- damaged files ---


def test_a_later_version_asks_for_an_update(tmp_path: Path) -> None:
    """Whatever else it says."""
    write_archive(tmp_path / "a.calib", "calibration.json", '{"format": "darktrt calibration 3", "new": [1]}', {})
    with pytest.raises(
        DarktrtError, match=r"a\.calib: is of version 3 of calibration files, and .* reads version 2; update dar"
    ):
        read_calibration(tmp_path / "a.calib")


@pytest.mark.parametrize("format_", ["darktrt calibration 1", "darktrt histograms 3", "darktrt calibration 1.5", 1, None])
def test_another_kind_of_file_is_none(tmp_path: Path, format_: object) -> None:
    write_archive(tmp_path / "a.calib", "calibration.json", json.dumps({"format": format_}), {})
    with pytest.raises(DarktrtError, match=r"a\.calib: is no calibration \(its format is '.*'\); name a calibration"):
        read_calibration(tmp_path / "a.calib")


def _edit(change: Callable[[dict[str, Any], dict[str, Array]], object]) -> Callable[[Path], object]:
    """Change the JSON and the arrays of a file."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            text = json.loads(archive.read("calibration.json"))
        with np.load(path) as arrays:
            saved = {name: arrays[name] for name in arrays.files if name != "calibration.json"}
        change(text, saved)
        write_archive(path, "calibration.json", json.dumps(text), saved)

    return damage


def _text(*keys: str | int, to: Any = None) -> Callable[[Path], object]:
    def change(text: Any, _: object) -> None:
        for key in keys[:-1]:
            text = text[key]
        text[keys[-1]] = to

    return _edit(change)


def _array(name: str, change: Callable[[Array], Array]) -> Callable[[Path], object]:
    return _edit(lambda _, arrays: arrays.update({name: change(arrays[name])}))


def _at(index: Any, value: Any) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        changed = array.copy()
        changed[index] = value
        return changed

    return change


CHOSEN = json.loads(to_json(WHOLE))["fp_layers"]["costs"][0]["in_floating_point"]
FIELDS = [name for name in json.loads(to_json(WHOLE)) if name != "format"]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "empty": lambda path: path.write_bytes(b""),
    "no zip": lambda path: path.write_text("x"),
    "another zip": lambda path: np.savez(path.open("wb"), other=np.zeros(3)),
    "no json": lambda path: write_archive(path, "calibration.json", "{", {}),
    "nested json": lambda path: write_archive(path, "calibration.json", "[" * 100_000, {}),
    "another member": _edit(lambda _, arrays: arrays.update(more=np.zeros(3))),
    **{f"no {name}": _edit(lambda text, _, name=name: text.pop(name)) for name in FIELDS},
    "another field": _text("more", to=1),
    "settings": _text("settings", "percentile", to=101.0),
    "method": _text("settings", "method", to="kl"),
    "bias images": _text("settings", "bias_images", to=MOST_IMAGES + 1),
    "no images": _text("images", to={}),
    "an image without its hash": _text("images", "digest", to="a.jpg"),
    "a path that is none": _text("images", DIGESTS[0], to=7),
    "no tensors": _text("tensors", to={}),
    "another tensor": _edit(lambda text, _: text["tensors"].update(more=text["tensors"]["größe"])),
    "a group of others": _text("groups", to=[["a: b", "other"]]),
    "groups": _text("groups", to=7),
    "head inputs": _text("head_inputs", to=["other"]),
    "mish": _text("mish", to={"a: b": "other"}),
    "mish of others": _text("mish", to={"other": "a: b"}),
    "exponent": _text("tensors", "größe", "exponent", to=7),
    "minimum": _text("tensors", "größe", "minimum", to=1e300),
    "zeros": _text("tensors", "größe", "zeros", to=-1),
    "counts": _array("counts", _at((0, BINS - 1), 1)),
    "negative counts": _array("counts", _at((0, 0), -1)),
    "counts of another shape": _array("counts", lambda counts: counts[:1]),
    "counts of another type": _array("counts", lambda counts: counts.astype(np.float64)),
    "no counts": _edit(lambda _, arrays: arrays.pop("counts")),
    "weighted": _array("weighted", _at((1, BINS - 1), 1)),
    "no threshold": _edit(lambda text, _: text["thresholds"].pop("größe")),
    "a scale of another threshold": _text("thresholds", "größe", "scale", to=0.5),
    "a threshold of 0": _edit(lambda text, _: text["thresholds"]["größe"].update(amax=0.0, scale=0.0)),
    "a negative threshold": _edit(lambda text, _: text["thresholds"]["größe"].update(amax=-127.0, scale=-1.0)),
    "an endless threshold": _edit(lambda text, _: text["thresholds"]["größe"].update(amax=1e300)),
    "errors": _text("thresholds", "größe", "errors", to={"mse": "low"}),
    "means without thresholds": _text("thresholds"),
    "means of another image": _text("channel_means", "images", to=[DIGESTS[0]]),
    "means of an image twice": _text("channel_means", "images", to=[DIGESTS[1], DIGESTS[1]]),
    "means of no image": _edit(lambda text, _: text.update(fp_layers=None, channel_means={"images": [], "tensors": {}})),
    "means of another tensor": _text("channel_means", "tensors", "other", to={"channels": 1, "positions": 1}),
    "channels": _text("channel_means", "tensors", "größe", "channels", to=4),
    "no channels": _text("channel_means", "tensors", "größe", "channels", to=0),
    "positions": _text("channel_means", "tensors", "größe", "positions", to=1 << 31),
    "mean sums": _array("mean_sums", _at(0, (2 << UNIT_BITS + 1) + 1)),
    "level sums": _array("level_sums", _at(7, -128 * 35 * 2 - 1)),
    "level sums at their end": _array("level_sums", _at(7, -(1 << 63))),
    "layers before biases": _text("channel_means", "images", to=[DIGESTS[1]]),
    "layers of another image": _text("fp_layers", "images", to=[DIGESTS[1]]),
    "layers of more images": _text("fp_layers", "images", to=[DIGESTS[3], DIGESTS[1]]),
    "noise": _text("fp_layers", "costs", 0, "noise", to=0.5),
    "chosen": _text("fp_layers", "costs", 0, "in_floating_point", to=not CHOSEN),
    "operations": _text("fp_layers", "costs", 0, "operations", to=1.5),
    "nodes": _text("fp_layers", "costs", 0, "nodes", to=[]),
    "noise sums": _array("noise_sums", _at((0, 0, 0), np.inf)),
    "negative noise": _array("noise_sums", _at((0, 0, 3), -1.0)),
    "noise of another shape": _array("noise_sums", lambda sums: sums[:, :1]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    DAMAGES[damage](path)
    with pytest.raises(
        DarktrtError, match=r"a\.calib: is damaged .*\(.+\); name a calibration \(\.calib\) of 'darktrt calib run'"
    ):
        read_calibration(path)


def test_the_largest_sums_are_none_too_large(tmp_path: Path) -> None:
    path = written(tmp_path)
    _array("mean_sums", _at(0, 2 << UNIT_BITS + 1))(path)
    _array("level_sums", _at(7, -128 * 35 * 2))(path)
    assert int(read_calibration(path).means.sums["größe"].levels[4]) == -128 * 35 * 2


def test_files_larger_than_any_are_refused_by_their_declared_sizes(tmp_path: Path) -> None:
    for member, what, size in (("counts.npy", "arrays have", 768 << 20), ("calibration.json", "text has", (512 << 20) + 1)):
        path = written(tmp_path)
        declare(path, member, size)
        with pytest.raises(DarktrtError, match=rf"is damaged \(its {what} [0-9]+ MB, more than [0-9]+ MB\)"):
            read_calibration(path)


# --- which file is which ---


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    CalibrationTable({"x": np.float32(0.5)}, "8600").save(tmp_path / "b.calib")
    assert is_cache(tmp_path / "b.calib") and not is_cache(written(tmp_path))
    assert load_calibration(tmp_path / "b.calib").scales == {"x": np.float32(0.5)}
    (tmp_path / "mark.cache").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "b.calib").read_bytes())
    assert load_calibration(tmp_path / "mark.cache").scales == {"x": np.float32(0.5)}
    with pytest.raises(DarktrtError, match=r"b\.calib: is a TensorRT calibration cache, which has scales only; name a cal"):
        read_calibration(tmp_path / "b.calib")
    for content in (b"", b"\0" * 99, b"{}"):
        (tmp_path / "none").write_bytes(content)
        with pytest.raises(
            DarktrtError, match="none: is neither a calibration of darktrt nor a TensorRT calibration cache; name"
        ):
            load_calibration(tmp_path / "none")
    with pytest.raises(DarktrtError, match="No such file"):
        load_calibration(tmp_path / "missing.calib")


def test_outputs_are_refused_before_the_work(folder: Path) -> None:
    Path("sub").mkdir()
    Path("taken.calib.partial").mkdir()
    Path("model.onnx").touch()
    assert partial_path("a.calib") == Path("a.calib.partial")
    for output, message in (
        ("sub", "sub: is a folder"),
        ("taken.calib", r"taken\.calib\.partial: is a folder"),
        ("none/a.calib", "cannot write: No such file or directory"),
        ("model.onnx", r"model\.onnx: is given twice"),
        (f"{'a' * 250}.calib", "cannot write: File name too long"),
    ):
        with pytest.raises(DarktrtError, match=message):
            check_calibration_output(output, ["model.onnx"])
    check_calibration_output("a.calib", ["model.onnx"])
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "sub", "taken.calib.partial"]
